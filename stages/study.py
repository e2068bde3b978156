"""Run a grid of study/<name>.yaml through the DVC queue -> study/results.csv, STUDY.md. Run again, it goes on."""

import signal
from pathlib import Path
from typing import Any

from microlm.config import load_config
from microlm.errors import OneLineParser, UserError, run_stage
from microlm.research.study.grid import FIRST, FOLDER, read_grid, read_yaml
from microlm.runtime.cores import available_cores

ROOT = Path(".")


def main() -> None:
    parser = OneLineParser(prog="python -m stages.study", description=__doc__)
    parser.add_argument("--study", default=FIRST, help="a file of study/, without .yaml (default: grid, the first)")
    parser.add_argument("--grid", help="a grid of that file (default: its first)")
    parser.add_argument("--scale", help="a scale of params.yaml (default: the file's own)")
    parser.add_argument("--jobs", type=int, help="runs at once (default: cores / runtime.threads)")
    parser.add_argument("--list", action="store_true", help="print the runs and what each overrides; run nothing")
    parser.add_argument("--report", action="store_true", help="write the report of what is there; run nothing")
    parser.add_argument(
        "--accept", action="store_true", help="run a few points again; where their losses stand, take all rows for done"
    )
    parser.add_argument("--markdown", action="store_true", help="print the arms' table for the docs; run nothing")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as Ctrl-C does: the workers too
    load_config()  # all that is wrong in params.yaml, before its copies are
    params = read_yaml(ROOT / "params.yaml")
    known = sorted(path.stem for path in (ROOT / FOLDER).glob("*.yaml"))
    if asked.study not in known:
        choice = ", ".join(known)
        raise UserError(f"stages.study: --study {asked.study}: there is no such file in study/; choose of {choice}")
    grid = read_grid(asked.grid, asked.scale, params, ROOT / FOLDER / f"{asked.study}.yaml")
    jobs = _jobs(asked.jobs, grid.scale, params)
    # here, so that no refusal above waits for torch and matplotlib
    from microlm.research.study.driver import Study
    from microlm.research.study.report import rows_of, write_report
    from microlm.research.study.sections import markdown

    if asked.markdown:
        print(markdown(rows_of(grid, ROOT)), end="")
        return
    study = Study(ROOT, grid, params)
    if asked.list:
        for task in study.tasks:
            print(f"{task.runs[0].slug}: {' '.join(task.runs[0].overrides)}")
        return
    if asked.accept:
        print(f"study: {study.accept(jobs)}")
        return
    failed = [] if asked.report else study.run(study.remaining(), jobs)
    if asked.report or len(failed) < len(study.tasks):
        print(f"study: {write_report(ROOT, grid)}")
    if failed:
        raise UserError(f"study: {len(failed)} runs failed, see above: {', '.join(failed)}; mend it and run this again")


def _jobs(asked: int | None, scale: str, params: dict[str, Any]) -> int:
    """How many runs at once. Two that share cores slow each other many times over, so that is refused."""
    cores, threads = available_cores(), params["scales"][scale]["runtime"]["threads"]
    most = max(1, cores // threads) if isinstance(threads, int) else 1
    jobs = most if asked is None else asked
    if jobs < 1:
        raise UserError(f"stages.study: --jobs {jobs}: must be at least 1")
    if jobs > most:
        raise UserError(
            f"stages.study: --jobs {jobs}: with scales.{scale}.runtime.threads={threads} they would share {cores} "
            f"cores; use at most {most}, or set threads: {max(1, cores // jobs)} in params.yaml"
        )
    return jobs


if __name__ == "__main__":
    run_stage(main)
