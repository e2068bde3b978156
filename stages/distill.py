"""The student: the control continued under (1 - alpha) CE + alpha D from the teacher's cache."""

from microlm.config import load_config
from microlm.pipeline import training_stages
from microlm.runtime.device import set_up
from microlm.runtime.launcher import run_shared_stage


def main() -> None:
    config = load_config()
    training_stages.distill(config, set_up(config.continuation_runtime))


if __name__ == "__main__":
    run_shared_stage(main, training_stages.most_processes)
