"""Cache layouts on real positions: metrics/probe.json, plots/probe.csv and plots/probe.png."""

from microlm.config import load_config
from microlm.errors import run_stage
from microlm.probe.run import probe
from microlm.runtime import set_up


def main() -> None:
    config = load_config()
    probe(config, set_up(config.at.runtime))


if __name__ == "__main__":
    run_stage(main)
