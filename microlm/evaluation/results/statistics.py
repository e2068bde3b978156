"""How sure a score is: standard errors, paired intervals, and what a comparison could have seen at all.

Questions cut from one source, and adjacent windows of text, err together, so whole clusters are resampled and summed
(Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from microlm.evaluation.results.resampling import Sums, cluster_sums, combined, mean, ratio, replicates

CONFIDENCE = 0.95
POWER = 0.80


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
    return float(np.sqrt(np.square(cluster_sums(cluster, scores - scores.mean())).sum()) / len(scores))


def paired_bootstrap(a: ArrayLike, b: ArrayLike, cluster: ArrayLike, draws: int, seed: int) -> Interval:
    """Interval of mean(a) - mean(b), paired by question: a, b, cluster are [n].

    Clusters are drawn with replacement, each keeping its size, and the percentiles of the differences are the bounds.

    Raises:
        ValueError: lengths differ, n is 0, or there is one cluster, from which nothing can be said.
    """
    return _difference_interval(mean(_vector(a)), mean(_vector(b)), cluster, draws, seed)


def paired_ratio_bootstrap(
    a: tuple[ArrayLike, ArrayLike], b: tuple[ArrayLike, ArrayLike], cluster: ArrayLike, draws: int, seed: int
) -> Interval:
    """Interval of sum(a0)/sum(a1) - sum(b0)/sum(b1), e.g. of nats over bytes, paired by window: each array is [n].

    Raises:
        ValueError: as `paired_bootstrap`.
    """
    return _difference_interval(ratio(*map(_vector, a)), ratio(*map(_vector, b)), cluster, draws, seed)


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
    d = _vector(differences)
    return float(min(1.0, 2 * (1 + min((d <= 0).sum(), (d >= 0).sum())) / (len(d) + 1)))


def welch_p(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided p of "equal means" from the figures of two arms' seeds (Welch 1947).

    Where neither arm varies it is 1 if they are equal, else 0.
    """
    from scipy import stats

    x, y = _vector(a), _vector(b)
    if np.ptp(x) == np.ptp(y) == 0:
        return float(x[0] == y[0])
    return float(stats.ttest_ind(x, y, equal_var=False).pvalue)


def clustered_ratio_error(numerator: ArrayLike, denominator: ArrayLike, cluster: ArrayLike) -> float:
    """Clustered standard error of sum(numerator) / sum(denominator), each [n], linearised (Cochran 1977, chapter 6)."""
    a, b = _vector(numerator), _vector(denominator)
    return float(np.sqrt(np.square(cluster_sums(cluster, a - a.sum() / b.sum() * b)).sum()) / b.sum())


def interval(observed: float, resampled: ArrayLike) -> Interval:
    """`observed` with the 95 % percentile bounds and the standard deviation of its replicates [draws]."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high), observed, float(np.std(resampled)))


@dataclass(frozen=True)
class SeedSpread:
    """One arm trained with several seeds, scored on the same questions.

    Attributes:
        mean: of the figure over the seeds.
        seed_sd: between the seeds' figures on these very questions.
        seed_sd_beyond_items: what of it would be left with ever more questions; at least 0.
        item_se: of `mean`, over the questions, the seeds held fixed.
        total_se: of `mean`, over both.
    """

    seeds: int
    mean: float
    seed_sd: float
    seed_sd_beyond_items: float
    item_se: float
    total_se: float


def seed_spread(values: ArrayLike, resampled: ArrayLike) -> SeedSpread:
    """Part the luck of the seeds from the luck of the questions.

    Args:
        values: the figure of each seed [seeds].
        resampled: its replicates [seeds, draws], all seeds on the same draws.

    Raises:
        ValueError: fewer than two seeds, which say nothing about their spread.
    """
    figures, draws = _vector(values), np.asarray(resampled, dtype=np.float64)
    seeds = len(figures)
    if seeds < 2:
        raise ValueError("one seed alone says nothing about the spread between seeds")
    between = figures.var(ddof=1)
    # seeds that differ only in which questions they happen to get right move apart by this much
    by_questions = (draws - draws.mean(axis=0)).var(axis=1).sum() / (seeds - 1)
    item_variance = draws.mean(axis=0).var()
    beyond = max(0.0, between - by_questions)
    spread = (between**0.5, beyond**0.5, item_variance**0.5, (item_variance + beyond / seeds) ** 0.5)
    return SeedSpread(seeds, float(figures.mean()), *map(float, spread))


def _vector(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores must be a list of at least one number, not of shape {values.shape}")
    return values


def _difference_interval(a: Sums, b: Sums, cluster: ArrayLike, draws: int, seed: int) -> Interval:
    difference = combined((a, b), (1, -1))
    (resampled,) = replicates([difference], cluster, draws, seed)
    return interval(difference.value(), resampled)
