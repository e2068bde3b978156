"""How sure a score is: standard errors, paired intervals, and what a comparison could have seen at all.

Questions cut from one source, and adjacent windows of text, err together, so whole clusters are resampled and summed
(Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.80
DRAWN_AT_ONCE = 2**21  # cluster indices in memory at a time: bounds a bootstrap's memory, whatever its draws


@dataclass(frozen=True)
class Interval:
    """A difference `mean` as observed, its 95 % bootstrap interval [low, high] and bootstrap standard error."""

    low: float
    high: float
    mean: float
    standard_error: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def standard_error(correct: ArrayLike) -> float:
    """sqrt(p (1 - p) / n) where `correct` [n] says which of n independent questions were answered right."""
    scores = _vector(correct)
    p = scores.mean()
    return float(np.sqrt(p * (1 - p) / len(scores)))


def clustered_standard_error(correct: ArrayLike, cluster: ArrayLike) -> float:
    """Standard error of mean(correct) [n] where questions of one `cluster` [n] may err together (Miller 2024, eq. 4).

    With every question its own cluster it is `standard_error`.
    """
    scores = _vector(correct)
    return float(np.sqrt(np.square(_cluster_sums(cluster, scores - scores.mean())).sum()) / len(scores))


def accuracy_errors(answered: pd.DataFrame) -> dict[str, float]:
    """acc_norm_se and acc_se, clustered by source, of a table that `engine.score` made."""
    return {
        "acc_norm_se": clustered_standard_error(answered["correct_norm"], answered["source_id"]),
        "acc_se": clustered_standard_error(answered["correct"], answered["source_id"]),
    }


def paired_bootstrap(a: ArrayLike, b: ArrayLike, cluster: ArrayLike, draws: int, seed: int) -> Interval:
    """Interval of mean(a) - mean(b), paired by question: a, b, cluster are [n].

    Clusters are drawn with replacement, each keeping its size, and the percentiles of the differences are the bounds.

    Raises:
        ValueError: lengths differ, n is 0, or there is one cluster, from which nothing can be said.
    """
    scores = _vector(a)
    sums = _cluster_sums(cluster, scores, _vector(b), np.ones_like(scores))
    return _bootstrap(sums, lambda a_sum, b_sum, n: (a_sum - b_sum) / n, draws, seed)


def paired_ratio_bootstrap(
    a: tuple[ArrayLike, ArrayLike], b: tuple[ArrayLike, ArrayLike], cluster: ArrayLike, draws: int, seed: int
) -> Interval:
    """Interval of sum(a0)/sum(a1) - sum(b0)/sum(b1), e.g. of nats over bytes, paired by window: each array is [n].

    Raises:
        ValueError: as `paired_bootstrap`.
    """
    sums = _cluster_sums(cluster, *map(_vector, (*a, *b)))
    return _bootstrap(sums, lambda a0, a1, b0, b1: a0 / a1 - b0 / b1, draws, seed)


def smallest_detectable(standard_error: float) -> float:
    """The true difference that a two-sided 5 % test of this standard error finds in 80 % of samples: 2.80 of it."""
    return float((stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)) * standard_error)


def mcnemar_exact(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Two-sided p of "both are right equally often" from the questions [n] that one alone gets right (McNemar 1947)."""
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    only_a, discordant = int((a & ~b).sum()), int((a != b).sum())
    return float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0


def _vector(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores must be a list of at least one number, not of shape {values.shape}")
    return values


def _cluster_sums(cluster: ArrayLike, *columns: np.ndarray) -> np.ndarray:
    """Columns [n] -> their sums by cluster [columns, clusters]."""
    _, codes = np.unique(np.asarray(cluster), return_inverse=True)
    if any(len(column) != len(codes) for column in columns):
        raise ValueError(f"scores to compare must be of one length, not {[len(codes), *map(len, columns)]}")
    return np.stack([np.bincount(codes, weights=column) for column in columns])


def _bootstrap(sums: np.ndarray, statistic: Callable[..., np.ndarray], draws: int, seed: int) -> Interval:
    if sums.shape[1] < 2:
        raise ValueError("one cluster alone says nothing about its own spread")
    resampled = np.concatenate([statistic(*totals) for totals in _resampled_totals(sums, draws, seed)])
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high), float(statistic(*sums.sum(axis=1))), float(resampled.std()))


def _resampled_totals(sums: np.ndarray, draws: int, seed: int) -> Iterator[list[np.ndarray]]:
    """Totals of each column of `sums` [columns, clusters] in `draws` resamples, some draws at a time."""
    clusters = sums.shape[1]
    random = np.random.default_rng(seed)
    at_once = math.ceil(DRAWN_AT_ONCE / clusters)
    for first in range(0, draws, at_once):
        rows = min(at_once, draws - first)
        drawn = random.integers(0, clusters, (rows, clusters), dtype=np.int32)
        drawn += np.arange(rows, dtype=np.int32)[:, None] * np.int32(clusters)
        weights = np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(np.float64)
        yield [weights @ column for column in sums]
