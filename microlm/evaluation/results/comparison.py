"""Two models, or two arms of several seeds, on the same questions: what differs, how surely, what could go unseen.

The centred mean is one figure over all accuracies: the mean of (accuracy - chance) / (1 - chance), as CORE in DCLM
(arXiv 2406.11794). Questions are resampled within each task, by cluster, and all models see the same draws; the tasks
are fixed, so that an interval says nothing of other tasks. Each counts once and alike, however many questions it has.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microlm.errors import UserError
from microlm.evaluation.results.answers import NORMALISER
from microlm.evaluation.results.metrics import (
    ACCURACIES,
    DECIMALS,
    DRAWS,
    SEED,
    centred,
    chance,
    figures_of,
    rounded,
    statistic,
)
from microlm.evaluation.results.statistics import (
    bootstrap_p,
    holm,
    interval,
    mcnemar_exact,
    replicates,
    seed_spread,
    smallest_detectable,
    welch_p,
)
from microlm.evaluation.results.store import Column, Result, read_results, same_protocol
from microlm.evaluation.tasks.task import TASKS, Task, task_named


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
    n_a, scored, tasks, left_out = len(sides[0]), [], [], []
    for column in shared:
        results = [of[column] for of in by_model]
        absent = [result for result in results if result.table is None]
        if absent:
            reason = f"{absent[0].status} for {absent[0].identity.model}"
            left_out.append(column._asdict() | {"reason": reason})
            continue
        same_protocol(results)
        tasks.append(compare_task(results[:n_a], results[n_a:], draws, seed))
        scored.append(results)
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
    names = [[f"{r.identity.task} ({r.identity.protocol}, {r.identity.shots}-shot)" for r in model] for model in models]
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


def _unshared(by_model: Sequence[dict[Column, Result]], shared: Sequence[Column]) -> list[dict[str, Any]]:
    """What not all models have. UserError where all have a task, but never alike: that is a mistake, not a gap."""
    for name in sorted({column[0] for of in by_model for column in of} - {column[0] for column in shared}):
        of_task = [[result for column, result in of.items() if column[0] == name] for of in by_model]
        if all(of_task):
            same_protocol([results[0] for results in of_task])
    names = [next(iter(of.values())).identity.model for of in by_model]
    left_out = []
    for column in sorted({column for of in by_model for column in of} - set(shared), key=str):
        without = ", ".join(name for name, of in zip(names, by_model) if column not in of)
        left_out.append(column._asdict() | {"reason": f"not scored for {without}"})
    return left_out
