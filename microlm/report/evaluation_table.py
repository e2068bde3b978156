"""Results of `microlm evaluate` and `microlm compare` for people: tables for a terminal and for Markdown."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from microlm.errors import UserError
from microlm.evaluation.results.metrics import ACCURACIES
from microlm.evaluation.results.statistics import CONFIDENCE
from microlm.evaluation.results.store import Result, same_protocol
from microlm.evaluation.tasks.task import TASKS, task_named
from microlm.report.published import Figure, worth_showing
from microlm.report.text_table import WIDTH, Grid, blocks, markdown

SECOND_HAND = "*"
BLIND = {"majority": "(most frequent label)", "always_positive": "(always yes)"}
CHANCE = "(guessing)"  # where the labels have no names, so that none can be the most frequent
PER_BYTE = "gold_bpb"  # the one measure that is not a fraction


@dataclass(frozen=True)
class Column:
    """One metric of one task, protocol, number of shots and subset; `published` columns hold others' figures."""

    place: int  # of the task
    task: str
    published: bool
    protocol: str
    shots: int | None
    limit: int | None
    metric: str

    @property
    def heading(self) -> str:
        parts = [self.task, self.metric, "published" if self.published else "", self.protocol]
        parts.append("" if self.shots is None else f"{self.shots}-shot")
        return "\n".join(filter(None, (*parts, "" if self.limit is None else f"{self.limit:,} questions")))


def results_text(
    results: Sequence[Result], figures: Sequence[Figure], form: str = "text", every_metric: bool = False
) -> str:
    """`evaluation_text`, or with `form` "markdown" `evaluation_markdown`.

    Of the published `figures` those of the same models, or of the same task, protocol and shots, are shown.
    """
    models = {result.identity.model for result in results}
    measured = {(r.identity.task, r.identity.protocol, r.identity.shots) for r in results if r.table is not None}
    render = {"text": evaluation_text, "markdown": evaluation_markdown}[form]
    return render(results, worth_showing(figures, models, measured), every_metric)


def evaluation_text(results: Sequence[Result], figures: Sequence[Figure] = (), every_metric: bool = False) -> str:
    """Rows are models, columns tasks; under them what blind answers score, then the notes, in lines of 96 columns.

    A cell is 100 times the metric ± one standard error. Published figures stand in columns of their own.

    Args:
        results: of any models and tasks, data that was not available included.
        figures: others' figures to show; those on tasks that no result is of are left out.
        every_metric: all metrics of a task, not the primary one alone.

    Raises:
        UserError: two results of one column are of different data, wording or questions, or of one model.
    """
    grid = _evaluation_grid(results, figures, every_metric)
    notes = (textwrap.fill(note, WIDTH, break_on_hyphens=False) for note in _notes(results, grid))
    return "\n\n".join((*blocks(grid), "\n".join(notes))) + "\n"


def evaluation_markdown(results: Sequence[Result], figures: Sequence[Figure] = (), every_metric: bool = False) -> str:
    """The table and notes of `evaluation_text` as Markdown."""
    grid = _evaluation_grid(results, figures, every_metric)
    return "\n\n".join((markdown(grid), *_notes(results, grid))) + "\n"


def _evaluation_grid(results: Sequence[Result], figures: Sequence[Figure], every_metric: bool) -> Grid:
    cells: dict[Column, dict[str, str]] = {}
    sharing: dict[Column, list[Result]] = {}
    for result in results:
        for column in _columns(result, every_metric):
            sharing.setdefault(column, []).append(result)
            if result.identity.model in cells.get(column, {}):
                raise UserError(f"{result.identity.model} has two results of {result.identity.task}; show them apart")
            cells.setdefault(column, {})[result.identity.model] = _cell(result, column.metric)
    for column, alike in sharing.items():
        same_protocol(alike)
        cells[column] |= _blind_cells(alike, column.metric)
    measured = {(column.task, column.metric) for column in cells}
    for figure in figures:
        if (figure.task, figure.metric) in measured:
            _add_published(cells, figure)
    columns = sorted(cells, key=_order)
    models = dict.fromkeys([r.identity.model for r in results] + [f.model for f in figures])
    rows = [name for name in (*models, *BLIND.values(), CHANCE) if any(name in cells[column] for column in columns)]
    head = ["model", *(column.heading for column in columns)]
    return [head, *([name, *(cells[column].get(name, "") for column in columns)] for name in rows)]


def _order(column: Column) -> tuple[object, ...]:
    """By task, ours before others', a task's metrics in its own order, the primary one first."""
    metric = TASKS[column.task].metrics.index(column.metric)
    return column.place, column.published, column.protocol, column.shots or 0, column.limit or 0, metric


def _columns(result: Result, every_metric: bool) -> list[Column]:
    identity, task = result.identity, task_named(result.identity.task)
    key = (list(TASKS).index(task.name), task.name, False, identity.protocol, identity.shots, identity.limit)
    return [Column(*key, metric) for metric in (task.metrics if every_metric else (task.primary,))]


def _cell(result: Result, metric: str) -> str:
    if result.table is None:
        return result.status
    error = result.metrics[f"{metric}_se"]
    return f"{100 * result.metrics[metric]:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def _blind_cells(results: Sequence[Result], metric: str) -> dict[str, str]:
    for result in results:  # of the same labels, so that the first that has any stands for all
        blind = {row: result.metrics.get(key, {}).get(metric) for key, row in BLIND.items()}
        if metric in ACCURACIES and "majority" not in result.metrics:
            blind[CHANCE] = result.metrics.get("chance")
        if result.table is not None:
            return {row: f"{100 * value:.2f}" for row, value in blind.items() if value is not None}
    return {}


def _add_published(cells: dict[Column, dict[str, str]], figure: Figure) -> None:
    key = (list(TASKS).index(figure.task), figure.task, True, figure.protocol, figure.shots, None, figure.metric)
    column = cells.setdefault(Column(*key), {})
    shown = f"{100 * figure.value:.2f}" + (SECOND_HAND if figure.checked == "second hand" else "")
    column[figure.model] = " / ".join(filter(None, (column.get(figure.model), shown)))


def _notes(results: Sequence[Result], grid: Grid) -> list[str]:
    notes = ["Cells: 100 x the metric ± one standard error over questions, clustered by their source."]
    if any("\npublished\n" in heading for heading in grid[0]):
        notes.append(
            f"Published figures are others', by the protocol that heads them; their sources are in published.yaml. "
            f"{SECOND_HAND} read in a copy, not at the source."
        )
    tasks = {result.identity.task: task_named(result.identity.task) for result in results}
    notes += [f"{name}: {task.note}." for name, task in tasks.items() if task.note]
    notes += dict.fromkeys(filter(None, (*map(_on_incomplete_data, results), *map(_on_truncation, results))))
    absent = {result.identity.task: result for result in results if result.table is None}
    return notes + [_on_absence(name, result) for name, result in absent.items()]


def _on_absence(name: str, result: Result) -> str:
    reason = result.unavailable.removeprefix(f"{name}: ").removeprefix(f"{result.status}: ")
    return f"{name}: {result.status}: {reason}"


def _on_incomplete_data(result: Result) -> str:
    rows, published = (result.data.get(key, 0) for key in ("rows", "published"))
    if rows >= published:
        return ""
    task = task_named(result.identity.task)
    return (
        f"{task.name}: {result.data.get('file')} has {rows:,} questions with a label, the published {task.split} split "
        f"{published:,}."
    )


def _on_truncation(result: Result) -> str:
    cut = result.metrics.get("truncated", 0)
    if not cut:
        return ""
    return (
        f"{_column_name(vars(result.identity))}: of {cut:,} of {result.metrics['items']:,} questions "
        f"{result.identity.model} did not read the start, since they are longer than its context."
    )


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """What `compare` found: a row for each metric of each task, then what may be said, in lines of 96 columns."""
    tables = blocks(_comparison_grid(comparison), keys=2)
    said = (
        textwrap.fill(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for sentence in comparison_sentences(comparison)
    )
    return "\n\n".join((*tables, "\n".join(said))) + "\n"


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The table and sentences of `comparison_text` as Markdown."""
    said = "\n".join(f"- {sentence}" for sentence in comparison_sentences(comparison))
    return markdown(_comparison_grid(comparison)) + "\n\n" + said + "\n"


def _comparison_grid(comparison: Mapping[str, Any]) -> Grid:
    interval = f"difference\n[{100 * CONFIDENCE:.0f} %, paired]"
    grid = [["task", "metric", "A", "B", interval, "p", "p\n(Holm)", "McNemar\np", "differ", "could\ndetect"]]
    for row in comparison["tasks"]:
        for metric, entry in row["metrics"].items():
            primary, scale, digits = metric == row["primary"], *((1, 4) if metric == PER_BYTE else (100, 2))
            a, b, low, high = (scale * entry[key] for key in ("a", "b", "low", "high"))
            difference = f"{scale * entry['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells = [_column_name(row) if primary else "", metric, f"{a:.{digits}f}", f"{b:.{digits}f}", difference]
            cells += [_p(entry["p"]), _p(row["p_holm"]) if primary else ""]
            cells.append(_p(row["mcnemar_p"]) if primary and "mcnemar_p" in row else "")
            cells.append(f"{100 * row['discordance']:.1f} %" if primary and "discordance" in row else "")
            detectable = entry["detectable"]
            grid.append([*cells, "" if detectable is None else f"{scale * detectable:.{digits}f}"])
    if "centred_mean" in comparison:
        grid.append(_centred_row(comparison["centred_mean"]))
    return grid


def _centred_row(entry: Mapping[str, Any]) -> list[str]:
    a, b, low, high = (f"{100 * entry[key]:+.2f}" for key in ("a", "b", "low", "high"))
    difference = f"{100 * entry['difference']:+.2f} [{low}, {high}]"
    detectable = "" if entry["detectable"] is None else f"{100 * entry['detectable']:.2f}"
    name = f"centred mean of {len(entry['tasks'])} tasks"
    return [name, "acc", a, b, difference, _p(entry["p"]), "", "", "", detectable]


def comparison_sentences(comparison: Mapping[str, Any]) -> list[str]:
    """What the comparison allows one to say: of each task, of the seeds, and of what was left out."""
    a, b = (" + ".join(dict.fromkeys(comparison[side])) for side in "ab")
    said = [f"A is {a}, B is {b}; {comparison['draws']:,} draws of whole sources; p after Holm is of primary metrics."]
    said += [_on_task(row) for row in comparison["tasks"]]
    if "centred_mean" in comparison:
        tasks = ", ".join(comparison["centred_mean"]["tasks"])
        said.append(f"Centred mean: (accuracy - chance) / (1 - chance), tasks alike, uncorrected by Holm: {tasks}.")
    if min(len(comparison[side]) for side in "ab") == 1:
        said.append("Without several seeds on both sides this speaks of these models, not of the recipes behind them.")
    return said + [f"Left out: {_column_name(row)}: {row['reason']}." for row in comparison["left_out"]]


def _on_task(row: Mapping[str, Any]) -> str:
    metric, entry = row["primary"], row["metrics"][row["primary"]]
    points = f"{100 * entry['difference']:+.1f} points, {_p(row['p_holm'], 'p ')} after Holm"
    found = f"no difference in {metric} is shown"
    if row["p_holm"] < 1 - CONFIDENCE:
        found = f"{'A' if entry['difference'] > 0 else 'B'} is ahead in {metric}"
    text = f"{_column_name(row)}, {row['items']:,} questions: {found} ({points})"
    if entry["detectable"] is None:
        return f"{text}; no question told the two apart."
    text += f"; this comparison could have detected {100 * entry['detectable']:.1f} points."
    if "seeds" in entry:
        a, b = (entry["seeds"][side] for side in "ab")
        text += f" Seeds spread by {100 * a['seed_sd']:.1f} (A, {a['seeds']}) and {100 * b['seed_sd']:.1f} points (B, "
        text += f"{b['seeds']}); questions alone move the difference by {100 * entry['se']:.1f}."
    return text


def _column_name(row: Mapping[str, Any]) -> str:
    subset = "" if row["limit"] is None else f", {row['limit']:,} questions"
    return f"{row['task']} ({row['protocol']}, {row['shots']}-shot{subset})"


def _p(p: float, prefix: str = "") -> str:
    sign = "= " if prefix else ""
    return f"{prefix}< 0.001" if p < 0.001 else f"{prefix}{sign}{p:.3f}"
