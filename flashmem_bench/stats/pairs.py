"""Two methods on the same samples: differences of scores, tests on the samples that changed sides, ratios of times."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from flashmem_bench.stats.intervals import (
    RESAMPLES,
    Interval,
    as_pairs,
    clustered_interval,
    clustered_standard_error,
    constant_interval,
    mean_interval,
    percentile_interval,
    share_clusters,
    student_interval,
)

# From this many pairs on a bootstrap of a mean is as good as Student's interval, and asks for no shape.
FEW_PAIRS = 30


class NonInferiority(NamedTuple):
    """Whether one method is no worse than another by more than a margin.

    Attributes:
        difference: mean of a - b, with the two-sided interval whose lower end decides.
        margin: how much worse still counts as no worse.
        p_value: one-sided, against a difference of exactly -margin; nan where all differences are equal.
        holds: the lower end lies above -margin.
    """

    difference: Interval
    margin: float
    p_value: float
    holds: bool


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> Interval:
    """Mean of ``a - b`` over pairs: a bootstrap, or the clustered standard error where samples share a cluster."""
    first, second = as_pairs(a, b)
    differences = first - second
    if share_clusters(clusters) and not (differences == differences[0]).all():
        return clustered_interval(differences, clusters or (), confidence)
    return paired_bootstrap(first, second, seed=seed, resamples=resamples, confidence=confidence)


def paired_p(a: ArrayLike, b: ArrayLike, clusters: Sequence[Hashable] | None = None) -> float:
    """Two-sided p-value that two methods score alike.

    Exact McNemar where all scores are 0 or 1, Wilcoxon's signed ranks for graded ones; where samples share a cluster,
    Student's t on the clustered standard error.
    """
    first, second = as_pairs(a, b)
    differences = first - second
    if not differences.any():
        return 1.0
    if share_clusters(clusters):
        error, freedom = clustered_standard_error(differences, clusters or ()), len(set(clusters or ())) - 1
        return float(2 * scipy_stats.t.sf(abs(differences.mean()) / error, freedom)) if error else math.nan
    if np.isin([first, second], (0.0, 1.0)).all():
        return mcnemar_exact(int((differences > 0).sum()), int((differences < 0).sum()))
    return wilcoxon_p(first, second)


def non_inferiority(
    a: ArrayLike, b: ArrayLike, margin: float, clusters: Sequence[Hashable] | None = None, *, seed: int = 0
) -> NonInferiority:
    """Test that ``a`` is no worse than ``b`` by more than a margin that was fixed before the run.

    It holds when the lower end of the two-sided 95 % interval of ``a - b`` lies above ``-margin``: a one-sided test at
    2.5 %.

    Args:
        a: [n] scores of the method that is to be no worse.
        b: [n] scores of the other on the same samples.
        margin: in units of the score, at least 0.
        clusters: [n] labels of what samples may share.
        seed: seed of the resampling.

    Raises:
        ValueError: the margin is negative, or the lengths differ.
    """
    if margin < 0:
        raise ValueError(f"a margin is at least 0, not {margin:g}")
    first, second = as_pairs(a, b)
    difference = paired_difference(first, second, clusters, seed=seed)
    labels = clusters if share_clusters(clusters) else range(first.size)
    error = clustered_standard_error(first - second, labels or ()) if first.size else math.nan
    p_value = float(scipy_stats.norm.sf((difference.estimate + margin) / error)) if error > 0 else math.nan
    return NonInferiority(difference, margin, p_value, difference.low > -margin)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = 0.95
) -> Interval:
    """Mean of ``a - b`` over pairs with a percentile bootstrap interval.

    Where every pair has the same difference a bootstrap would claim certainty; the interval then allows for the
    share of unlike samples that n like ones cannot rule out.

    Args:
        a: [n] scores of one method, in [0, 1].
        b: [n] scores of the other on the same samples, in the same order.
        seed: seed of the resampling.
        resamples: number of replicates.
        confidence: two-sided level.

    Raises:
        ValueError: the lengths differ.
    """
    first, second = as_pairs(a, b)
    differences = first - second
    if differences.size and (differences == differences[0]).all():
        return constant_interval(differences, -1.0, 1.0, confidence)
    return mean_interval(differences, seed=seed, resamples=resamples, confidence=confidence)


def seeds_and_samples(
    scores: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Mean over training seeds and samples, with a percentile bootstrap that draws both together.

    Each replicate draws seeds and, for all of them alike, samples or whole clusters of them: the runs answered the same
    questions.

    Args:
        scores: [r, n], one row a training seed, one column a sample.
        clusters: [n] labels of what samples may share; None: all are independent.
        seed: of the resampling.
        resamples: number of replicates.
        confidence: two-sided level.
    """
    data = np.asarray(scores, dtype=np.float64)
    rng = np.random.default_rng(seed)
    member, sizes, weights = _drawn_clusters(data.shape[1], clusters, rng, resamples)
    means = _weighted_means(data, member, sizes, weights)
    drawn = rng.integers(0, len(data), (resamples, len(data)))
    replicates = means[np.arange(resamples)[:, None], drawn].mean(axis=1)
    return percentile_interval(float(data.mean()), replicates, confidence)


def seed_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    paired: bool,
    seed: int = 0,
    resamples: int = 4000,
    confidence: float = 0.95,
) -> tuple[Interval, float]:
    """Mean of ``a - b`` over training seeds and samples, drawn together, and its two-sided bootstrap p-value.

    Samples, or whole clusters of them, are drawn once for all runs of a replicate; seeds once for both methods where
    their runs are paired, else for each on its own. With few seeds the interval is a lower bound on the doubt.

    Args:
        a: [r, n] scores of one method, one row a training seed.
        b: [s, n] scores of the other on the same samples.
        clusters: [n] labels of what samples may share.
        paired: row i of both belongs together; r = s.
        seed: of the resampling.
        resamples: number of replicates.
        confidence: two-sided level.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    rng = np.random.default_rng(seed)
    member, sizes, weights = _drawn_clusters(first.shape[1], clusters, rng, resamples)
    left, right = (_weighted_means(scores, member, sizes, weights) for scores in (first, second))
    mine = rng.integers(0, len(first), (resamples, len(first)))
    theirs = mine if paired else rng.integers(0, len(second), (resamples, len(second)))
    rows = np.arange(resamples)[:, None]
    replicates = left[rows, mine].mean(axis=1) - right[rows, theirs].mean(axis=1)
    side = min((replicates <= 0).sum(), (replicates >= 0).sum()) + 1
    p_value = min(1.0, 2 * float(side) / (resamples + 1))
    return percentile_interval(float(first.mean() - second.mean()), replicates, confidence), p_value


def _drawn_clusters(
    n: int, clusters: Sequence[Hashable] | None, rng: np.random.Generator, resamples: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.int64]]:
    """Cluster of each sample [n], samples of each cluster [c], and how often each is drawn in each replicate [b, c]."""
    _, member = np.unique([str(label) for label in clusters or range(n)], return_inverse=True)
    sizes = np.bincount(member)
    return member, sizes, rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=resamples)


def _weighted_means(
    scores: NDArray[np.float64], member: NDArray[np.intp], sizes: NDArray[np.intp], weights: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mean of each run under each replicate's weights of clusters, `[R, r]`."""
    sums = np.stack([np.bincount(member, weights=run, minlength=len(sizes)) for run in scores])
    return (weights @ sums.T) / (weights @ sizes)[:, None]


def mcnemar_exact(fixed: int, broken: int) -> float:
    """Two-sided exact p-value that the samples that changed sides did so by chance.

    Args:
        fixed: pairs that only the first method has right.
        broken: pairs that only the second method has right.
    """
    return float(scipy_stats.binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0


def wilcoxon_p(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided Wilcoxon signed-rank p-value over pairs of graded scores; ties are left out."""
    first, second = as_pairs(a, b)
    changed = (first - second)[first != second]
    return float(scipy_stats.wilcoxon(changed).pvalue) if changed.size else 1.0


def geometric_mean_ratio(
    a: ArrayLike, b: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = 0.95
) -> Interval:
    """Geometric mean of ``a / b`` over pairs with its interval.

    Below 30 pairs, as in repeated timings, the interval is Student's on the log-ratios: the quantiles of a bootstrap of
    so few values are too narrow. From there on it is a bootstrap of the mean log-ratio, which asks for no shape.
    Pairs in which either value is not positive carry no ratio and are left out.
    """
    top, bottom = as_pairs(a, b)
    usable = (top > 0) & (bottom > 0)
    logs = np.log(top[usable] / bottom[usable])
    if logs.size < FEW_PAIRS:
        interval = student_interval(logs, confidence)
    else:
        interval = mean_interval(logs, seed=seed, resamples=resamples, confidence=confidence)
    return Interval(*np.exp(interval).tolist())
