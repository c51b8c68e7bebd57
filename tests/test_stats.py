"""Statistics against scipy, against closed forms, and as properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from flashmem_bench import stats

finite = st.floats(-1e3, 1e3, allow_nan=False)
positive = st.floats(1e-3, 1e3)


@given(st.integers(1, 400), st.data())
def test_wilson_equals_scipy(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    ours = stats.wilson_interval(successes, n)
    theirs = reference.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, abs=1e-9)
    assert 0 <= ours.low <= ours.estimate <= ours.high <= 1


def test_wilson_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = rng.binomial(60, 0.3, size=4000)
    covered = np.mean(
        [stats.wilson_interval(int(k), 60).low <= 0.3 <= stats.wilson_interval(int(k), 60).high for k in hits]
    )
    assert 0.93 < covered < 0.97


def test_intervals_of_nothing_are_nan() -> None:
    for interval in (
        stats.wilson_interval(0, 0),
        stats.mean_interval([]),
        stats.median_interval([]),
        stats.ratio_of_sums([], []),
        stats.paired_bootstrap([], []),
        stats.geometric_mean_ratio([], []),
    ):
        assert all(math.isnan(value) for value in interval)
        assert not interval.excludes(0)


def test_one_value_has_no_interval() -> None:
    for interval in (
        stats.mean_interval([0.5]),
        stats.median_interval([0.5] * 5),
        stats.ratio_of_sums([1], [2]),
        stats.geometric_mean_ratio([1], [2]),
    ):
        assert interval.estimate == pytest.approx(0.5)
        assert math.isnan(interval.low) and math.isnan(interval.high)
        assert not interval.excludes(0)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_equal_values_claim_no_certainty(n: int) -> None:
    unlike = stats.wilson_interval(0, n).high
    assert stats.paired_bootstrap([1.0] * n, [1.0] * n) == pytest.approx((0, -unlike, unlike))
    assert stats.paired_bootstrap([1] * n, [0] * n) == pytest.approx((1, 1 - 2 * unlike, 1))
    assert stats.score_interval([0.25] * n)[0] == pytest.approx((0.25, 0.25 * (1 - unlike), 0.25 + 0.75 * unlike))
    assert math.isnan(stats.score_interval([30.0] * n)[0].low)


def test_bootstrap_interval_agrees_with_scipy() -> None:
    data = np.random.default_rng(0).gamma(2.0, size=80)
    ours = stats.mean_interval(data, seed=3)
    theirs = reference.bootstrap(
        (data,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.03)
    assert ours.high == pytest.approx(theirs.high, abs=0.03)


@pytest.mark.parametrize("values", [np.random.default_rng(2).normal(size=200), np.repeat([0.0, 1.0], [70, 130])])
def test_bootstrap_standard_error_is_the_analytic_one(values: np.ndarray) -> None:
    analytic = values.std(ddof=0) / math.sqrt(len(values))
    assert stats.bootstrap_standard_error(values) == pytest.approx(analytic, rel=0.05)


def test_multinomial_shortcut_has_the_same_distribution() -> None:
    values = np.repeat([-1.0, 0.0, 1.0], [5, 60, 15])[:, None]
    quick = stats.bootstrap_means(values, seed=0)[:, 0]
    nearly = values + np.linspace(0, 1e-9, len(values))[:, None]
    slow = stats.bootstrap_means(nearly, seed=0)[:, 0]
    assert quick.mean() == pytest.approx(slow.mean(), abs=0.005)
    assert quick.std() == pytest.approx(slow.std(), rel=0.05)


@given(st.lists(finite, min_size=2, max_size=40), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_mean_interval_is_seeded_and_holds_its_mean(values: list[float], seed: int) -> None:
    once = stats.mean_interval(values, seed=seed, resamples=500)
    again = stats.mean_interval(values, seed=seed, resamples=500)
    assert once == again
    assert min(values) - 1e-6 <= once.low <= once.high <= max(values) + 1e-6
    assert once.estimate == pytest.approx(np.mean(values), abs=1e-6)


def test_score_interval_chooses_its_method() -> None:
    assert stats.score_interval([0, 1, 1])[1] == "wilson"
    interval, name = stats.score_interval([0, 0.5, 1])
    assert (interval.estimate, name) == (0.5, "bootstrap")


def test_clustered_error_with_single_samples_is_the_usual_one() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert stats.clustered_standard_error(values, range(50)) == pytest.approx(reference.sem(values))


@given(st.lists(finite, min_size=2, max_size=20), st.integers(2, 6))
def test_repeating_every_sample_adds_no_certainty(values: list[float], times: int) -> None:
    repeated = np.repeat(values, times)
    labels = np.repeat(np.arange(len(values)), times).tolist()
    clustered = stats.clustered_standard_error(repeated, labels)
    assert clustered == pytest.approx(float(reference.sem(values)), rel=1e-6, abs=1e-6)


def test_one_cluster_has_no_error() -> None:
    assert math.isnan(stats.clustered_standard_error([1.0, 2.0], ["a", "a"]))


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_the_doubled_binomial_tail(fixed: int, broken: int) -> None:
    tail = reference.binom.cdf(min(fixed, broken), fixed + broken, 0.5)
    assert stats.mcnemar_exact(fixed, broken) == pytest.approx(min(1.0, 2 * tail))
    assert stats.mcnemar_exact(fixed, broken) == pytest.approx(stats.mcnemar_exact(broken, fixed))


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=2, max_size=60))
@settings(max_examples=30, deadline=None)
def test_paired_difference_changes_sign_with_its_order(pairs: list[tuple[int, int]]) -> None:
    a, b = zip(*pairs, strict=True)
    forward, backward = stats.paired_bootstrap(a, b), stats.paired_bootstrap(b, a)
    assert forward.estimate == pytest.approx(-backward.estimate)
    assert forward.low == pytest.approx(-backward.high, abs=1.5 / len(pairs))
    assert forward.low <= forward.estimate + 1e-9 and forward.estimate <= forward.high + 1e-9


def test_wilcoxon_leaves_ties_out() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, size=30), rng.normal(size=30)
    theirs = reference.wilcoxon(a - b).pvalue
    assert stats.wilcoxon_p(np.append(a, [1, 1]), np.append(b, [1, 1])) == pytest.approx(theirs)
    assert stats.wilcoxon_p([1, 1], [1, 1]) == 1


def test_pairing_is_sharper_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    b = rng.integers(0, 2, size=300).astype(float)
    a = b.copy()
    a[np.flatnonzero(b == 0)[:12]] = 1
    difference = stats.paired_bootstrap(a, b)
    assert difference.excludes(0)
    assert stats.score_interval(a)[0].low < stats.score_interval(b)[0].high


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="equal lengths, not 1 and 2"):
        stats.paired_bootstrap([1], [1, 2])


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_ratio_inverts(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    forward, backward = stats.geometric_mean_ratio(a, b), stats.geometric_mean_ratio(b, a)
    assert forward.estimate == pytest.approx(1 / backward.estimate)
    assert forward.estimate == pytest.approx(reference.gmean(np.array(a) / np.array(b)))


def test_ratio_ignores_pairs_without_one() -> None:
    assert stats.geometric_mean_ratio([2, 0, 3], [1, 1, 0]).estimate == pytest.approx(2)


def test_ratio_of_sums_of_a_constant_is_exact() -> None:
    interval = stats.ratio_of_sums([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert interval == pytest.approx((2, 2, 2))


@given(st.lists(finite, min_size=6, max_size=60))
def test_median_interval_holds_the_median(values: list[float]) -> None:
    interval = stats.median_interval(values)
    assert interval.low <= interval.estimate <= interval.high
    assert interval.estimate == np.median(values)


def test_median_interval_covers() -> None:
    rng = np.random.default_rng(0)
    draws = rng.exponential(size=(2000, 41))
    covered = [stats.median_interval(row).low <= math.log(2) <= stats.median_interval(row).high for row in draws]
    assert 0.94 < np.mean(covered) < 0.985


@pytest.mark.parametrize(
    ("n", "q", "known"),
    [(10, 50, True), (10, 95, True), (499, 99, False), (500, 99, True), (10_000, 99.9, False)],
)
def test_percentile_guard(n: int, q: float, known: bool) -> None:
    values = np.arange(n)
    result = stats.percentile(values, q)
    assert (result is not None) == known
    assert result is None or result == pytest.approx(np.percentile(values, q))


def test_percentile_of_nothing() -> None:
    assert stats.percentile([], 50) is None
