"""What tables of answers say: each figure with its standard error, what answering blindly gives, how two models differ.

Accuracy is by the lowest summed loss, acc_norm by the protocol's own normaliser. F1 and Matthews are of the answers by
the sum, as GLUE is scored elsewhere. Errors of means are clustered (Miller 2024, arXiv 2411.00640); those of F1,
Matthews, Pearson and Spearman are the standard deviation of a clustered bootstrap.

The centred mean is one figure over all accuracies: the mean of (accuracy - chance) / (1 - chance), as CORE in DCLM
(arXiv 2406.11794). Questions are resampled within each task, by cluster, and all models see the same draws; the tasks
are fixed, so that an interval says nothing of other tasks. Each counts once and alike, however many questions it has.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from microlm.errors import UserError
from microlm.evaluation.results.answers import NORMALISER, NORMALISERS
from microlm.evaluation.results.statistics import (
    RankCorrelation,
    Sums,
    bootstrap_p,
    clustered_error,
    f1,
    holm,
    interval,
    mcnemar_exact,
    mean,
    pearson,
    ratio,
    replicates,
    seed_spread,
    smallest_detectable,
    welch_p,
)
from microlm.evaluation.results.store import Result, read_results, same_protocol
from microlm.evaluation.tasks.task import TASKS, Benchmark, Task, task_named

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


def compare(a: Path | Sequence[Path], b: Path | Sequence[Path], draws: int = DRAWS, seed: int = SEED) -> dict[str, Any]:
    """Compare folders of results, a minus b; several folders on a side are seeds of one arm.

    `tasks` holds a comparison for each task, protocol and number of shots that all have (see `compare_task`), with
    `p_holm`, its p corrected for how many there are (Holm 1979). `left_out` names the others, each with the reason.
    `centred_mean` compares the mean over the tasks whose primary metric is an accuracy.

    Raises:
        UserError: a folder's results are absent or damaged, those of a task not comparable, or nothing is shared.
    """
    sides = [[read_results(folder) for folder in ([side] if isinstance(side, Path) else side)] for side in (a, b)]
    models = [[results[0].identity.model for results in side] for side in sides]
    by_model = [{result.identity.column: result for result in results} for side in sides for results in side]
    shared = [column for column in by_model[0] if all(column in other for other in by_model[1:])]
    n_a, scored, left_out = len(sides[0]), [], []
    for column in shared:
        results = [of[column] for of in by_model]
        absent = next((result for result in results if result.table is None), None)
        if absent:
            left_out.append(column._asdict() | {"reason": f"{absent.status} for {absent.identity.model}"})
        else:
            same_protocol(results)
            scored.append(results)
    tasks = [compare_task(results[:n_a], results[n_a:], draws, seed) for results in scored]
    left_out += _unshared(by_model, shared)
    if not tasks:
        names = " and ".join(side[0] for side in models)
        raise UserError(f"{names} have no scored task in common; score the same --tasks of both with microlm evaluate")
    for row, p in zip(tasks, holm([row["p"] for row in tasks]), strict=True):
        row["p_holm"] = round(float(p), DECIMALS)
    found = {"a": models[0], "b": models[1], "draws": draws, "tasks": tasks, "left_out": left_out}
    chosen = [once(sorted(results, key=_preference)) for results in zip(*scored)]
    if chosen[0]:
        names, *figures = centred_means(chosen, draws, seed)
        found["centred_mean"] = {"tasks": names} | _entry(*figures, n_a)
    return found


def once(results: Iterable[Result]) -> list[Result]:
    """The first result of each task whose primary metric is an accuracy, in order."""
    first: dict[str, Result] = {}
    for result in results:
        if result.table is not None and task_named(result.identity.task).primary in ACCURACIES:
            first.setdefault(result.identity.task, result)
    return list(first.values())


def centred_means(
    models: Sequence[Sequence[Result]], draws: int, seed: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The tasks, the centred mean over them of each model [models], and its resamples [models, draws].

    Args:
        models: each one's results, one a task, the same tasks in the same order for all.

    Raises:
        ValueError: there is no task, models have different ones, or a task's questions are one cluster.
    """
    names = [[str(result.identity.column) for result in model] for model in models]
    if not names[0] or any(other != names[0] for other in names):
        raise ValueError(f"models must have been asked the same tasks, at least one, not {names}")
    values, resampled = [], []
    for place, results in enumerate(zip(*models)):
        task = task_named(results[0].identity.task)
        # tasks are independent of each other, so that each has draws of its own
        figures = _figures(task.primary, task, results, draws, (seed, place))
        for found, of_task in zip((values, resampled), figures):
            found.append(centred(of_task, chance(task, results[0].table)))
    return names[0], np.mean(values, axis=0), np.mean(resampled, axis=0)


def _preference(result: Result) -> tuple[int, int, int, float]:
    """Of a task that was asked several ways the first counts."""
    task, protocol, shots, limit = result.identity.column
    return list(TASKS).index(task), TASKS[task].protocols.index(protocol), shots, -(limit or float("inf"))


def _figures(
    metric: str, task: Task, results: Sequence[Result], draws: int, seed: int | tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The figure of each result [models], and its replicates [models, draws]."""
    statistics = [statistic(metric, task, result.identity.protocol, result.table) for result in results]
    resampled = replicates(statistics, results[0].table["cluster"], draws, seed)
    return np.array([one.value() for one in statistics]), resampled


def compare_task(a: Sequence[Result], b: Sequence[Result], draws: int = DRAWS, seed: int = SEED) -> dict[str, Any]:
    """Results of one task, protocol and number of shots, a minus b, paired by question; each result is a seed.

    Returns:
        task, protocol, shots, limit, items, clusters, primary; metrics: for each metric of the task and gold_bpb a, b,
        difference, low and high (95 %, clustered bootstrap over questions), se, p, detectable (the true difference
        found in 80 % of samples, null where no question told the two apart), and with two seeds or more a side `seeds`.
        For one seed a side mcnemar_p (exact) and discordance (share of questions that one alone gets right), by the
        primary accuracy, else by acc. p is of the primary metric: the largest of those that apply, since McNemar's
        ignores clusters, the bootstrap's is bold where few questions differ, and neither knows of seeds.
    """
    identity = a[0].identity
    task, table = task_named(identity.task), a[0].table
    head = identity.column._asdict() | {"items": len(table)}
    head |= {"clusters": int(table["cluster"].nunique()), "primary": task.primary}
    if head["clusters"] < 2:
        raise UserError(f"{identity.task}: {len(table)} question(s) of one source give no interval; raise --limit")
    metrics = {name: _entry(*_figures(name, task, (*a, *b), draws, seed), len(a)) for name in figures_of(task)}
    primary, protocol = metrics[task.primary], identity.protocol
    applicable = [primary["p"]]
    if "seeds" in primary:
        applicable.append(primary["seeds"]["p"])
    elif task.kind != "regression" and len(a) == len(b) == 1:
        column = f"correct_{NORMALISER[protocol] if task.primary == 'acc_norm' else 'sum'}"
        right = [result.table[column].to_numpy(bool) for result in (*a, *b)]
        head |= rounded({"mcnemar_p": mcnemar_exact(*right), "discordance": float((right[0] != right[1]).mean())})
        if task.primary in ACCURACIES:
            applicable.append(head["mcnemar_p"])
    return head | {"p": max(applicable), "metrics": metrics}


def _entry(values: np.ndarray, resampled: np.ndarray, n_a: int) -> dict[str, Any]:
    """Of a figure of each model [models], its replicates [models, draws], and how many models A is."""
    mean_a, mean_b = (values[:n_a].mean(), values[n_a:].mean())
    differences = resampled[:n_a].mean(axis=0) - resampled[n_a:].mean(axis=0)
    found = interval(float(mean_a - mean_b), differences)
    entry = {"a": mean_a, "b": mean_b, "difference": found.mean, "low": found.low, "high": found.high}
    entry |= {"se": found.standard_error, "p": bootstrap_p(differences)}
    error = found.standard_error
    if 1 < n_a < len(values) - 1:
        # the spread between seeds apart from that over questions, and Welch's p over the seeds alone
        spread = {"a": seed_spread(values[:n_a], resampled[:n_a]), "b": seed_spread(values[n_a:], resampled[n_a:])}
        entry["seeds"] = spread | {"p": welch_p(values[:n_a], values[n_a:])}
        luck = (side["seed_sd_beyond_items"] ** 2 / side["seeds"] for side in spread.values())
        error = (error**2 + sum(luck)) ** 0.5
    entry["detectable"] = smallest_detectable(error) if error > 0 else None
    return rounded(entry)


def _unshared(by_model: Sequence[dict[Benchmark, Result]], shared: Sequence[Benchmark]) -> list[dict[str, Any]]:
    """What not all models have. UserError where all have a task, but never alike: that is a mistake, not a gap."""
    rest = {column for of in by_model for column in of} - set(shared)
    for name in sorted({column.task for column in rest} - {column.task for column in shared}):
        of_task = [[result for column, result in of.items() if column.task == name] for of in by_model]
        if all(of_task):
            same_protocol([results[0] for results in of_task])
    names = [next(iter(of.values())).identity.model for of in by_model]
    left_out = []
    for column in sorted(rest, key=repr):
        without = ", ".join(name for name, of in zip(names, by_model) if column not in of)
        left_out.append(column._asdict() | {"reason": f"not scored for {without}"})
    return left_out
