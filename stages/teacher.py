"""The teacher, once, over the windows that students will see: data/teacher and metrics/teacher.json."""

from microlm.config import load_config
from microlm.launcher import run_shared_stage
from microlm.pipeline.labels import label
from microlm.runtime import set_up


def main() -> None:
    config = load_config()
    label(config, set_up(config.at.runtime))


if __name__ == "__main__":
    run_shared_stage(main)
