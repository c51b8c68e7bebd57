"""Adjusted p-values, clusters, non-inferiority and power: against scipy, closed forms, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from flashmem_bench import stats

RUNS = 2000
COVERS = (0.93, 0.97)
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(p_values)
def test_benjamini_hochberg_equals_scipy(values: list[float]) -> None:
    assert stats.benjamini_hochberg(values) == pytest.approx(reference.false_discovery_control(values))


def test_holm_on_an_example_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(p_values)
def test_holm_lies_between_the_raw_values_and_bonferroni(values: list[float]) -> None:
    adjusted = stats.holm(values)
    assert (adjusted >= np.asarray(values) - 1e-15).all()
    assert (adjusted <= np.minimum(1, np.asarray(values) * len(values)) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(values)]) >= 0).all()


@pytest.mark.parametrize("adjust", [stats.holm, stats.benjamini_hochberg])
def test_a_test_that_was_not_made_counts_for_nothing(adjust) -> None:
    adjusted = adjust([0.02, math.nan, 0.5])
    assert adjusted[[0, 2]] == pytest.approx(adjust([0.02, 0.5])) and math.isnan(adjusted[1])
    assert adjust([]).size == 0


def test_holm_bounds_the_chance_of_one_false_finding() -> None:
    drawn = np.random.default_rng(0).uniform(size=(RUNS, 8))
    assert np.mean([(stats.holm(row) < 0.05).any() for row in drawn]) < 0.065


def _answers(rng: np.random.Generator, n: int, p: float, discordant: float) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong answers of two equally good methods that differ on a share of the samples."""
    first = (rng.uniform(size=n) < p).astype(float)
    moved = rng.uniform(size=n)
    # Equal shares go up and down, so both keep the mean p.
    up, down = discordant / 2 / (1 - p), discordant / 2 / p
    return first, np.where(first == 1, (moved >= down).astype(float), (moved < up).astype(float))


@pytest.mark.parametrize("n", [5, 10, 29])
def test_ratios_of_few_runs_cover_as_often_as_they_say(n: int) -> None:
    rng = np.random.default_rng(n)
    found = [
        stats.geometric_mean_ratio(rng.lognormal(0.3, 0.1, size=n), rng.lognormal(0, 0.1, size=n)) for _ in range(RUNS)
    ]
    assert COVERS[0] < np.mean([not ratio.excludes(math.exp(0.3)) for ratio in found]) < COVERS[1]


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("n", [100, 400])
def test_intervals_cover_as_often_as_they_say(n: int, p: float) -> None:
    rng = np.random.default_rng([n, round(100 * p)])
    hits = {"score": 0, "difference": 0, "graded": 0}
    for _ in range(RUNS):
        first, second = _answers(rng, n, p, 0.2)
        hits["score"] += not stats.score_interval(first)[0].excludes(p)
        hits["difference"] += not stats.paired_difference(first, second, resamples=1000).excludes(0)
        graded = rng.beta(2 * p, 2 * (1 - p), size=n)
        hits["graded"] += not stats.mean_interval(graded, resamples=400).excludes(p)
    for name, count in hits.items():
        assert COVERS[0] <= count / RUNS <= COVERS[1], name


@pytest.mark.parametrize(("clusters", "size"), [(100, 5), (40, 10)])
def test_clustered_intervals_cover_where_plain_ones_do_not(clusters: int, size: int) -> None:
    rng = np.random.default_rng(clusters)
    labels = np.repeat(np.arange(clusters), size).tolist()
    covered = plain = 0
    for _ in range(RUNS):
        # Answers on one document agree: half of them take the document's own answer.
        own = np.repeat(rng.uniform(size=clusters) < 0.4, size)
        alone = rng.uniform(size=clusters * size) < 0.4
        scores = np.where(rng.uniform(size=clusters * size) < 0.5, own, alone).astype(float)
        covered += not stats.score_interval(scores, labels)[0].excludes(0.4)
        plain += not stats.score_interval(scores)[0].excludes(0.4)
    assert COVERS[0] <= covered / RUNS <= COVERS[1]
    assert plain / RUNS < COVERS[0]


def test_mcnemar_keeps_its_level_and_finds_what_power_promises() -> None:
    rng = np.random.default_rng(5)
    n, discordant = 600, 0.1
    false = np.mean([stats.paired_p(*_answers(rng, n, 0.5, discordant)) < 0.05 for _ in range(RUNS)])
    assert false <= 0.05 + 0.01
    difference = stats.minimum_detectable_difference(n, discordant)
    counts = rng.multinomial(n, [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant], RUNS)
    found = np.mean([stats.mcnemar_exact(int(fixed), int(broken)) < 0.05 for fixed, broken, _ in counts])
    assert found == pytest.approx(0.8, abs=0.05), "the exact test has a little less power than the formula"


def test_the_smallest_difference_and_the_samples_it_needs_are_inverse() -> None:
    for n in (50, 200, 1500):
        difference = stats.minimum_detectable_difference(n, 0.3)
        assert stats.samples_needed(difference, 0.3) == pytest.approx(n, rel=1e-6)
    assert stats.minimum_detectable_difference(3, 0.01) is None
    assert stats.samples_for_margin(0.02, 0.1) > stats.samples_for_margin(0.04, 0.1)
    for call in (
        lambda: stats.samples_needed(0.0, 0.1),
        lambda: stats.samples_needed(0.2, 0.1),
        lambda: stats.samples_for_margin(0.0, 0.1),
    ):
        with pytest.raises(ValueError, match="above 0"):
            call()


def test_without_shared_clusters_nothing_changes() -> None:
    rng = np.random.default_rng(2)
    first, second = _answers(rng, 80, 0.5, 0.4)
    alone = list(range(80))
    assert stats.score_interval(first, alone) == stats.score_interval(first)
    assert stats.paired_difference(first, second, alone) == stats.paired_bootstrap(first, second)
    assert stats.paired_p(first, second, alone) == stats.paired_p(first, second)


def test_the_order_and_the_names_of_clusters_do_not_matter() -> None:
    rng = np.random.default_rng(3)
    first, second = _answers(rng, 60, 0.5, 0.4)
    labels = [f"story {i // 3}" for i in range(60)]
    order = rng.permutation(60)
    again = [hash(labels[i]) for i in order]
    assert stats.paired_difference(first, second, labels) == pytest.approx(
        stats.paired_difference(first[order], second[order], again)
    )
    assert stats.paired_p(first, second, labels) == pytest.approx(stats.paired_p(first[order], second[order], again))


def test_clusters_of_copies_weigh_no_more_than_one_sample_each() -> None:
    rng = np.random.default_rng(4)
    once = rng.uniform(size=50)
    copies, labels = np.repeat(once, 4), np.repeat(np.arange(50), 4).tolist()
    whole, single = stats.clustered_standard_error(copies, labels), stats.clustered_standard_error(once, range(50))
    assert whole == pytest.approx(single)
    assert single == pytest.approx(reference.sem(once))


def test_one_cluster_has_no_interval() -> None:
    interval = stats.clustered_interval([0.0, 1.0], ["a", "a"])
    assert interval.estimate == 0.5 and math.isnan(interval.low)


def test_non_inferiority_by_hand() -> None:
    a, b = np.zeros(1000), np.zeros(1000)
    a[:10], b[10:20] = 1, 1
    result = stats.non_inferiority(a, b, 0.02)
    error = reference.sem(a - b)
    assert result.holds and result.difference.estimate == 0
    assert result.p_value == pytest.approx(reference.norm.sf(0.02 / error))
    assert not stats.non_inferiority(a, b, 0.005).holds
    assert stats.non_inferiority(a, a, 0.02).holds, "equal answers on enough samples"
    assert not stats.non_inferiority(a[:50], a[:50], 0.02).holds, "equal answers on too few"
    with pytest.raises(ValueError, match="at least 0"):
        stats.non_inferiority(a, b, -0.1)


def test_non_inferiority_keeps_its_level_at_the_margin() -> None:
    rng = np.random.default_rng(6)
    n, margin = 500, 0.05
    counts = rng.multinomial(n, [0.1, 0.1 + margin, 0.8 - margin], RUNS)
    wrong = 0
    for fixed, broken, same in counts:
        differences = np.repeat([1.0, -1.0, 0.0], [fixed, broken, same])
        wrong += stats.non_inferiority(differences, np.zeros(n), margin).holds
    assert 0.015 <= wrong / RUNS <= 0.035


def test_p_values_agree_with_scipy() -> None:
    rng = np.random.default_rng(7)
    first, second = _answers(rng, 200, 0.5, 0.3)
    up, down = int((first > second).sum()), int((first < second).sum())
    assert stats.paired_p(first, second) == pytest.approx(reference.binomtest(up, up + down).pvalue)
    graded = rng.uniform(size=(2, 30))
    assert stats.paired_p(*graded) == pytest.approx(reference.wilcoxon(graded[0], graded[1]).pvalue)
    pairs = np.repeat(np.arange(100), 2).tolist()
    means = (first - second).reshape(100, 2).mean(axis=1)
    assert stats.paired_p(first, second, pairs) == pytest.approx(reference.ttest_1samp(means, 0).pvalue)


def _runs(rng: np.random.Generator, means: list[float], n: int = 300) -> np.ndarray:
    return np.array([(rng.uniform(size=n) < mean).astype(float) for mean in means])


def test_seed_differences_draw_seeds_and_samples_together() -> None:
    rng = np.random.default_rng(8)
    near, far = _runs(rng, [0.5, 0.5, 0.5]), _runs(rng, [0.3, 0.5, 0.7])
    zero = np.zeros((1, 300))
    narrow, _ = stats.seed_difference(near, zero, paired=False)
    wide, p_value = stats.seed_difference(far, zero, paired=False)
    assert narrow.estimate == pytest.approx(near.mean()) and wide.estimate == pytest.approx(far.mean())
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    assert p_value < 0.001
    same = stats.seeds_and_samples(far, resamples=4000)
    assert wide == pytest.approx(same), "against nothing it is the same draw"


def test_paired_seeds_cancel_what_they_share() -> None:
    rng = np.random.default_rng(9)
    runs = _runs(rng, [0.2, 0.5, 0.8])
    changed = runs.copy()
    changed[:, :12] = 1.0
    together, _ = stats.seed_difference(changed, runs, paired=True)
    apart, _ = stats.seed_difference(changed, runs, paired=False)
    assert together.low > 0 and apart.low < 0
    equal, p_value = stats.seed_difference(runs, runs, paired=True)
    assert equal == (0.0, 0.0, 0.0) and p_value == 1.0


def test_seed_differences_know_clusters() -> None:
    rng = np.random.default_rng(10)
    documents = (rng.uniform(size=(2, 60)) < 0.5).astype(float)
    scores, labels = np.repeat(documents, 5, axis=1), np.repeat(np.arange(60), 5).tolist()
    zero = np.zeros((1, 300))
    clustered, _ = stats.seed_difference(scores, zero, labels, paired=False)
    single, _ = stats.seed_difference(documents, zero[:, :60], paired=False)
    assert (clustered.low, clustered.high) == pytest.approx((single.low, single.high), abs=0.02)
