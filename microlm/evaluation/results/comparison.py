"""Two models, or two arms of several seeds, on the same questions: what differs, how surely, what could go unseen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microlm.errors import UserError
from microlm.evaluation.results.answers import NORMALISER
from microlm.evaluation.results.centred_mean import centred_means, once
from microlm.evaluation.results.metrics import DECIMALS, DRAWS, SEED, figures_of, rounded, statistic
from microlm.evaluation.results.resampling import replicates
from microlm.evaluation.results.statistics import (
    bootstrap_p,
    holm,
    interval,
    mcnemar_exact,
    seed_spread,
    smallest_detectable,
    welch_p,
)
from microlm.evaluation.results.store import Result, read_results, same_protocol
from microlm.evaluation.tasks.task import TASKS, Task, task_named

Column = tuple[str, str, int, int | None]  # task, protocol, shots, questions in the subset


def compare(a: Path | Sequence[Path], b: Path | Sequence[Path], draws: int = DRAWS, seed: int = SEED) -> dict[str, Any]:
    """Compare folders of results, a minus b; several folders on a side are seeds of one arm.

    `tasks` holds a comparison for each task, protocol and number of shots that all have (see `compare_task`), with
    `p_holm`, its p corrected for how many there are (Holm 1979). `left_out` names the others, each with the reason.
    `centred_mean` compares the mean over the tasks whose primary metric is an accuracy (see centred_mean.py).

    Raises:
        UserError: a folder's results are absent or damaged, those of a task not comparable, or nothing is shared.
    """
    sides = [[read_results(folder) for folder in _listed(side)] for side in (a, b)]
    models = [[results[0].identity.model for results in side] for side in sides]
    by_model = [_by_column(results) for side in sides for results in side]
    shared = [column for column in by_model[0] if all(column in other for other in by_model[1:])]
    scored = [column for column in shared if all(of[column].table is not None for of in by_model)]
    seeds_a, tasks, left_out = len(sides[0]), [], []
    for column in shared:
        results = [of[column] for of in by_model]
        absent = [result for result in results if result.table is None]
        if absent:
            left_out.append(_head(column) | {"reason": f"{absent[0].status} for {absent[0].identity.model}"})
            continue
        same_protocol(results)
        tasks.append(compare_task(results[:seeds_a], results[seeds_a:], draws, seed))
    left_out += _unshared(by_model, shared)
    if not tasks:
        names = " and ".join(side[0] for side in models)
        raise UserError(f"{names} have no scored task in common; score the same --tasks of both with microlm evaluate")
    for row, p in zip(tasks, holm([row["p"] for row in tasks]), strict=True):
        row["p_holm"] = round(float(p), DECIMALS)
    found = {"a": models[0], "b": models[1], "draws": draws, "tasks": tasks, "left_out": left_out}
    return found | _centred_mean(by_model, scored, seeds_a, draws, seed)


def _centred_mean(
    by_model: Sequence[dict[Column, Result]], scored: Sequence[Column], n_a: int, draws: int, seed: int
) -> dict[str, Any]:
    """`centred_mean` and its `tasks`, of a task that was asked several ways the first; nothing without an accuracy."""
    chosen = [once(of[column] for column in sorted(scored, key=_preference)) for of in by_model]
    if not chosen[0]:
        return {}
    found = centred_means(chosen, draws, seed)
    return {"centred_mean": {"tasks": found.tasks} | _entry(found.values, found.resampled, n_a)}


def _preference(column: Column) -> tuple[int, int, int, float]:
    task, protocol, shots, limit = column
    return list(TASKS).index(task), TASKS[task].protocols.index(protocol), shots, -(limit or float("inf"))


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
    head = _head((identity.task, identity.protocol, identity.shots, identity.limit))
    head |= {"items": len(table), "clusters": int(table["cluster"].nunique()), "primary": task.primary}
    if head["clusters"] < 2:
        raise UserError(f"{identity.task}: {len(table)} question(s) of one source give no interval; raise --limit")
    metrics = {name: _difference(name, task, a, b, draws, seed) for name in figures_of(task)}
    applicable = [metrics[task.primary]["p"]]
    if "seeds" in metrics[task.primary]:
        applicable.append(metrics[task.primary]["seeds"]["p"])
    elif task.kind != "regression" and len(a) == len(b) == 1:
        head |= _discordance(task, identity.protocol, a[0], b[0])
        if task.primary.startswith("acc"):
            applicable.append(head["mcnemar_p"])
    return head | {"p": max(applicable), "metrics": metrics}


def _difference(
    metric: str, task: Task, a: Sequence[Result], b: Sequence[Result], draws: int, seed: int
) -> dict[str, Any]:
    statistics = [statistic(metric, task, result.identity.protocol, result.table) for result in (*a, *b)]
    values = np.array([one.value() for one in statistics])
    return _entry(values, replicates(statistics, a[0].table["cluster"], draws, seed), len(a))


def _entry(values: np.ndarray, resampled: np.ndarray, n_a: int) -> dict[str, Any]:
    """Of a figure of each model [models], its replicates [models, draws], and how many models A is."""
    mean_a, mean_b = (values[:n_a].mean(), values[n_a:].mean())
    differences = resampled[:n_a].mean(axis=0) - resampled[n_a:].mean(axis=0)
    found = interval(float(mean_a - mean_b), differences)
    entry = {"a": mean_a, "b": mean_b, "difference": found.mean, "low": found.low, "high": found.high}
    entry |= {"se": found.standard_error, "p": bootstrap_p(differences)}
    error = found.standard_error
    if 1 < n_a < len(values) - 1:
        entry["seeds"] = _seeds(values, resampled, n_a)
        luck = (entry["seeds"][side]["seed_sd_beyond_items"] ** 2 / entry["seeds"][side]["seeds"] for side in "ab")
        error = (error**2 + sum(luck)) ** 0.5
    entry["detectable"] = smallest_detectable(error) if error > 0 else None
    return rounded(entry)


def _seeds(values: np.ndarray, resampled: np.ndarray, n_a: int) -> dict[str, Any]:
    """The spread between seeds apart from that over questions, for each side, and Welch's p over the seeds alone."""
    sides = {"a": slice(0, n_a), "b": slice(n_a, None)}
    spread = {name: vars(seed_spread(values[side], resampled[side])) for name, side in sides.items()}
    return spread | {"p": welch_p(values[:n_a], values[n_a:])}


def _discordance(task: Task, protocol: str, a: Result, b: Result) -> dict[str, float]:
    column = f"correct_{NORMALISER[protocol] if task.primary == 'acc_norm' else 'sum'}"
    right_a, right_b = (result.table[column].to_numpy(bool) for result in (a, b))
    entry = {"mcnemar_p": mcnemar_exact(right_a, right_b), "discordance": float((right_a != right_b).mean())}
    return rounded(entry)


def _by_column(results: Sequence[Result]) -> dict[Column, Result]:
    return {(r.identity.task, r.identity.protocol, r.identity.shots, r.identity.limit): r for r in results}


def _unshared(by_model: Sequence[dict[Column, Result]], shared: Sequence[Column]) -> list[dict[str, Any]]:
    """What not all models have. UserError where all have a task, but never alike: that is a mistake, not a gap."""
    for name in sorted({column[0] for of in by_model for column in of} - {column[0] for column in shared}):
        of_task = [[result for column, result in of.items() if column[0] == name] for of in by_model]
        if all(of_task):
            same_protocol([results[0] for results in of_task])
    every = sorted({column for of in by_model for column in of} - set(shared), key=str)
    return [_head(column) | {"reason": _missing(column, by_model)} for column in every]


def _missing(column: Column, by_model: Sequence[dict[Column, Result]]) -> str:
    without = [next(iter(of.values())).identity.model for of in by_model if column not in of]
    return f"not scored for {', '.join(without)}"


def _head(column: Column) -> dict[str, Any]:
    return dict(zip(("task", "protocol", "shots", "limit"), column, strict=True))


def _listed(side: Path | Sequence[Path]) -> Sequence[Path]:
    return [side] if isinstance(side, Path) else side
