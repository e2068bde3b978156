"""The control: a student from scratch under cross-entropy."""

from microlm.config import load_config
from microlm.launcher import run_shared_stage
from microlm.pipeline import arms
from microlm.runtime import set_up


def main() -> None:
    config = load_config()
    arms.pretrain(config, set_up(config.at.runtime))


if __name__ == "__main__":
    run_shared_stage(main, arms.most_processes)
