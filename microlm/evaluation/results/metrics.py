"""What a table of answers says: each figure with its standard error and with what answering blindly would give.

Accuracy is by the lowest summed loss, acc_norm by the protocol's own normaliser. F1 and Matthews are of the answers by
the sum, as GLUE is scored elsewhere. Errors of means are clustered (Miller 2024, arXiv 2411.00640); those of F1,
Matthews, Pearson and Spearman are the standard deviation of a clustered bootstrap.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from microlm.evaluation.results.answers import NORMALISER, NORMALISERS
from microlm.evaluation.results.statistics import (
    RankCorrelation,
    Sums,
    clustered_error,
    f1,
    mean,
    pearson,
    ratio,
    replicates,
)
from microlm.evaluation.tasks.task import Task

DRAWS = 10_000
SEED = 0
DECIMALS = 6
ACCURACIES = ("acc", "acc_norm")
# labels that say yes: the pair means the same, the one follows from the other, the sentence is good
YES = ("acceptable", "positive", "equivalent", "duplicate", "entailment", "yes")


def yes_of(task: Task) -> int:
    """The id of the label that says yes, of a task whose labels have names."""
    return next(label for label, name in enumerate(task.choices) if name in YES)


def statistic(metric: str, task: Task, protocol: str, table: pd.DataFrame) -> Sums | RankCorrelation:
    """A figure of a table of answers, ready to be resampled.

    Args:
        metric: acc, acc_norm, f1, mcc, pearson, spearman, or gold_bpb (bits per byte of the true endings).
    """
    if metric == "gold_bpb":
        return ratio(table["gold_nats"] / math.log(2), table["gold_bytes"])
    if metric == "acc_norm":
        return mean(table[f"correct_{NORMALISER[protocol]}"])
    answer, label = (
        table["value" if task.kind == "regression" else "prediction_sum"].to_numpy(),
        table["label"].to_numpy(),
    )
    if metric == "acc":
        return mean(answer == label)
    if metric == "f1":  # of one class against the rest: of several, as SuperGLUE's CB has, the mean over each
        return f1(answer, label, [yes_of(task)] if len(task.choices) == 2 else range(len(task.choices)))
    return RankCorrelation(answer, label) if metric == "spearman" else pearson(answer, label)  # Matthews' is Pearson's


def task_metrics(task: Task, protocol: str, shots: int, table: pd.DataFrame) -> dict[str, Any]:
    """All figures of one task under one protocol as JSON; deterministic; fractions rounded to 6 places.

    <metric> and <metric>_se for each metric of the task; but of a regression also acc, gold_bpb (bits per byte of the
    true endings), chance (mean of 1 / endings; of a word 0) and <accuracy>_centred ((acc - chance) / (1 - chance)). Of
    a choice task also margin (mean, nats per byte), near_ties (how many), normalisers (accuracy by each), and, where
    labels have names, two ways to answer blindly: majority (the most frequent label) and always_positive. Of a word
    perplexity (e to the mean nats). A standard error is null where all is one cluster.
    """
    found: dict[str, Any] = {"protocol": protocol, "shots": shots, "items": len(table)}
    found["clusters"] = int(table["cluster"].nunique())
    for metric in figures_of(task, "acc"):
        figure = statistic(metric, task, protocol, table)
        found |= {metric: figure.value(), f"{metric}_se": _error(metric, figure, table["cluster"])}
    if task.kind == "choice":
        found |= {"margin": float(table["margin"].mean()), "near_ties": int(table["near_tie"].sum())}
        if task.choices:
            found["majority"] = _blind(int(np.bincount(table["label"]).argmax()), task, protocol, table)
            found["always_positive"] = _blind(yes_of(task), task, protocol, table)
        kept = [name for name in NORMALISERS if f"correct_{name}" in table]
        found["normalisers"] = {name: float(table[f"correct_{name}"].mean()) for name in kept}
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


def _error(metric: str, figure: Sums | RankCorrelation, cluster: pd.Series) -> float | None:
    if cluster.nunique() < 2:
        return None
    if metric in (*ACCURACIES, "gold_bpb"):
        return clustered_error(figure, cluster)
    return float(replicates([figure], cluster, DRAWS, SEED).std())


def _blind(answer: int, task: Task, protocol: str, table: pd.DataFrame) -> dict[str, float]:
    """What the same answer to every question scores."""
    same, metrics = table.assign(prediction_sum=answer), dict.fromkeys(("acc", *task.metrics))
    return {"label": answer} | {name: statistic(name, task, protocol, same).value() for name in metrics}


def centred(accuracy: Any, chance: float) -> Any:
    """0 for a blind guess, 1 for all right: DCLM's CORE (arXiv 2406.11794) is the mean of this over tasks."""
    return (accuracy - chance) / (1 - chance)


def rounded(value: Any) -> Any:
    """`value` with every fraction in it, however deep, at 6 places."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return round(float(value), DECIMALS) if isinstance(value, float) else value
