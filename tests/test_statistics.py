"""Error bars hold what they promise: against known values, by property, and by simulated coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from microlm.evaluation.statistics import (
    clustered_standard_error,
    mcnemar_exact,
    paired_bootstrap,
    paired_ratio_bootstrap,
    smallest_detectable,
    standard_error,
)

DRAWS = 400
paired_scores = st.integers(0, 2**31).map(lambda seed: _paired(seed))


def _paired(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two models' answers to 10 to 60 questions from at least two sources, one cluster for a handful of questions."""
    random = np.random.default_rng(seed)
    n = int(random.integers(10, 60))
    return random.random(n) < random.random(), random.random(n) < random.random(), np.arange(n) // random.integers(1, 4)


def test_standard_error_is_the_binomial_one() -> None:
    correct = [True] * 30 + [False] * 70
    assert standard_error(correct) == pytest.approx(math.sqrt(0.3 * 0.7 / 100))
    assert standard_error([True] * 5) == 0


def test_standard_error_of_the_full_set_is_as_published() -> None:
    # lm-eval prints 0.0045 to 0.0046 for Pythia-160M, acc_norm about 0.30, on the 10,042 questions
    assert standard_error(np.arange(10_042) < 0.30 * 10_042) == pytest.approx(0.0046, abs=5e-5)


def test_clustered_error_of_single_question_clusters_is_the_plain_one() -> None:
    correct = np.random.default_rng(0).random(500) < 0.4
    assert clustered_standard_error(correct, np.arange(500)) == pytest.approx(standard_error(correct))


def test_clustered_error_counts_copies_of_a_question_once() -> None:
    correct = np.random.default_rng(1).random(200) < 0.4
    copies, cluster = np.repeat(correct, 3), np.repeat(np.arange(200), 3)
    assert clustered_standard_error(copies, cluster) == pytest.approx(standard_error(correct))


def test_clustered_error_matches_the_pairwise_sum_of_its_definition() -> None:
    random = np.random.default_rng(2)
    correct, cluster = random.random(60) < 0.5, random.integers(0, 25, 60)
    residual = correct - correct.mean()
    together = sum(residual[i] * residual[j] for i in range(60) for j in range(60) if cluster[i] == cluster[j])
    assert clustered_standard_error(correct, cluster) == pytest.approx(math.sqrt(together) / 60)


@settings(max_examples=40, deadline=None)
@given(paired_scores)
def test_interval_holds_the_observed_difference(scores: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    a, b, cluster = scores
    interval = paired_bootstrap(a, b, cluster, DRAWS, seed=0)
    assert interval.mean == pytest.approx(a.mean() - b.mean())
    assert interval.low <= interval.mean + 1e-12 and interval.mean <= interval.high + 1e-12


@settings(max_examples=40, deadline=None)
@given(paired_scores)
def test_swapping_the_models_mirrors_the_interval(scores: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    a, b, cluster = scores
    forth, back = (paired_bootstrap(*pair, cluster, DRAWS, seed=7) for pair in ((a, b), (b, a)))
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
        paired_bootstrap(a, a, cluster, DRAWS, seed=0),
        paired_ratio_bootstrap((a, sizes), (a, sizes), cluster, DRAWS, seed=0),
    ):
        assert (interval.low, interval.mean, interval.high, interval.standard_error) == (0, 0, 0, 0)


@settings(max_examples=40, deadline=None)
@given(paired_scores, st.floats(0.1, 100))
def test_a_ratio_over_equal_sizes_is_a_mean(scores: tuple[np.ndarray, np.ndarray, np.ndarray], size: float) -> None:
    a, b, cluster = scores
    sizes = np.full(len(a), size)
    mean = paired_bootstrap(a, b, cluster, DRAWS, seed=3)
    ratio = paired_ratio_bootstrap((a * size, sizes), (b * size, sizes), cluster, DRAWS, seed=3)
    assert (ratio.low, ratio.mean, ratio.high) == pytest.approx((mean.low, mean.mean, mean.high), abs=1e-9)


def test_bootstrap_error_is_the_analytic_one_of_a_paired_mean() -> None:
    random = np.random.default_rng(4)
    a, b = random.random(1000) < 0.32, random.random(1000) < 0.28
    analytic = np.std(a.astype(float) - b) / math.sqrt(1000)
    assert paired_bootstrap(a, b, np.arange(1000), 10_000, seed=0).standard_error == pytest.approx(analytic, rel=0.03)


def test_bootstrap_resamples_clusters_not_questions() -> None:
    random = np.random.default_rng(5)
    a, b = random.random(300) < 0.5, random.random(300) < 0.5
    alone = paired_bootstrap(a, b, np.arange(300), 4000, seed=0)
    copied = paired_bootstrap(*(np.repeat(x, 4) for x in (a, b, np.arange(300))), 4000, seed=0)
    assert copied.standard_error == pytest.approx(alone.standard_error)


def test_interval_is_the_same_however_the_draws_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, cluster = _paired(11)
    whole = paired_bootstrap(a, b, cluster, 1000, seed=5)
    monkeypatch.setattr("microlm.evaluation.statistics.DRAWN_AT_ONCE", 64)
    assert paired_bootstrap(a, b, cluster, 1000, seed=5) == whole


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    random = np.random.default_rng(6)
    covered, trials, clusters = 0, 300, 100
    for trial in range(trials):
        # a source's own ease is shared by its three questions; the true difference is 0.1
        ease = np.repeat(random.normal(0, 0.3, clusters), 3)
        a, b = 0.1 + ease + random.normal(0, 1, 300), random.normal(0, 1, 300)
        interval = paired_bootstrap(a, b, np.repeat(np.arange(clusters), 3), 500, seed=trial)
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
        paired_bootstrap(a, b, cluster, DRAWS, seed=0)
