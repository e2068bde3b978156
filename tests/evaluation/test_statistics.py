"""Error bars hold what they promise: against known values, by property, and by simulated coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy import stats

from microlm.evaluation.results.statistics import (
    RankCorrelation,
    bootstrap_p,
    clustered_error,
    f1,
    holm,
    mcnemar_exact,
    mean,
    paired_bootstrap,
    pearson,
    ratio,
    replicates,
    seed_spread,
    smallest_detectable,
    welch_p,
)

DRAWS = 400
paired_scores = st.integers(0, 2**31).map(lambda seed: _paired(seed))


def _paired(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two models' answers to 10 to 60 questions from at least two sources, one cluster for a handful of questions."""
    random = np.random.default_rng(seed)
    n = int(random.integers(10, 60))
    return random.random(n) < random.random(), random.random(n) < random.random(), np.arange(n) // random.integers(1, 4)


def single(correct: ArrayLike) -> float:
    """The error where every question is its own cluster."""
    return clustered_error(mean(correct), np.arange(len(correct)))


def test_standard_error_is_the_binomial_one() -> None:
    correct = [True] * 30 + [False] * 70
    assert single(correct) == pytest.approx(math.sqrt(0.3 * 0.7 / 100))
    assert single([True] * 5) == 0


def test_standard_error_of_the_full_set_is_as_published() -> None:
    # lm-eval prints 0.0045 to 0.0046 for Pythia-160M, acc_norm about 0.30, on the 10,042 questions
    assert single(np.arange(10_042) < 0.30 * 10_042) == pytest.approx(0.0046, abs=5e-5)


def test_clustered_error_of_single_question_clusters_is_the_plain_one() -> None:
    correct = np.random.default_rng(0).random(500) < 0.4
    assert single(correct) == pytest.approx(math.sqrt(correct.mean() * (1 - correct.mean()) / 500))


def test_clustered_error_counts_copies_of_a_question_once() -> None:
    correct = np.random.default_rng(1).random(200) < 0.4
    copies, cluster = np.repeat(correct, 3), np.repeat(np.arange(200), 3)
    assert clustered_error(mean(copies), cluster) == pytest.approx(single(correct))


def test_clustered_error_matches_the_pairwise_sum_of_its_definition() -> None:
    random = np.random.default_rng(2)
    correct, cluster = random.random(60) < 0.5, random.integers(0, 25, 60)
    residual = correct - correct.mean()
    together = sum(residual[i] * residual[j] for i in range(60) for j in range(60) if cluster[i] == cluster[j])
    assert clustered_error(mean(correct), cluster) == pytest.approx(math.sqrt(together) / 60)


@settings(max_examples=40, deadline=None)
@given(paired_scores)
def test_interval_holds_the_observed_difference(scores: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    a, b, cluster = scores
    interval = paired_bootstrap(mean(a), mean(b), cluster, DRAWS, seed=0)
    assert interval.mean == pytest.approx(a.mean() - b.mean())
    assert interval.low <= interval.mean + 1e-12 and interval.mean <= interval.high + 1e-12


@settings(max_examples=40, deadline=None)
@given(paired_scores)
def test_swapping_the_models_mirrors_the_interval(scores: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    a, b, cluster = scores
    forth, back = (paired_bootstrap(*map(mean, pair), cluster, DRAWS, seed=7) for pair in ((a, b), (b, a)))
    assert (back.low, back.mean, back.high) == pytest.approx((-forth.high, -forth.mean, -forth.low))
    assert back.standard_error == pytest.approx(forth.standard_error)


@settings(max_examples=40, deadline=None)
@given(paired_scores)
def test_a_model_against_itself_has_a_zero_interval_of_no_width(
    scores: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    a, b, cluster = scores
    sizes = 1.0 + b
    for interval in (
        paired_bootstrap(mean(a), mean(a), cluster, DRAWS, seed=0),
        paired_bootstrap(ratio(a, sizes), ratio(a, sizes), cluster, DRAWS, seed=0),
    ):
        assert (interval.low, interval.mean, interval.high, interval.standard_error) == (0, 0, 0, 0)


@settings(max_examples=40, deadline=None)
@given(paired_scores, st.floats(0.1, 100))
def test_a_ratio_over_equal_sizes_is_a_mean(scores: tuple[np.ndarray, np.ndarray, np.ndarray], size: float) -> None:
    a, b, cluster = scores
    sizes = np.full(len(a), size)
    of_means = paired_bootstrap(mean(a), mean(b), cluster, DRAWS, seed=3)
    found = paired_bootstrap(ratio(a * size, sizes), ratio(b * size, sizes), cluster, DRAWS, seed=3)
    assert (found.low, found.mean, found.high) == pytest.approx((of_means.low, of_means.mean, of_means.high), abs=1e-9)


def test_bootstrap_error_is_the_analytic_one_of_a_paired_mean() -> None:
    random = np.random.default_rng(4)
    a, b = random.random(1000) < 0.32, random.random(1000) < 0.28
    analytic = np.std(a.astype(float) - b) / math.sqrt(1000)
    assert paired_bootstrap(mean(a), mean(b), np.arange(1000), 10_000, seed=0).standard_error == pytest.approx(
        analytic, rel=0.03
    )


def test_bootstrap_resamples_clusters_not_questions() -> None:
    random = np.random.default_rng(5)
    a, b = random.random(300) < 0.5, random.random(300) < 0.5
    alone = paired_bootstrap(mean(a), mean(b), np.arange(300), 4000, seed=0)
    copied = paired_bootstrap(*(mean(np.repeat(x, 4)) for x in (a, b)), np.repeat(np.arange(300), 4), 4000, seed=0)
    assert copied.standard_error == pytest.approx(alone.standard_error)


def test_interval_is_the_same_however_the_draws_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, cluster = _paired(11)
    whole = paired_bootstrap(mean(a), mean(b), cluster, 1000, seed=5)
    monkeypatch.setattr("microlm.evaluation.results.statistics.DRAWN_AT_ONCE", 64)
    assert paired_bootstrap(mean(a), mean(b), cluster, 1000, seed=5) == whole


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    random = np.random.default_rng(6)
    covered, trials, clusters = 0, 300, 100
    for trial in range(trials):
        # a source's own ease is shared by its three questions; the true difference is 0.1
        ease = np.repeat(random.normal(0, 0.3, clusters), 3)
        a, b = 0.1 + ease + random.normal(0, 1, 300), random.normal(0, 1, 300)
        interval = paired_bootstrap(mean(a), mean(b), np.repeat(np.arange(clusters), 3), 500, seed=trial)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.91 <= covered / trials <= 0.98


def test_smallest_detectable_difference_is_found_four_times_in_five() -> None:
    assert smallest_detectable(1.0) == pytest.approx(2.8016, abs=1e-4)
    effect = smallest_detectable(0.5)
    power = stats.norm.sf(stats.norm.ppf(0.975) - effect / 0.5)
    assert power == pytest.approx(0.80, abs=1e-6)


@pytest.mark.parametrize(("only_a", "only_b", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (1, 9, 22 / 1024)])
def test_mcnemar_is_the_exact_binomial_test_of_the_disagreements(only_a: int, only_b: int, p: float) -> None:
    a = [True] * only_a + [False] * only_b + [True, False]
    b = [False] * only_a + [True] * only_b + [True, False]
    assert mcnemar_exact(a, b) == pytest.approx(p)


@pytest.mark.parametrize(
    ("a", "b", "cluster"), [([1, 0], [1, 0], [0, 0]), ([1, 0], [1], [0, 1]), ([], [], []), ([1, 0], [1, 0], [0])]
)
def test_what_gives_no_interval_is_refused(a: list[int], b: list[int], cluster: list[int]) -> None:
    with pytest.raises(ValueError):
        paired_bootstrap(mean(a), mean(b), cluster, DRAWS, seed=0)


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # sorted: 4 x .005, 3 x .01, 2 x .03, then no less
        ([0.2], [0.2]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([], []),
    ],
)
def test_holm_is_as_worked_by_hand(p: list[float], adjusted: list[float]) -> None:
    assert holm(p).tolist() == pytest.approx(adjusted)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p: list[float]) -> None:
    adjusted, p = holm(p), np.array(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(1, p * len(p)) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_bootstrap_p_is_that_of_the_normal_distribution_and_never_0() -> None:
    random = np.random.default_rng(0)
    assert bootstrap_p(random.normal(1.5, 1, 40_000)) == pytest.approx(2 * stats.norm.sf(1.5), rel=0.05)
    assert bootstrap_p(-np.ones(999)) == 2 / 1000
    assert bootstrap_p(np.zeros(100)) == 1


def _correlated(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=n)
    return x, np.round(x + random.normal(0, 0.7, n), 1)


STATISTICS = {
    "mean": lambda x, y: mean(x > 0),
    "ratio": lambda x, y: ratio(np.abs(x), 1 + np.abs(y)),
    "f1": lambda x, y: f1(x > 0, y > 0, [1]),
    "macro f1": lambda x, y: f1(np.digitize(x, [-1, 1]), np.digitize(y, [-1, 1]), range(3)),
    "pearson": pearson,
    "matthews": lambda x, y: pearson(x > 0, y > 0),
    "spearman": RankCorrelation,
}


@pytest.mark.parametrize("name", STATISTICS)
def test_a_weight_is_a_number_of_copies(name: str) -> None:
    x, y = _correlated(40, seed=1)
    weights = np.random.default_rng(2).multinomial(40, np.full(40, 1 / 40), size=5)
    copied = [STATISTICS[name](np.repeat(x, row), np.repeat(y, row)).value() for row in weights]
    assert STATISTICS[name](x, y).weighted(weights.astype(float)).tolist() == pytest.approx(copied)


def test_rank_correlation_is_that_of_scipy_with_ties() -> None:
    x, y = _correlated(200, seed=2)
    assert RankCorrelation(x, y).value() == pytest.approx(stats.spearmanr(x, y).statistic)
    assert RankCorrelation(x, np.ones(200)).value() == 0


@pytest.mark.parametrize("name", ["mean", "ratio", "pearson", "spearman"])
def test_bootstrap_errors_are_the_spread_of_fresh_samples(name: str) -> None:
    samples = [STATISTICS[name](*_correlated(300, seed)).value() for seed in range(300)]
    errors = [replicates([STATISTICS[name](*_correlated(300, s))], np.arange(300), 400, 0).std() for s in range(10)]
    assert np.mean(errors) == pytest.approx(np.std(samples), rel=0.15)


@pytest.mark.parametrize("name", [name for name in STATISTICS if name != "spearman"])
def test_merging_clusters_of_one_kind_changes_no_distribution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (np.sign(values) for values in _correlated(1000, seed=3))  # four kinds of question
    merged = replicates([STATISTICS[name](x, y)], np.arange(1000), 4000, seed=0)[0]
    monkeypatch.setattr("microlm.evaluation.results.statistics.CLUSTERS_A_KIND", 10**9)
    one_by_one = replicates([STATISTICS[name](x, y)], np.arange(1000), 4000, seed=0)[0]
    assert (merged != one_by_one).any()
    assert merged.std() == pytest.approx(one_by_one.std(), rel=0.08)
    assert np.quantile(merged, [0.1, 0.9]) == pytest.approx(np.quantile(one_by_one, [0.1, 0.9]), abs=0.1 * merged.std())


def test_ratio_error_is_that_of_its_bootstrap_with_clusters() -> None:
    random = np.random.default_rng(7)
    size = random.integers(1, 30, 2000).astype(float)
    total = size * (1 + np.repeat(random.normal(0, 0.2, 400), 5) + random.normal(0, 0.2, 2000))
    cluster = np.repeat(np.arange(400), 5)
    (resampled,) = replicates([ratio(total, size)], cluster, 4000, 0)
    assert clustered_error(ratio(total, size), cluster) == pytest.approx(resampled.std(), rel=0.05)
    assert clustered_error(ratio(total, size), np.arange(2000)) < 0.8 * resampled.std()


def _seeds(random: np.random.Generator, arm_sd: float, seeds: int, n: int) -> dict[str, float]:
    """Seeds whose true skill spreads by `arm_sd`, on questions that spread by 1, with a luck of each pair of 0.5."""
    questions, skill = random.normal(0, 1, n), random.normal(0, arm_sd, (seeds, 1))
    scores = questions + skill + random.normal(0, 0.5, (seeds, n))
    statistics = [mean(row) for row in scores]
    return seed_spread([one.value() for one in statistics], replicates(statistics, np.arange(n), 200, seed=0))


def test_the_luck_of_seeds_is_told_from_that_of_questions() -> None:
    random = np.random.default_rng(8)
    spreads = [_seeds(random, 0.1, seeds=6, n=100) for _ in range(60)]
    mean_square = {key: np.mean([s[key] ** 2 for s in spreads]) for key in spreads[0]}
    assert mean_square["seed_sd"] == pytest.approx(0.1**2 + 0.5**2 / 100, rel=0.2)
    assert mean_square["seed_sd_beyond_items"] == pytest.approx(0.1**2, rel=0.25)
    assert mean_square["item_se"] == pytest.approx(1 / 100 + 0.5**2 / 600, rel=0.2)
    assert np.var([s["mean"] for s in spreads]) == pytest.approx(mean_square["total_se"], rel=0.5)


def test_seeds_that_answer_alike_have_no_spread() -> None:
    spread = _seeds(np.random.default_rng(9), 0.0, seeds=4, n=2000)
    assert spread["seed_sd_beyond_items"] < 0.5 * 0.5 / math.sqrt(2000) * 2
    scores = mean(np.arange(50) % 3 == 0)
    same = seed_spread([scores.value()] * 3, replicates([scores] * 3, np.arange(50), 300, 0))
    assert (same["seed_sd"], same["seed_sd_beyond_items"]) == (0, 0) and same["item_se"] > 0
    with pytest.raises(ValueError, match="one seed"):
        seed_spread([0.3], np.ones((1, 5)))


def test_welch_is_scipy_s_and_defined_without_spread() -> None:
    assert welch_p([1.0, 2.0, 4.0], [5.0, 5.5]) == pytest.approx(
        stats.ttest_ind([1.0, 2.0, 4.0], [5.0, 5.5], equal_var=False).pvalue
    )
    assert welch_p([1, 1], [1, 1]) == 1 and welch_p([1, 1], [2, 2]) == 0
