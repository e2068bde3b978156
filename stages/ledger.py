"""What the teacher's cache cost and saves, on this machine -> metrics/ledger.json."""

from microlm.config import load_config
from microlm.errors import run_stage
from microlm.files import write_json
from microlm.research.ledger import ledger, summary
from microlm.runtime.device import set_up
from microlm.runtime.paths import METRICS


def main() -> None:
    config = load_config()
    entries = ledger(config, set_up(config.continuation_runtime))
    write_json(METRICS / "ledger.json", entries)
    print(summary(entries))


if __name__ == "__main__":
    run_stage(main)
