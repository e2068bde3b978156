"""The student: the control continued under (1 - alpha) CE + alpha D from the teacher's cache."""

from microlm.config import load_config
from microlm.launcher import run_shared_stage
from microlm.pipeline import arms
from microlm.runtime import set_up


def main() -> None:
    config = load_config()
    arms.distill(config, set_up(config.continuation_runtime))


if __name__ == "__main__":
    run_shared_stage(main, arms.most_processes)
