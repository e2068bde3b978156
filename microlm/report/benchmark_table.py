"""metrics/summary.json's benchmarks: each model's figure, what answering blindly gives, student minus continued."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microlm.evaluation.results.centred_mean import centred_means, once
from microlm.evaluation.results.comparison import compare
from microlm.evaluation.results.metrics import ACCURACIES
from microlm.evaluation.results.statistics import Interval, interval, smallest_detectable
from microlm.evaluation.results.store import LEFT_OUT, NOT_AVAILABLE, Result, read_results, same_protocol
from microlm.evaluation.tasks.task import task_named
from microlm.runtime.paths import SCORES

ABSENT = {
    NOT_AVAILABLE: "Data not available",
    LEFT_OUT: "Left out, since their texts are in the corpus",
}
Row = dict[str, Any]


def benchmark_rows(models: Sequence[str], draws: int, seed: int, data: Path = SCORES) -> list[Row]:
    """A row for each benchmark, in the order of its tasks.

    Holm's correction is over the benchmarks (`p_holm`). `truncated` has, of the models that are too short for some
    questions, how many these are.

    Raises:
        UserError: a result is absent or damaged, or two models were asked different questions.
    """
    columns: dict[tuple[Any, ...], dict[str, Result]] = {}
    for name in models:
        for result in read_results(data / name):
            who = result.identity
            columns.setdefault((who.task, who.protocol, who.shots, who.limit), {})[name] = result
    rows = [_row(column, results) for column, results in columns.items()]
    compared = {_key(found): found for found in compare(data / "student", data / "continued", draws, seed)["tasks"]}
    for row in rows:
        if _key(row) in compared:
            row["student_minus_continued"] = _difference(compared[_key(row)])
    return rows


def centred_mean_rows(
    models: Sequence[str],
    comparisons: Sequence[tuple[str, str]],
    order: Sequence[tuple[str, str | None, int]],
    draws: int,
    seed: int,
    data: Path = SCORES,
) -> tuple[list[str], dict[str, Row]]:
    """The tasks of the centred mean, and its entries for each model and for each comparison a_minus_b.

    Of a task that is asked several ways the first in `order` counts: (task, protocol, shots), no protocol being the
    task's default.
    """
    ranks = {(name, how or task_named(name).protocols[0], shots): rank for rank, (name, how, shots) in enumerate(order)}
    chosen = [once(sorted(read_results(data / name), key=lambda result: _rank(result, ranks))) for name in models]
    found = centred_means(chosen, draws, seed)
    values, resampled = (dict(zip(models, of, strict=True)) for of in (found.values, found.resampled))
    intervals = {name: interval(values[name], resampled[name]) for name in models}
    for a, b in comparisons:
        intervals[f"{a}_minus_{b}"] = interval(values[a] - values[b], resampled[a] - resampled[b])
    return found.tasks, {name: entries("centred_mean", one) for name, one in intervals.items()}


def _rank(result: Result, ranks: Mapping[tuple[str, str, int], int]) -> int:
    who = result.identity
    return ranks.get((who.task, who.protocol, who.shots), len(ranks))


def entries(name: str, found: Interval) -> dict[str, float]:
    """A figure's interval as the summary has it, and what difference could have been detected."""
    values = {"": found.mean, "_low": found.low, "_high": found.high}
    values["_detectable"] = smallest_detectable(found.standard_error)
    return {name + key: round(float(value), 6) for key, value in values.items()}


def _row(column: tuple[Any, ...], results: Mapping[str, Result]) -> Row:
    same_protocol(list(results.values()))
    row: Row = dict(zip(("task", "protocol", "shots", "limit"), column, strict=True))
    row["metric"] = task_named(row["task"]).primary
    for name, result in results.items():
        if result.table is None:
            return row | {"status": result.status, "reason": result.unavailable}
        figures = result.metrics
        row["items"] = figures["items"]
        row[name] = {"value": figures[row["metric"]], "se": figures[f"{row['metric']}_se"]}
        row["blind"] = blind(row["metric"], figures)
    cut = {name: result.metrics.get("truncated", 0) for name, result in results.items()}
    return row | ({"truncated": {name: n for name, n in cut.items() if n}} if any(cut.values()) else {})


def blind(metric: str, figures: Mapping[str, Any]) -> float | None:
    """What the most frequent label scores, or, where labels have no names, the accuracy of a guess."""
    if "majority" in figures:
        return figures["majority"][metric]
    return figures.get("chance") if metric in ACCURACIES else None


def _difference(found: Mapping[str, Any]) -> Row:
    entry = found["metrics"][found["primary"]]
    return {key: entry[key] for key in ("difference", "low", "high", "detectable")} | {"p_holm": found["p_holm"]}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["protocol"], row["shots"], row["limit"]


def benchmark_table(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[list[str]]:
    """Cells of the table: 100 times the metric ± one standard error. Those without data are in `remarks`."""
    table = [["benchmark", *models, "blind", "student - continued [95 %]"]]
    for row in rows:
        if "status" in row:
            continue
        cells = [f"{100 * row[name]['value']:.1f} ± {100 * (row[name]['se'] or 0):.1f}" for name in models]
        without = "" if row["blind"] is None else f"{100 * row['blind']:.1f}"
        d = row["student_minus_continued"]
        span = f"{100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        table.append([benchmark_name(row), *cells, without, span])
    return table


def benchmark_name(row: Mapping[str, Any]) -> str:
    return f"{row['task']} {row['metric']}, {row['protocol']}, {row['shots']}-shot, {row['items']:,}"


def remarks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Sentences on the questions that were longer than a model's context and on data that was not there; or none."""
    said = []
    for row in rows:
        if cut := row.get("truncated"):
            counts = ", ".join(f"{n:,} ({name})" for name, n in cut.items())
            said.append(f"Questions of {benchmark_name(row)} without their start, longer than the context: {counts}.")
    absent: dict[str, dict[str, None]] = {}
    for row in rows:
        if "status" in row:
            absent.setdefault(ABSENT[row["status"]], {})[row["task"]] = None
    said += [f"{why}: {', '.join(names)}." for why, names in absent.items()]
    return " ".join(said)
