"""Results of `microlm evaluate` and `microlm compare` for people, beside what others published.

Their figures, each with its protocol and source, are in published.yaml beside this file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from microlm.errors import UserError
from microlm.evaluation.results.metrics import ACCURACIES
from microlm.evaluation.results.statistics import CONFIDENCE
from microlm.evaluation.results.store import Result, same_protocol
from microlm.evaluation.tasks.task import TASKS, Benchmark, task_named
from microlm.files import read_yaml
from microlm.report.text_table import Grid, blocks, markdown, wrapped
from microlm.schema import LARGEST_COUNT, parse, within

PUBLISHED = Path(__file__).with_name("published.yaml")
SECOND_HAND = "*"
BLIND = {"majority": "(most frequent label)", "always_positive": "(always yes)"}
CHANCE = "(guessing)"  # where the labels have no names, so that none can be the most frequent
PER_BYTE = "gold_bpb"  # the one measure that is not a fraction


@dataclass(frozen=True)
class Figure:
    """One published figure, a fraction; `error` is its standard error, `shots` is None where the source is silent."""

    model: str
    task: str
    metric: str
    value: float = within(-1, 1)
    shots: int | None = within(0, LARGEST_COUNT)
    protocol: str
    source: str
    checked: Literal["read at the source", "second hand"]
    error: float | None = within(0, 1, default=None)


@dataclass(frozen=True)
class _File:
    figures: list[Figure]


def published_figures(path: Path = PUBLISHED) -> list[Figure]:
    """All figures of the file. UserError, a line for each thing that is wrong, if one is not as `Figure` says."""
    raw = read_yaml(path, "install microlm again", "figures: [...]")
    found: list[str] = []
    file = parse(_File, raw, "", found)
    if found or file is None:
        raise UserError("\n".join(f"{path}: {problem}" for problem in found))
    return file.figures


def worth_showing(figures: Sequence[Figure], results: Sequence[Result]) -> list[Figure]:
    """Those that say something beside our own results: of the same model, or of any model under the same protocol.

    A figure of a model that was evaluated at a revision (id@revision) gets that model's name: they share a row.
    """
    measured = {result.identity.column[:3] for result in results if result.table is not None}
    tasks = {task for task, _, _ in measured}
    names = {result.identity.model.partition("@")[0]: result.identity.model for result in results}
    return [
        replace(figure, model=names.get(figure.model, figure.model))
        for figure in figures
        if (figure.task, figure.protocol, figure.shots) in measured or (figure.task in tasks and figure.model in names)
    ]


class Column(NamedTuple):
    """One metric of one benchmark; `published` columns hold others' figures, whose shots may be None."""

    of: Benchmark
    metric: str
    published: bool = False

    @property
    def heading(self) -> str:
        task, protocol, *sizes = self.of
        words = (f"{size:,}{what}" for size, what in zip(sizes, ("-shot", " questions")) if size is not None)
        return "\n".join((task, self.metric, *(["published"] if self.published else []), protocol, *words))

    @property
    def place(self) -> tuple[object, ...]:
        """By task, ours before others', a task's metrics in its own order, the primary one first."""
        task, protocol, shots, limit = self.of
        metric = TASKS[task].metrics.index(self.metric)
        return list(TASKS).index(task), self.published, protocol, shots or 0, limit or 0, metric


def evaluation_text(
    results: Sequence[Result], figures: Sequence[Figure] = (), form: str = "text", every_metric: bool = False
) -> str:
    """Rows are models, columns tasks; under them what blind answers score, then the notes.

    A cell is 100 times the metric ± one standard error. Published figures stand in columns of their own.

    Args:
        results: of any models and tasks, data that was not available included.
        figures: others' figures to show; those on tasks that no result is of are left out.
        form: text, in lines of 96 columns, or markdown.
        every_metric: all metrics of a task, not the primary one alone.

    Raises:
        UserError: two results of one column are of different data, wording or questions, or of one model.
    """
    grid = _evaluation_grid(results, figures, every_metric)
    notes = _notes(results, grid)
    if form == "markdown":
        return "\n\n".join((markdown(grid), *notes)) + "\n"
    return "\n\n".join((*blocks(grid), "\n".join(map(wrapped, notes)))) + "\n"


def _evaluation_grid(results: Sequence[Result], figures: Sequence[Figure], every_metric: bool) -> Grid:
    cells: dict[Column, dict[str, str]] = {}
    sharing: dict[Column, list[Result]] = {}
    for result in results:
        who = result.identity
        for metric in TASKS[who.task].metrics[: None if every_metric else 1]:
            column = Column(who.column, metric)
            sharing.setdefault(column, []).append(result)
            if who.model in cells.setdefault(column, {}):
                raise UserError(f"{who.model} has two results of {who.task}; show them apart")
            cells[column][who.model] = _cell(result, metric)
    for column, alike in sharing.items():
        same_protocol(alike)
        cells[column] |= _blind_cells(alike, column.metric)
    for figure in figures:
        if any((column.of.task, column.metric) == (figure.task, figure.metric) for column in sharing):
            column = Column(Benchmark(figure.task, figure.protocol, figure.shots, None), figure.metric, True)
            shown = f"{100 * figure.value:.2f}" + (SECOND_HAND if figure.checked == "second hand" else "")
            others = cells.setdefault(column, {})
            others[figure.model] = " / ".join(filter(None, (others.get(figure.model), shown)))
    columns = sorted(cells, key=lambda column: column.place)
    models = dict.fromkeys([r.identity.model for r in results] + [f.model for f in figures])
    rows = [name for name in (*models, *BLIND.values(), CHANCE) if any(name in cells[column] for column in columns)]
    head = ["model", *(column.heading for column in columns)]
    return [head, *([name, *(cells[column].get(name, "") for column in columns)] for name in rows)]


def _cell(result: Result, metric: str) -> str:
    if result.table is None:
        return result.status
    error = result.metrics[f"{metric}_se"]
    return f"{100 * result.metrics[metric]:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def _blind_cells(results: Sequence[Result], metric: str) -> dict[str, str]:
    # of the same labels, so that the first that has any stands for all
    figures = next((result.metrics for result in results if result.table is not None), {})
    blind = {row: figures.get(key, {}).get(metric) for key, row in BLIND.items()}
    if metric in ACCURACIES and "majority" not in figures:
        blind[CHANCE] = figures.get("chance")
    return {row: f"{100 * value:.2f}" for row, value in blind.items() if value is not None}


def _notes(results: Sequence[Result], grid: Grid) -> list[str]:
    notes = ["Cells: 100 x the metric ± one standard error over questions, clustered by their source."]
    if any("\npublished\n" in heading for heading in grid[0]):
        notes.append(
            f"Published figures are others', by the protocol that heads them; their sources are in published.yaml. "
            f"{SECOND_HAND} read in a copy, not at the source."
        )
    by_task = {result.identity.task: task_named(result.identity.task) for result in results}
    notes += [f"{name}: {task.note}." for name, task in by_task.items() if task.note]
    for result in results:
        task, data = by_task[result.identity.task], {"rows": 0, "published": 0} | result.data
        if data["rows"] < data["published"]:
            there = f"{data.get('file')} has {data['rows']:,} questions with a label"
            notes.append(f"{task.name}: {there}, the published {task.split} split {data['published']:,}.")
    for result in results:
        if cut := result.metrics.get("truncated", 0):
            notes.append(
                f"{_column_name(vars(result.identity))}: of {cut:,} of {result.metrics['items']:,} questions "
                f"{result.identity.model} did not read the start, since they are longer than its context."
            )
    for name, result in {result.identity.task: result for result in results if result.table is None}.items():
        reason = result.unavailable.removeprefix(f"{name}: ").removeprefix(f"{result.status}: ")
        notes.append(f"{name}: {result.status}: {reason}")
    return list(dict.fromkeys(notes))


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """What `compare` found: a row for each metric of each task, then what may be said, in lines of 96 columns."""
    said = (wrapped(sentence, bullet="- ") for sentence in _comparison_sentences(comparison))
    return "\n\n".join((*blocks(_comparison_grid(comparison), keys=2), "\n".join(said))) + "\n"


def _comparison_grid(comparison: Mapping[str, Any]) -> Grid:
    interval = f"difference\n[{100 * CONFIDENCE:.0f} %, paired]"
    grid = [["task", "metric", "A", "B", interval, "p", "p\n(Holm)", "McNemar\np", "differ", "could\ndetect"]]
    for row in comparison["tasks"]:
        for metric, entry in row["metrics"].items():
            *found, detectable = _entry_cells(entry, *((1, 4) if metric == PER_BYTE else (100, 2)))
            primary, exact = metric == row["primary"], metric == row["primary"] and "mcnemar_p" in row
            judged = [_p(row["p_holm"]) if primary else "", _p(row["mcnemar_p"]) if exact else ""]
            judged.append(f"{100 * row['discordance']:.1f} %" if exact else "")
            grid.append([_column_name(row) if primary else "", metric, *found, *judged, detectable])
    if entry := comparison.get("centred_mean"):
        *found, detectable = _entry_cells(entry, sign="+")
        grid.append([f"centred mean of {len(entry['tasks'])} tasks", "acc", *found, "", "", "", detectable])
    return grid


def _entry_cells(entry: Mapping[str, Any], scale: int = 100, digits: int = 2, sign: str = "") -> list[str]:
    """A, B, their difference with its interval, p, what could have been detected."""
    shown = {key: f"{scale * entry[key]:+.{digits}f}" for key in ("difference", "low", "high")}
    detectable = "" if entry["detectable"] is None else f"{scale * entry['detectable']:.{digits}f}"
    difference = f"{shown['difference']} [{shown['low']}, {shown['high']}]"
    a, b = (f"{scale * entry[side]:{sign}.{digits}f}" for side in "ab")
    return [a, b, difference, _p(entry["p"]), detectable]


def _comparison_sentences(comparison: Mapping[str, Any]) -> list[str]:
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
    p = f"p {_p(row['p_holm'])}" if row["p_holm"] < 0.001 else f"p = {_p(row['p_holm'])}"
    points = f"{100 * entry['difference']:+.1f} points, {p} after Holm"
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


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
