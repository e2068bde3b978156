"""The matched control: the control continued under cross-entropy on the windows the student sees."""

from microlm.config import load_config
from microlm.pipeline import training_stages
from microlm.runtime.device import set_up
from microlm.runtime.launcher import run_shared_stage


def main() -> None:
    config = load_config()
    training_stages.continue_control(config, set_up(config.continuation_runtime))


if __name__ == "__main__":
    run_shared_stage(main, training_stages.most_processes)
