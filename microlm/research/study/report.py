"""results.csv -> STUDY.md: every table and sentence follows from the rows; study/notes.md is included as it stands."""

from pathlib import Path

import pandas as pd

from microlm.errors import UserError
from microlm.files import atomic_file
from microlm.report.summary_table import amount
from microlm.research.study import costs, sections
from microlm.research.study.figure import draw_arms
from microlm.research.study.grid import FIRST, FOLDER, Grid
from microlm.research.study.results import COLUMNS, marked, read_results, results_path


def report_path(grid: Grid, root: Path = Path(".")) -> Path:
    """STUDY.md of the first study; a later one's lies beside its grid."""
    return root / (FOLDER if grid.study != FIRST else "") / f"{marked('STUDY', grid)}.md"


def notes_path(grid: Grid, root: Path = Path(".")) -> Path:
    return root / FOLDER / ("notes.md" if grid.study == FIRST else f"notes-{grid.study}.md")


def write_report(root: Path, grid: Grid) -> Path:
    """Write STUDY.md and its figure from what results.csv holds of the grid. UserError if that is nothing."""
    rows = rows_of(grid, results_path(grid, root))
    if rows.empty:
        raise UserError(f"{results_path(grid)} holds no run of grid {grid.name}; make some with: {command(grid)}")
    draw_arms(rows, figure_path(grid, root))
    with atomic_file(report_path(grid, root), "w") as file:
        file.write(whole_report(rows, grid, root))
    return report_path(grid, root)


def figure_path(grid: Grid, root: Path = Path(".")) -> Path:
    return root / FOLDER / f"{marked('study', grid)}.png"


def whole_report(rows: pd.DataFrame, grid: Grid, root: Path = Path(".")) -> str:
    """`report_text` with the grid's own figure and notes."""
    figure, notes = figure_path(grid, root), notes_path(grid, root)
    shown = figure.relative_to(report_path(grid, root).parent).as_posix()
    return report_text(rows, grid, shown, notes.read_text(encoding="utf-8") if notes.exists() else "")


def rows_of(grid: Grid, path: Path) -> pd.DataFrame:
    """The rows of the grid's runs, in the grid's order, and the section of the report that each belongs to."""
    by_run = {row["run"]: row for row in read_results(path)}
    found = ((run, by_run[run.slug]) for run in grid.runs if run.slug in by_run)
    current = [row for run, row in found if row["overrides"] == " ".join(run.overrides)]
    rows = pd.DataFrame(current, columns=COLUMNS)
    return rows.assign(section=rows["group"].replace(dict(grid.sections)))


def report_text(rows: pd.DataFrame, grid: Grid, figure: str, notes: str = "") -> str:
    """STUDY.md.

    Args:
        rows: as `rows_of` returns them, at least one.
        notes: words of a person, kept apart from what is generated.
    """
    parts = [
        "# Does distillation pay for a small student? The study",
        f"Generated from `{results_path(grid)}` by `{said(grid)} --report`, which overwrites edits.",
        *_asked(rows),
        *_grid(rows, grid),
        *sections.arms(rows, figure),
        *sections.others(rows, grid.groups),
        *sections.alpha(rows),
        *sections.ladder(rows, [run.label for run in grid.runs if run.group == "ladder"]),
        *costs.cost(rows),
        *costs.selection(rows),
        *(["## Reading of these results", "Written by hand, unlike the rest.", notes.strip()] if notes.strip() else []),
        *_elsewhere(grid),
    ]
    return "\n\n".join(parts) + "\n"


def said(grid: Grid) -> str:
    """The command that runs the grid's study, whose options come after it."""
    return "python -m stages.study" + f" --study {grid.study}" * (grid.study != FIRST)


def command(grid: Grid) -> str:
    return "make study" if grid.study == FIRST else said(grid)


def _asked(rows: pd.DataFrame) -> list[str]:
    first = rows.iloc[0]
    return [
        "## What was asked",
        "Does a student that learns from a teacher's cached predictions end better than `continued`, the same model "
        "from the same start over the same windows in the same order with cross-entropy alone? The measure is the "
        "student's bits per byte of held-out text minus those of `continued` in the same run: below 0, distillation "
        f"pays. Students have {amount(first['parameters'])} parameters; the teacher reaches "
        f"{first['teacher_val_bpb']:.4f} bits per byte and {first['teacher_acc_norm']:.3f} on HellaSwag. Intervals are "
        "at 95 %. Over seeds they are Student's t, wide with three seeds (4.30 standard errors to each side); the "
        "interval within a run is over windows of text and knows nothing of seeds.",
    ]


def _grid(rows: pd.DataFrame, grid: Grid) -> list[str]:
    there = set(rows["run"])
    body = []
    for group, about in grid.groups.items():
        runs = [run for run in grid.runs if run.group == group]
        seeds = len({run.seed for run in runs})
        body.append([group, about, str(len(runs)), str(seeds), str(sum(run.slug in there for run in runs))])
    total, missing = len(grid.runs), len(grid.runs) - len(there)
    absent = f"{missing} of {total} points are not here yet: run `{command(grid)}`."
    state = absent if missing else "All of it is here."
    codes = sorted(set(rows["code"]))
    lines = [
        "## The grid",
        sections.table(["group", "what for", "points", "seeds", "done"], body),
        f"{total} points, {len(grid.unique())} runs: points that set the same are run once. Each run also "
        f"trains its own `continued`. {state}",
    ]
    if grid.left_out:
        kept = "; ".join(f"`{group}` ({about})" for group, about in grid.left_out.items())
        lines.append(f"Left out of this grid, kept for a larger machine: {kept}.")
    if len(codes) > 1:
        counts = ", ".join(f"{code} ({(rows['code'] == code).sum()})" for code in codes)
        lines.append(
            f"The rows come from {len(codes)} versions of the code: {counts}. `{command(grid)}` makes them one."
        )
    return lines


def _elsewhere(grid: Grid) -> list[str]:
    return [
        "## To run it",
        *_commands(grid),
        "Runs go through the DVC queue in a clone under `.resume/study/repository`, where `dvc exp show` and `dvc "
        "queue status` show them; their models are in the DVC cache. To free it, remove that clone and run `dvc gc "
        "--workspace --dry`, then the same without `--dry`: it drops what the workspace does not use.",
    ]


def _commands(grid: Grid) -> list[str]:
    lines = {
        command(grid): "this grid; interrupted, it goes on",
        f"{said(grid)} --list": "the runs and what each overrides",
    }
    if grid.study == FIRST:
        lines |= {
            f"{said(grid)} --grid full": "all of study/grid.yaml, at this scale",
            f"{said(grid)} --grid full --scale gpt2-124m": "the same at 124M parameters, on a GPU",
        }
    width = max(map(len, lines)) + 4
    return ["```sh\n" + "".join(f"{asked:<{width}}# {does}\n" for asked, does in lines.items()) + "```"]
