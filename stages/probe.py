"""Cache layouts on real positions: metrics/probe.json, plots/probe.csv and plots/probe.png.

--markdown prints the table as docs/distillation.md has it, of the last run.
"""

import sys

from microlm.config import load_config
from microlm.errors import UserError, run_stage
from microlm.files import read_json
from microlm.research.probe.run import RESULT, markdown, probe
from microlm.runtime.device import set_up


def main() -> None:
    if sys.argv[1:] == ["--markdown"]:
        print(markdown(read_json(RESULT, "measure/dvc.yaml:probe")), end="")
        return
    if sys.argv[1:]:
        raise UserError("stages.probe: takes one option or none: python -m stages.probe [--markdown]")
    config = load_config()
    probe(config, set_up(config.at.runtime))


if __name__ == "__main__":
    run_stage(main)
