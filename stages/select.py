"""The windows that `continue` and `distill` train on: data/windows.npy and metrics/windows.json."""

from microlm.config import load_config
from microlm.errors import run_stage
from microlm.pipeline.select import select_windows
from microlm.runtime.device import set_up


def main() -> None:
    config = load_config()
    select_windows(config, set_up(config.at.runtime))


if __name__ == "__main__":
    run_stage(main)
