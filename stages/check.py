"""Stage check: refuse bad parameters while every other stage's outputs are still there.

DVC removes a stage's outputs before it runs the stage's command, so a training that found `alpha: high` by itself
would already have lost the old student. The text written here never changes, so that nothing downstream runs again.
"""

from microlm.config import load_config
from microlm.corpus.outside_source import refuse_unfit
from microlm.errors import run_stage
from microlm.evaluation.benchmarks import configured_benchmarks
from microlm.files import atomic_file
from microlm.starts.request import check_start


def main() -> None:
    config = load_config()
    configured_benchmarks(config)
    check_start(config)
    refuse_unfit(config)
    with atomic_file("data/params.ok", "w") as file:
        file.write("params.yaml was accepted\n")


if __name__ == "__main__":
    run_stage(main)
