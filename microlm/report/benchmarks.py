"""metrics/summary.json's benchmarks: each model's figure, what answering blindly gives, student minus continued."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microlm.evaluation import SCORES_DIRECTORY
from microlm.evaluation.compare import compare
from microlm.evaluation.results import Result, read_results, same_protocol
from microlm.evaluation.tasks import task_named

UNAVAILABLE = "data not available"
Row = dict[str, Any]


def benchmark_rows(models: Sequence[str], draws: int, seed: int, data: Path = SCORES_DIRECTORY) -> list[Row]:
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


def _row(column: tuple[Any, ...], results: Mapping[str, Result]) -> Row:
    same_protocol(list(results.values()))
    row: Row = dict(zip(("task", "protocol", "shots", "limit"), column, strict=True))
    row["metric"] = task_named(row["task"]).primary
    for name, result in results.items():
        if result.table is None:
            return row | {"status": UNAVAILABLE, "reason": result.unavailable}
        figures = result.metrics
        row["items"] = figures["items"]
        row[name] = {"value": figures[row["metric"]], "se": figures[f"{row['metric']}_se"]}
        row["majority"] = figures.get("majority", {}).get(row["metric"])
    cut = {name: result.metrics.get("truncated", 0) for name, result in results.items()}
    return row | ({"truncated": {name: n for name, n in cut.items() if n}} if any(cut.values()) else {})


def _difference(found: Mapping[str, Any]) -> Row:
    entry = found["metrics"][found["primary"]]
    return {key: entry[key] for key in ("difference", "low", "high", "detectable")} | {"p_holm": found["p_holm"]}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["protocol"], row["shots"], row["limit"]


def benchmark_table(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[list[str]]:
    """Cells of the table: 100 times the metric ± one standard error. Those without data are in `remarks`."""
    table = [["benchmark", *models, "majority", "student - continued [95 %]"]]
    for row in rows:
        if "status" in row:
            continue
        cells = [f"{100 * row[name]['value']:.1f} ± {100 * (row[name]['se'] or 0):.1f}" for name in models]
        blind = "" if row["majority"] is None else f"{100 * row['majority']:.1f}"
        d = row["student_minus_continued"]
        span = f"{100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        table.append([benchmark_name(row), *cells, blind, span])
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
    names = list(dict.fromkeys(row["task"] for row in rows if "status" in row))
    if names:
        said.append(f"{UNAVAILABLE[0].upper() + UNAVAILABLE[1:]}: {', '.join(names)}.")
    return " ".join(said)
