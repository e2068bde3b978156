"""One figure over all accuracies: the mean of (accuracy - chance) / (1 - chance), as CORE in DCLM (arXiv 2406.11794).

Questions are resampled within each task, by cluster, and all models see the same draws; the tasks are fixed, so that an
interval says nothing of other tasks. Each task counts once and alike, however many questions it has.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from microlm.evaluation.results.metrics import ACCURACIES, centred, chance, statistic
from microlm.evaluation.results.resampling import replicates
from microlm.evaluation.results.store import Result
from microlm.evaluation.tasks.task import task_named


@dataclass(frozen=True)
class CentredMeans:
    """`values` [models], and `resampled` [models, draws] of them, over `tasks` as results name them."""

    tasks: list[str]
    values: np.ndarray
    resampled: np.ndarray


def counts(result: Result) -> bool:
    """Whether the result is one whose primary metric is an accuracy."""
    return result.table is not None and task_named(result.identity.task).primary in ACCURACIES


def once(results: Iterable[Result]) -> list[Result]:
    """The first result of each task that counts, in order."""
    first: dict[str, Result] = {}
    for result in filter(counts, results):
        first.setdefault(result.identity.task, result)
    return list(first.values())


def centred_means(models: Sequence[Sequence[Result]], draws: int, seed: int) -> CentredMeans:
    """Of each model's results, one a task, the same tasks in the same order for all.

    Raises:
        ValueError: there is no task, models have different ones, or a task's questions are one cluster.
    """
    names = [[f"{r.identity.task} ({r.identity.protocol}, {r.identity.shots}-shot)" for r in model] for model in models]
    if not names[0] or any(other != names[0] for other in names):
        raise ValueError(f"models must have been asked the same tasks, at least one, not {names}")
    values, resampled = [], []
    for place, results in enumerate(zip(*models)):
        task, protocol = task_named(results[0].identity.task), results[0].identity.protocol
        blind = chance(task, results[0].table)
        statistics = [statistic(task.primary, task, protocol, result.table) for result in results]
        values.append([centred(one.value(), blind) for one in statistics])
        # tasks are independent of each other, so that each has draws of its own
        resampled.append(centred(replicates(statistics, results[0].table["cluster"], draws, (seed, place)), blind))
    return CentredMeans(names[0], np.mean(values, axis=0), np.mean(resampled, axis=0))
