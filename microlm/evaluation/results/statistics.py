"""How sure a score is: the clustered bootstrap, standard errors, tests, and what a comparison could have seen at all.

Questions cut from one source, and adjacent windows of text, err together, so whole clusters are drawn with replacement
and summed (Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640). All statistics given to one call see the same
draws, so differences between them are paired.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
POWER = 0.80
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
    return ratio(scores, np.ones(len(scores)))


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


@dataclass(frozen=True)
class Interval:
    """A figure `mean` as observed, its 95 % bootstrap interval [low, high] and bootstrap standard error."""

    low: float
    high: float
    mean: float
    standard_error: float


def interval(observed: float, resampled: ArrayLike) -> Interval:
    """`observed` with the 95 % percentile bounds and the standard deviation of its replicates [draws]."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high), observed, float(np.std(resampled)))


def paired_bootstrap(a: Sums, b: Sums, cluster: ArrayLike, draws: int, seed: int) -> Interval:
    """Interval of a - b on the same questions of these clusters [n].

    Raises:
        ValueError: lengths differ, n is 0, or there is one cluster, from which nothing can be said.
    """
    resampled = replicates([a, b], cluster, draws, seed)
    return interval(a.value() - b.value(), resampled[0] - resampled[1])


def clustered_error(figure: Sums, cluster: ArrayLike) -> float:
    """Standard error of a mean or a ratio, linearised (Cochran 1977, chapter 6), questions of a cluster [n] together.

    Of a mean with every question its own cluster it is sqrt(p (1 - p) / n) (Miller 2024, eq. 4).
    """
    a, b = figure.columns
    return float(np.sqrt(np.square(cluster_sums(cluster, a - a.sum() / b.sum() * b)).sum()) / b.sum())


def smallest_detectable(standard_error: float) -> float:
    """The true difference that a two-sided 5 % test of this standard error finds in 80 % of samples: 2.80 of it."""
    from scipy import stats  # half a second, and scoring needs none of it

    return float((stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)) * standard_error)


def mcnemar_exact(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Two-sided p of "both are right equally often" from the questions [n] that one alone gets right (McNemar 1947)."""
    from scipy import stats

    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    only_a, discordant = int((a & ~b).sum()), int((a != b).sum())
    return float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0


def holm(p_values: ArrayLike) -> np.ndarray:
    """p-values [n] of n tests raised so that the chance of even one false alarm stays at the level (Holm 1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0)


def bootstrap_p(differences: ArrayLike) -> float:
    """Two-sided p of "no difference" from resampled differences [draws]: never 0, since draws are finite."""
    d = np.asarray(differences, dtype=np.float64)
    return float(min(1.0, 2 * (1 + min((d <= 0).sum(), (d >= 0).sum())) / (len(d) + 1)))


def welch_p(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided p of "equal means" from the figures of two arms' seeds (Welch 1947).

    Where neither arm varies it is 1 if they are equal, else 0.
    """
    from scipy import stats

    x, y = (np.asarray(figures, dtype=np.float64) for figures in (a, b))
    if np.ptp(x) == np.ptp(y) == 0:
        return float(x[0] == y[0])
    return float(stats.ttest_ind(x, y, equal_var=False).pvalue)


def seed_spread(values: ArrayLike, resampled: ArrayLike) -> dict[str, float]:
    """Part the luck of the seeds from the luck of the questions, of one arm trained with several seeds.

    Args:
        values: the figure of each seed [seeds], on the same questions.
        resampled: its replicates [seeds, draws], all seeds on the same draws.

    Returns:
        seeds; mean of the figure over them; seed_sd, between their figures on these very questions;
        seed_sd_beyond_items, what of it would be left with ever more questions, at least 0; item_se of `mean`, over the
        questions, the seeds held fixed; total_se of it, over both.

    Raises:
        ValueError: fewer than two seeds, which say nothing about their spread.
    """
    figures, draws = (np.asarray(array, dtype=np.float64) for array in (values, resampled))
    seeds = len(figures)
    if seeds < 2:
        raise ValueError("one seed alone says nothing about the spread between seeds")
    between = figures.var(ddof=1)
    # seeds that differ only in which questions they happen to get right move apart by this much
    by_questions = (draws - draws.mean(axis=0)).var(axis=1).sum() / (seeds - 1)
    item_variance = draws.mean(axis=0).var()
    beyond = max(0.0, between - by_questions)
    spread = {"mean": figures.mean(), "seed_sd": between**0.5, "seed_sd_beyond_items": beyond**0.5}
    spread |= {"item_se": item_variance**0.5, "total_se": (item_variance + beyond / seeds) ** 0.5}
    return {"seeds": seeds} | {name: float(value) for name, value in spread.items()}
