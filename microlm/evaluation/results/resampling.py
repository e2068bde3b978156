"""The clustered bootstrap: what a figure would have been on other questions from the same sources.

Whole clusters are drawn with replacement (Miller 2024, arXiv 2411.00640). All statistics given to one call see the same
draws, so differences between them are paired.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

DRAWN_AT_ONCE = 2**21  # weights in memory at a time: bounds a bootstrap's memory, whatever its draws
# a multinomial draw costs a binomial one for each kind of cluster, an index for each cluster costs a tenth of that
CLUSTERS_A_KIND = 16
NO_SPREAD = 1e-12  # a variance below this share of the mean square is rounding, not spread


@dataclass(frozen=True)
class Sums:
    """A figure made from sums over questions: `formula` takes the total of each of `columns` [n] and gives the figure.

    The formula works on arrays of totals alike, one total a resample.
    """

    columns: tuple[np.ndarray, ...]
    formula: Callable[..., np.ndarray]

    def value(self) -> float:
        """The figure on the sample itself."""
        return float(self.formula(*(column.sum() for column in self.columns)))

    def weighted(self, weights: np.ndarray) -> np.ndarray:
        """weights [draws, n] of the questions -> the figure in each draw."""
        return self.formula(*(weights @ column for column in self.columns))


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's coefficient of x and y [n]; each resample is ranked afresh, questions drawn twice being tied.

    Ranks kept from the full sample would leave out the spread of the ranks themselves.
    """

    x: np.ndarray
    y: np.ndarray

    def value(self) -> float:
        """The coefficient on the sample itself, 0 where either side is constant."""
        return float(self.weighted(np.ones((1, len(self.x))))[0])

    def weighted(self, weights: np.ndarray) -> np.ndarray:
        """weights [draws, n] of the questions -> the coefficient in each draw."""
        ranks = [_weighted_ranks(values, weights) for values in (self.x, self.y)]
        total = weights.sum(axis=1)
        x, y = (values - ((total + 1) / 2)[:, None] for values in ranks)  # mid-ranks average to (n + 1) / 2
        sums = (np.einsum("ij,ij,ij->i", weights, a, b) for a, b in ((x, x), (y, y), (x, y)))
        return _pearson(*sums, floor=NO_SPREAD * total**3)


def mean(scores: ArrayLike) -> Sums:
    """Mean of scores [n]: an accuracy where they are right or wrong."""
    scores = np.asarray(scores, dtype=np.float64)
    return Sums((scores, np.ones_like(scores)), lambda total, n: total / n)


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Sums:
    """sum(numerator) / sum(denominator), both [n], e.g. bits over bytes."""
    columns = tuple(np.asarray(column, dtype=np.float64) for column in (numerator, denominator))
    return Sums(columns, lambda a, b: a / b)


def f1(predicted: ArrayLike, true: ArrayLike, classes: Sequence[int]) -> Sums:
    """Mean over `classes` of 2 TP / (2 TP + FP + FN), one class against the rest; 0 where a class is nowhere.

    Args:
        predicted, true: class numbers [n].
    """
    predicted, true = np.asarray(predicted), np.asarray(true)
    columns = []
    for one in classes:
        found, there = predicted == one, true == one
        columns += [2.0 * (found & there), found.astype(np.float64) + there]

    def formula(*totals: np.ndarray) -> np.ndarray:
        each = [_quotient(hits, all_) for hits, all_ in zip(totals[::2], totals[1::2])]
        return sum(each) / len(each)

    return Sums(tuple(columns), formula)


def pearson(x: ArrayLike, y: ArrayLike) -> Sums:
    """Pearson's coefficient of x and y [n], 0 where either is constant. Of two binary vectors it is Matthews' one."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (x, y))
    x, y = x - x.mean(), y - y.mean()  # centred, so that the differences of sums lose no digits

    def formula(n: np.ndarray, sx: np.ndarray, sy: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray):
        spreads = xx - sx * sx / n, yy - sy * sy / n
        return _pearson(*spreads, xy - sx * sy / n, floor=NO_SPREAD * np.maximum(xx, yy))

    return Sums((np.ones_like(x), x, y, x * x, y * y, x * y), formula)


def combined(statistics: Sequence[Sums], signs: Sequence[float]) -> Sums:
    """sum_i signs[i] * statistics[i] as one statistic, e.g. a difference with signs (1, -1)."""
    borders = np.cumsum([0, *(len(statistic.columns) for statistic in statistics)])

    def formula(*totals: np.ndarray) -> np.ndarray:
        parts = zip(statistics, signs, borders, borders[1:])
        return sum(sign * statistic.formula(*totals[first:last]) for statistic, sign, first, last in parts)

    return Sums(tuple(column for statistic in statistics for column in statistic.columns), formula)


def replicates(
    statistics: Sequence[Sums | RankCorrelation], cluster: ArrayLike, draws: int, seed: int | tuple[int, ...]
) -> np.ndarray:
    """Each statistic in each of `draws` resamples of the clusters [n] -> [statistics, draws].

    Raises:
        ValueError: there is one cluster, from which nothing can be said, or lengths differ.
    """
    names, codes = np.unique(np.asarray(cluster), return_inverse=True)
    if len(names) < 2:
        raise ValueError("one cluster alone says nothing about its own spread")
    if any(isinstance(statistic, RankCorrelation) for statistic in statistics):
        chunks = _weights(np.ones(len(names), dtype=np.int64), draws, seed)
        parts = [[s.weighted(weights[:, codes]) for s in statistics] for weights in chunks]
    else:
        sums, counts = _kinds(cluster_sums(codes, *(column for s in statistics for column in s.columns)))
        columns = iter(sums)
        by_kind = [Sums(tuple(next(columns) for _ in s.columns), s.formula) for s in statistics]
        parts = [[s.weighted(weights) for s in by_kind] for weights in _weights(counts, draws, seed)]
    return np.concatenate([np.stack(part) for part in parts], axis=1)


def cluster_sums(cluster: ArrayLike, *columns: np.ndarray) -> np.ndarray:
    """Columns [n] -> their sums by cluster [columns, clusters]. ValueError if lengths differ."""
    _, codes = np.unique(np.asarray(cluster), return_inverse=True)
    if any(len(column) != len(codes) for column in columns):
        raise ValueError(f"scores to compare must be of one length, not {[len(codes), *map(len, columns)]}")
    return np.stack([np.bincount(codes, weights=column) for column in columns])


def _kinds(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clusters [columns, clusters] with equal sums merged into one kind, if few kinds are left: sums, and their counts.

    How often each kind is drawn is multinomial, so the distribution is that of drawing clusters one by one.
    """
    _, first, counts = np.unique(sums, axis=1, return_index=True, return_counts=True)
    if len(first) * CLUSTERS_A_KIND > sums.shape[1]:
        return sums, np.ones(sums.shape[1], dtype=np.int64)
    order = np.argsort(first)  # by first appearance: swapping two models must not change the draws
    return sums[:, first[order]], counts[order]


def _weights(counts: np.ndarray, draws: int, seed: int | tuple[int, ...]) -> Iterator[np.ndarray]:
    """How often each kind, of `counts` clusters, is drawn when as many clusters are drawn: [some draws, kinds]."""
    clusters, kinds = int(counts.sum()), len(counts)
    random = np.random.default_rng(seed)
    at_once = math.ceil(DRAWN_AT_ONCE / kinds)
    for first in range(0, draws, at_once):
        rows = min(at_once, draws - first)
        if kinds < clusters:
            yield random.multinomial(clusters, counts / clusters, size=rows).astype(np.float64)
            continue
        drawn = random.integers(0, clusters, (rows, clusters), dtype=np.int32)
        drawn += np.arange(rows, dtype=np.int32)[:, None] * np.int32(clusters)
        yield np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(np.float64)


def _weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mid-rank of each of `values` [n] in a sample that holds it weights [draws, n] times -> [draws, n]."""
    _, codes = np.unique(values, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    begins = np.flatnonzero(np.diff(codes[order], prepend=-1))
    tied = np.add.reduceat(weights[:, order], begins, axis=1)  # [draws, distinct values]
    return (np.cumsum(tied, axis=1) - (tied - 1) / 2)[:, codes]


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    b = np.asarray(b, dtype=np.float64)
    return np.divide(a, b, out=np.zeros_like(b), where=b > 0)


def _pearson(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, floor: np.ndarray) -> np.ndarray:
    varies = (np.asarray(xx) > floor) & (np.asarray(yy) > floor)
    return _quotient(np.where(varies, xy, 0.0), np.where(varies, np.sqrt(np.maximum(xx * yy, 0)), 0.0))
