"""The control's first weights: fresh, with the teacher's embedding, or cut out of the teacher -> models/start."""

from microlm.config import load_config
from microlm.errors import run_stage
from microlm.pipeline.start import make_start
from microlm.runtime.device import set_up


def main() -> None:
    config = load_config()
    make_start(config, set_up(config.at.runtime))


if __name__ == "__main__":
    run_stage(main)
