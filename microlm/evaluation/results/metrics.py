"""What a table of answers says: each figure with its standard error and with what answering blindly would give.

Accuracy is by the lowest summed loss, acc_norm by the protocol's own normaliser. F1 and Matthews are of the answers by
the sum, as GLUE is scored elsewhere. Errors of means are clustered (Miller 2024, arXiv 2411.00640); those of F1,
Matthews, Pearson and Spearman are the standard deviation of a clustered bootstrap.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from microlm.evaluation.results import resampling
from microlm.evaluation.results.answers import NORMALISER, NORMALISERS
from microlm.evaluation.results.resampling import RankCorrelation, Sums
from microlm.evaluation.results.statistics import clustered_ratio_error, clustered_standard_error
from microlm.evaluation.tasks.task import Task

DRAWS = 10_000
SEED = 0
DECIMALS = 6
ACCURACIES = ("acc", "acc_norm")
# the label id that says yes: the pair means the same, the one follows from the other, the sentence is good
YES = {
    "cola": 1,
    "sst2": 1,
    "mrpc": 1,
    "qqp": 1,
    "qnli": 0,
    "rte": 0,
    "wnli": 1,
    "snli": 0,
    "mnli": 0,
    "mnli_mismatched": 0,
    "cb": 0,
    "boolq": 1,
}


def statistic(metric: str, task: Task, protocol: str, table: pd.DataFrame) -> Sums | RankCorrelation:
    """A figure of a table of answers, ready to be resampled.

    Args:
        metric: acc, acc_norm, f1, mcc, pearson, spearman, or gold_bpb (bits per byte of the true endings).
    """
    if metric == "acc_norm":
        return resampling.mean(table[f"correct_{NORMALISER[protocol]}"])
    if metric == "gold_bpb":
        return resampling.ratio(table["gold_nats"] / math.log(2), table["gold_bytes"])
    if metric == "spearman":
        return RankCorrelation(table["value"].to_numpy(float), table["label"].to_numpy(float))
    if metric == "pearson":
        return resampling.pearson(table["value"], table["label"])
    return _of_answers(metric, task, table["prediction_sum"].to_numpy(), table["label"].to_numpy())


def _of_answers(metric: str, task: Task, predicted: np.ndarray, labels: np.ndarray) -> Sums:
    if metric in ACCURACIES:
        return resampling.mean(predicted == labels)
    if metric == "f1":
        return resampling.f1(predicted, labels, _f1_classes(task))
    if metric == "mcc":
        return resampling.pearson(predicted, labels)
    raise ValueError(f"metric {metric!r} is not made from answers")


def _f1_classes(task: Task) -> Sequence[int]:
    """The positive class of a yes-or-no task; every class, one against the rest, of one with more (SuperGLUE's CB)."""
    return (YES[task.name],) if len(task.choices) == 2 else range(len(task.choices))


def task_metrics(task: Task, protocol: str, shots: int, table: pd.DataFrame) -> dict[str, Any]:
    """All figures of one task under one protocol as JSON; deterministic; fractions rounded to 6 places.

    <metric> and <metric>_se for each metric of the task; but of a regression also acc, gold_bpb (bits per byte of the
    true endings), chance (mean of 1 / endings; of a word 0) and <accuracy>_centred ((acc - chance) / (1 - chance)). Of
    a choice task also margin (mean, nats per byte), near_ties (how many), normalisers (accuracy by each), and, where
    labels have names, two ways to answer blindly: majority (the most frequent label) and, where one says yes,
    always_positive. Of a word perplexity (e to the mean nats). A standard error is null where all is one cluster.
    """
    found: dict[str, Any] = {"protocol": protocol, "shots": shots, "items": len(table)}
    found["clusters"] = int(table["cluster"].nunique())
    for metric in figures_of(task, "acc"):
        found |= _with_error(metric, task, protocol, table)
    if task.kind == "choice":
        found |= _of_choices(task, table) | {"normalisers": _by_normaliser(table)}
    if task.kind == "word":
        found["perplexity"] = math.exp(table["gold_nats"].mean())
    if task.kind != "regression":
        found["chance"] = chance(task, table)
        found |= {f"{name}_centred": centred(found[name], found["chance"]) for name in ACCURACIES if name in found}
    return rounded(found)


def figures_of(task: Task, *more: str) -> tuple[str, ...]:
    """The task's metrics, then, unless it is a regression, `more` of them and gold_bpb."""
    return tuple(dict.fromkeys((*task.metrics, *((*more, "gold_bpb") if task.kind != "regression" else ()))))


def chance(task: Task, table: pd.DataFrame) -> float:
    """Accuracy of a blind guess among each question's own endings; 0 for a word, which has no others."""
    if task.kind == "word":
        return 0.0
    return float((1 / table.filter(regex=r"^nats_\d+$").notna().sum(axis=1)).mean())


def _with_error(metric: str, task: Task, protocol: str, table: pd.DataFrame) -> dict[str, float | None]:
    figure, cluster = statistic(metric, task, protocol, table), table["cluster"]
    if cluster.nunique() < 2:
        error = None
    elif metric in ACCURACIES:
        error = clustered_standard_error(figure.columns[0], cluster)
    elif metric == "gold_bpb":
        error = clustered_ratio_error(*figure.columns, cluster)
    else:
        error = float(resampling.replicates([figure], cluster, DRAWS, SEED).std())
    return {metric: figure.value(), f"{metric}_se": error}


def _of_choices(task: Task, table: pd.DataFrame) -> dict[str, Any]:
    labels = table["label"].to_numpy(int)
    found: dict[str, Any] = {"margin": float(table["margin"].mean()), "near_ties": int(table["near_tie"].sum())}
    blind = {"majority": int(np.bincount(labels).argmax())} if task.choices else {}
    if task.name in YES:
        blind["always_positive"] = YES[task.name]
    for name, answer in blind.items():
        same = np.full_like(labels, answer)
        metrics = dict.fromkeys(("acc", *task.metrics))
        found[name] = {"label": answer} | {m: _of_answers(m, task, same, labels).value() for m in metrics}
    return found


def _by_normaliser(table: pd.DataFrame) -> dict[str, float]:
    return {name: float(table[f"correct_{name}"].mean()) for name in NORMALISERS if f"correct_{name}" in table}


def centred(accuracy: Any, chance: float) -> Any:
    """0 for a blind guess, 1 for all right: DCLM's CORE (arXiv 2406.11794) is the mean of this over tasks."""
    return (accuracy - chance) / (1 - chance)


def rounded(value: Any) -> Any:
    """`value` with every fraction in it, however deep, at 6 places."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return round(float(value), DECIMALS) if isinstance(value, float) else value
