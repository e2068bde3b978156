"""The control: a student from scratch under cross-entropy."""

from microlm.config import load_config
from microlm.pipeline import training_stages
from microlm.runtime.device import set_up
from microlm.runtime.launcher import run_shared_stage


def main() -> None:
    config = load_config()
    training_stages.pretrain(config, set_up(config.at.runtime))


if __name__ == "__main__":
    run_shared_stage(main, training_stages.most_processes)
