"""The matched control: the control continued under cross-entropy on the windows the student sees."""

from microlm.config import load_config
from microlm.launcher import run_shared_stage
from microlm.pipeline import arms
from microlm.runtime import set_up


def main() -> None:
    config = load_config()
    arms.continue_control(config, set_up(config.continuation_runtime))


if __name__ == "__main__":
    run_shared_stage(main, arms.most_processes)
