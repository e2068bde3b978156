"""metrics/summary.json: every model's scores, and the paired differences that answer the question."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from microlm.errors import UserError
from microlm.evaluation import SCORED_MODELS
from microlm.evaluation.results.metrics import ACCURACIES, centred_means, compare, once
from microlm.evaluation.results.statistics import (
    Interval,
    interval,
    mcnemar_exact,
    mean,
    paired_bootstrap,
    ratio,
    smallest_detectable,
)
from microlm.evaluation.results.store import Result, read_results, same_protocol
from microlm.evaluation.tasks.task import Benchmark, task_named
from microlm.files import check_sums, read_json, read_made
from microlm.runtime.paths import METRICS, SCORES, TRAINED_MODELS

COMPARISONS = (("student", "continued"), ("student", "control"))
# bits per byte of held-out text: of the corpus's kind, and of another; in the metrics, and in windows.parquet
YARDSTICKS = {"val_bpb": ("validation", "val"), "ood_bpb": ("outside", "outside")}
HEADLINE = ("hellaswag", "completion", "0-shot")
WINDOWS_PER_BLOCK = 4  # a document runs across the borders of windows, so neighbours are resampled together
FEWEST_BLOCKS = 20  # shorter validation splits have smaller blocks rather than fewer
VERDICTS = {
    -1: "distillation better than continuation",
    0: "no difference shown",
    1: "continuation better than distillation",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """What stage `evaluate` wrote about one model.

    Its metrics, a row for each question of zero-shot HellaSwag, and a row for each window of held-out text.
    """

    metrics: Mapping[str, Any]
    items: pd.DataFrame
    windows: pd.DataFrame

    def windows_of(self, split: str) -> pd.DataFrame:
        return self.windows[self.windows["split"] == split].reset_index(drop=True)


def read_scores() -> dict[str, Scores]:
    """The scores of each model. UserError if one is absent, damaged, or about other questions or windows."""
    scores = {}
    for name in SCORED_MODELS:
        folder, stage = SCORES / name, f"evaluate@{name}"
        if folder.is_dir():
            check_sums(folder, os.listdir(folder), f"make it again with: dvc repro -f -s {stage}")
        items, windows = (
            read_made(path, stage, pd.read_parquet, pa.ArrowException, OSError)
            for path in (_headline(folder, stage), folder / "windows.parquet")
        )
        scores[name] = Scores(read_json(METRICS / "evaluation" / f"{name}.json", stage), items, windows)
    first, *others = SCORED_MODELS
    alike = {"items": ["item", "label", *(f"bytes_{k}" for k in range(4))], "windows": ["split", "window", "bytes"]}
    for other, (table, keys) in product(others, alike.items()):
        a, b = (getattr(scores[name], table) for name in (first, other))
        if not set(keys) <= set(a) & set(b) or not a[keys].equals(b[keys]):
            raise UserError(
                f"{SCORES / other} and {SCORES / first} are not about the same {table} and cannot be compared; "
                f"score both again with: dvc repro -f -s evaluate@{first} evaluate@{other}"
            )
    return scores


def _headline(folder: Path, stage: str) -> Path:
    """The table of the benchmark that the report speaks of: zero-shot HellaSwag by the completion protocol."""
    found = sorted(folder.glob(f"{HEADLINE[0]}.{HEADLINE[1]}.{HEADLINE[2].replace('-', '')}*.parquet"))
    if len(found) != 1:
        raise UserError(
            f"{folder}: {len(found)} results of zero-shot {HEADLINE[0]} ({HEADLINE[1]}); name it once under "
            f"evaluation.benchmarks in params.yaml, then: dvc repro -f -s {stage}"
        )
    return found[0]


def summarize(distillation: Mapping[str, Any], draws: int, seed: int) -> dict[str, Any]:
    """metrics/summary.json as a dict, but for the benchmarks and their mean. UserError as `read_scores` has it.

    Args:
        distillation: what the student was trained with, e.g. alpha, objective, temperature; shown as it is.
    """
    scores = read_scores()
    student = scores["student"]
    summary: dict[str, Any] = dict(distillation)
    summary |= {"questions": len(student.items), "windows": len(student.windows_of("val"))}
    if "outside" in student.metrics:
        summary["outside_windows"] = len(student.windows_of("outside"))
    for name, score in scores.items():
        summary[name] = _model_row(score.metrics)
    for name, stage in TRAINED_MODELS.items():
        training = read_json(METRICS / f"{name}.json", stage)
        summary[name] |= {key: training[key] for key in ("tokens_before", "tokens")}
    summary["teacher"] |= _teacher_cost(summary, read_json(METRICS / "teacher.json", "teacher"))
    for a, b in COMPARISONS:
        summary[f"{a}_minus_{b}"] = _difference(scores[a], scores[b], draws, seed)
    difference = summary["student_minus_continued"]
    summary["verdict"] = {key: VERDICTS[side_of_zero(difference, key)] for key in YARDSTICKS if key in difference}
    return summary


def _model_row(metrics: Mapping[str, Any]) -> Row:
    task, protocol, shots = HEADLINE
    hellaswag = metrics["tasks"][task][protocol][shots]
    scored = {key: round(hellaswag[key], 6) for key in ("acc_norm", "acc_norm_se", "acc", "acc_se", "gold_bpb")}
    bits = {key: round(metrics[text]["bpb"], 6) for key, (text, _) in YARDSTICKS.items() if text in metrics}
    return {"parameters": metrics["parameters"], **bits, **scored}


def _teacher_cost(summary: Mapping[str, Any], teacher: Mapping[str, Any]) -> Row:
    """Labelling against distilling, at 2 FLOPs a parameter and token forward, 4 more backward (Kaplan et al. 2020).

    A live teacher labels every token of the student's steps, one with a cache each window once.
    """
    student = summary["student"]
    labelled = student["tokens"] if teacher["source"] == "live" else teacher["tokens"]
    cost = 2 * summary["teacher"]["parameters"] * labelled / (6 * student["parameters"] * student["tokens"])
    return {"source": teacher["source"], "tokens_labelled": labelled, "labelling_to_distilling_flops": round(cost, 6)}


def _difference(a: Scores, b: Scores, draws: int, seed: int) -> dict[str, float]:
    """a minus b on bits per byte of held-out text and of true endings, and on acc_norm, each with its interval."""
    found: dict[str, float] = {}
    for key, (text, split) in YARDSTICKS.items():
        if text in a.metrics:
            found |= entries(key, _bits_per_byte(a.windows_of(split), b.windows_of(split), draws, seed))
    gold = [ratio(score.items["gold_nats"] / np.log(2), score.items["gold_bytes"]) for score in (a, b)]
    right = [score.items["correct_token"] for score in (a, b)]
    source = a.items["cluster"]
    found |= entries("gold_bpb", paired_bootstrap(*gold, source, draws, seed))
    found |= entries("acc_norm", paired_bootstrap(*map(mean, right), source, draws, seed))
    return found | {"acc_norm_mcnemar_p": round(mcnemar_exact(*right), 6)}


def _bits_per_byte(a: pd.DataFrame, b: pd.DataFrame, draws: int, seed: int) -> Interval:
    windows = len(a)
    if windows < 2:
        raise UserError(
            "data/shards: one validation window gives no interval; raise corpus.validation_fraction in params.yaml"
        )
    block = np.arange(windows) // min(WINDOWS_PER_BLOCK, max(1, windows // FEWEST_BLOCKS))
    bits = [ratio(table["nats"] / np.log(2), table["bytes"]) for table in (a, b)]
    return paired_bootstrap(*bits, block, draws, seed)


def side_of_zero(difference: Mapping[str, Any], measure: str) -> int:
    """-1 where the interval lies below 0, 1 where above it, 0 where it covers it."""
    return (difference[f"{measure}_low"] > 0) - (difference[f"{measure}_high"] < 0)


def entries(name: str, found: Interval) -> dict[str, float]:
    """A figure's interval as the summary has it, and what difference could have been detected."""
    values = {"": found.mean, "_low": found.low, "_high": found.high}
    values["_detectable"] = smallest_detectable(found.standard_error)
    return {name + key: round(float(value), 6) for key, value in values.items()}


def benchmark_rows(models: Sequence[str], draws: int, seed: int, data: Path = SCORES) -> list[Row]:
    """A row for each benchmark, in the order of its tasks: figures, what answering blindly gives, the difference.

    Holm's correction is over the benchmarks (`p_holm`). `truncated` has, of the models that are too short for some
    questions, how many these are.

    Raises:
        UserError: a result is absent or damaged, or two models were asked different questions.
    """
    columns: dict[Benchmark, dict[str, Result]] = {}
    for name in models:
        for result in read_results(data / name):
            columns.setdefault(result.identity.column, {})[name] = result
    rows = {column: _benchmark(column, results) for column, results in columns.items()}
    for found in compare(data / "student", data / "continued", draws, seed)["tasks"]:
        entry = found["metrics"][found["primary"]]
        difference = {key: entry[key] for key in ("difference", "low", "high", "detectable")}
        column = Benchmark(*(found[key] for key in Benchmark._fields))
        rows[column]["student_minus_continued"] = difference | {"p_holm": found["p_holm"]}
    return list(rows.values())


def _benchmark(column: Benchmark, results: Mapping[str, Result]) -> Row:
    same_protocol(list(results.values()))
    row: Row = column._asdict() | {"metric": task_named(column.task).primary}
    for name, result in results.items():
        if result.table is None:
            return row | {"status": result.status, "reason": result.unavailable}
        figures = result.metrics
        row["items"] = figures["items"]
        row[name] = {"value": figures[row["metric"]], "se": figures[f"{row['metric']}_se"]}
        row["blind"] = blind(row["metric"], figures)
    cut = {name: n for name, result in results.items() if (n := result.metrics.get("truncated", 0))}
    return row | ({"truncated": cut} if cut else {})


def blind(metric: str, figures: Mapping[str, Any]) -> float | None:
    """What the most frequent label scores, or, where labels have no names, the accuracy of a guess."""
    if "majority" in figures:
        return figures["majority"][metric]
    return figures.get("chance") if metric in ACCURACIES else None


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

    def rank(result: Result) -> int:
        return ranks.get(result.identity.column[:3], len(ranks))

    chosen = [once(sorted(read_results(data / name), key=rank)) for name in models]
    tasks, *figures = centred_means(chosen, draws, seed)
    values, resampled = (dict(zip(models, of, strict=True)) for of in figures)
    intervals = {name: interval(values[name], resampled[name]) for name in models}
    for a, b in comparisons:
        intervals[f"{a}_minus_{b}"] = interval(values[a] - values[b], resampled[a] - resampled[b])
    return tasks, {name: entries("centred_mean", one) for name, one in intervals.items()}
