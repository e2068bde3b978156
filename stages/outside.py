"""Text of another kind than the corpus to token shards -> data/outside/, metrics/outside.json."""

from microlm.config import load_config
from microlm.corpus.outside import write_outside
from microlm.errors import run_stage
from microlm.files import write_json
from microlm.runtime.paths import METRICS, OUTSIDE, SHARDS


def main() -> None:
    counts = write_outside(load_config().at, SHARDS, OUTSIDE)
    write_json(METRICS / "outside.json", counts)
    kinds = ", ".join(f"{of['documents']} {kind}" for kind, of in counts["kinds"].items()) or "evaluation.outside: null"
    print(f"outside: {counts['documents']:,} documents ({kinds}), {counts['tokens']:,} tokens")


if __name__ == "__main__":
    run_stage(main)
