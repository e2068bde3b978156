"""results.csv -> STUDY.md: every table and sentence follows from the rows; study/notes.md is included as it stands."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from microlm.errors import UserError
from microlm.files import atomic_file
from microlm.report.figure_style import FAINT, INK, caption, save
from microlm.report.summary_table import amount
from microlm.research.study import sections
from microlm.research.study.grid import FIRST, Grid
from microlm.research.study.results import AGAINST_CONTINUED, COLUMNS, arm_results, read_results

COLOURS = {"control": "#2f6db3", "scratch": "#d1571e"}
MARKERS = {"control": "o", "scratch": "^"}  # tell them apart in grey print


def write_report(root: Path, grid: Grid) -> Path:
    """Write STUDY.md and its figure from what results.csv holds of the grid. UserError if that is nothing."""
    rows = rows_of(grid, root)
    if rows.empty:
        raise UserError(f"{grid.results} holds no run of grid {grid.name}; make some with: {command(grid)}")
    save(arms_figure(sections.section(rows, "arms")), root / grid.figure)
    with atomic_file(root / grid.report, "w") as file:
        file.write(report_text(rows, grid, notes_of(grid, root)))
    return root / grid.report


def notes_of(grid: Grid, root: Path) -> str:
    """Words of a person, kept apart from what is generated; none where nobody wrote any."""
    notes = root / grid.notes
    return notes.read_text(encoding="utf-8") if notes.exists() else ""


def rows_of(grid: Grid, root: Path) -> pd.DataFrame:
    """The rows of the grid's runs, in the grid's order, and the section of the report that each belongs to."""
    by_point = {(row["run"], row["overrides"]): row for row in read_results(root / grid.results)}
    points = ((run.slug, " ".join(run.overrides)) for run in grid.runs)
    rows = pd.DataFrame([by_point[point] for point in points if point in by_point], columns=COLUMNS)
    return rows.assign(section=rows["group"].replace(dict(grid.sections)))


def report_text(rows: pd.DataFrame, grid: Grid, notes: str = "") -> str:
    """STUDY.md.

    Args:
        rows: as `rows_of` returns them, at least one.
        notes: as `notes_of` does.
    """
    parts = [
        "# Does distillation pay for a small student? The study",
        f"Generated from `{grid.results}` by `{said(grid)} --report`, which overwrites edits.",
        *_asked(rows.iloc[0]),
        *_grid(rows, grid),
        *sections.arms(rows, grid.figure.relative_to(grid.report.parent).as_posix()),
        *sections.others(rows, grid.groups),
        *sections.alpha(rows),
        *sections.ladder(rows),
        *sections.cost(rows),
        *sections.selection(rows),
        *(["## Reading of these results", "Written by hand, unlike the rest.", notes.strip()] if notes.strip() else []),
        "## To run it",
        _commands(grid),
        "Runs go through the DVC queue in a clone under `.resume/study/repository`, where `dvc exp show` and `dvc "
        "queue status` show them; their models are in the DVC cache. To free it, remove that clone and run `dvc gc "
        "--workspace --dry`, then the same without `--dry`: it drops what the workspace does not use.",
    ]
    return "\n\n".join(parts) + "\n"


def said(grid: Grid) -> str:
    """The command that runs the grid's study, whose options come after it."""
    return "python -m stages.study" + f" --study {grid.study}" * (grid.study != FIRST)


def command(grid: Grid) -> str:
    return "make study" if grid.study == FIRST else said(grid)


def _asked(first: pd.Series) -> list[str]:
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
    there, codes = set(rows["run"]), rows["code"].value_counts().sort_index()
    body = []
    for group, about in grid.groups.items():
        runs = [run for run in grid.runs if run.group == group]
        seeds, done = len({run.seed for run in runs}), sum(run.slug in there for run in runs)
        body.append({"group": group, "what for": about, "points": len(runs), "seeds": seeds, "done": done})
    total, missing = len(grid.runs), len(grid.runs) - len(there)
    absent = f"{missing} of {total} points are not here yet: run `{command(grid)}`."
    lines = [
        "## The grid",
        sections.table(body),
        f"{total} points, {len(grid.unique())} runs: points that set the same are run once. Each run also "
        f"trains its own `continued`. {absent if missing else 'All of it is here.'}",
    ]
    if grid.left_out:
        kept = "; ".join(f"`{group}` ({about})" for group, about in grid.left_out.items())
        lines.append(f"Left out of this grid, kept for a larger machine: {kept}.")
    if len(codes) > 1:
        counts = ", ".join(f"{code} ({count})" for code, count in codes.items())
        lines.append(
            f"The rows come from {len(codes)} versions of the code: {counts}. `{command(grid)}` makes them one."
        )
    return lines


def _commands(grid: Grid) -> str:
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
    return "```sh\n" + "".join(f"{asked:<{width}}# {does}\n" for asked, does in lines.items()) + "```"


def arms_figure(rows: pd.DataFrame) -> Figure:
    """The forest plot: every arm's difference to its matched control, one axes for each start.

    A line for each arm: mean over seeds, its t interval, each seed as a dot.
    """
    starts = list(rows["init"].unique()) or ["control"]
    results = arm_results(rows)
    arms = list(dict.fromkeys(result.arm for result in results))
    figure = Figure(figsize=(4.2 * len(starts) + 1, 1.6 + 0.42 * len(arms)), layout="constrained", facecolor="white")
    for axes, init in zip(np.atleast_1d(figure.subplots(1, len(starts), sharey=True)), starts):
        for result in (result for result in results if result.init == init):
            height, colour = len(arms) - arms.index(result.arm), COLOURS.get(init, INK)
            found, each = result.difference, result.rows[AGAINST_CONTINUED].tolist()
            axes.plot([found.low, found.high], [height, height], color=colour, linewidth=1.6)
            axes.plot(each, [height] * len(each), ".", color=FAINT, markersize=5)
            axes.plot(found.mean, height, MARKERS.get(init, "o"), color=colour, markersize=7, markeredgecolor="white")
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_yticks([len(arms) - place for place in range(len(arms))], arms)
        axes.set_ylim(0.4, len(arms) + 0.6)
        axes.set_title(f"from {init}", loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.set_xlabel("student - continued, bits per byte", color=INK)
        axes.grid(axis="x", color="#e4e4e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(colors=INK, length=3)
    caption(figure, "left of 0: distillation pays; line: 95 % t interval over seeds; dots: seeds")
    return figure
