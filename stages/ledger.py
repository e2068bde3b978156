"""What the teacher's cache cost and saves, on this machine -> metrics/ledger.json."""

from pathlib import Path

from microlm.config import load_config
from microlm.errors import run_stage
from microlm.files import write_json
from microlm.pipeline.ledger import ledger, summary
from microlm.runtime import set_up

METRICS = Path("metrics/ledger.json")


def main() -> None:
    config = load_config()
    entries = ledger(config, set_up(config.continuation_runtime))
    write_json(METRICS, entries)
    print(summary(entries))


if __name__ == "__main__":
    run_stage(main)
