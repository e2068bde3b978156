"""Stage check: refuse bad parameters while every other stage's outputs are still there.

DVC removes a stage's outputs before it runs the stage's command, so a training that found `alpha: high` by itself
would already have lost the old student. The text written here never changes, so that nothing downstream runs again.
"""

from microlm.config import load_config
from microlm.corpus.sources import refuse_unfit
from microlm.errors import run_stage
from microlm.evaluation.tasks.benchmarks import configured_benchmarks
from microlm.files import atomic_file
from microlm.models.model_names import refuse_absent_folder
from microlm.models.start_request import check_start
from microlm.training.live_curves import refuse_absent


def main() -> None:
    config = load_config()
    at = config.at
    refuse_absent(config.log)
    refuse_absent_folder(at.teacher.model, f"params.yaml: scales.{config.scale}.teacher.model: ")
    with config.naming_keys():
        configured_benchmarks(at.evaluation.benchmarks)
        check_start(config.start_kind, at)
        refuse_unfit(at.evaluation.outside, at.corpus)
    with atomic_file("data/params.ok", "w") as file:
        file.write("params.yaml was accepted\n")


if __name__ == "__main__":
    run_stage(main)
