"""The teacher, once, over the windows that students will see: data/teacher and metrics/teacher.json."""

from microlm.config import load_config
from microlm.pipeline.capture import label
from microlm.runtime.device import set_up
from microlm.runtime.launcher import run_shared_stage


def main() -> None:
    config = load_config()
    label(config, set_up(config.at.runtime))


if __name__ == "__main__":
    run_shared_stage(main)
