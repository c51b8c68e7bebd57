"""Estimates with intervals: shares, means, medians, sums of ratios, and means over clusters.

A quantity that the data cannot give is ``None`` (a p99 from 50 values) or nan (an interval of no values). Every
bootstrap draws from a ``numpy.random.Generator`` seeded by the caller. Its standard error is the standard deviation of
its replicates, not divided by anything.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

RESAMPLES = 10_000
_CHUNK_CELLS = 2_000_000
_P99_NEEDS = 500


class Interval(NamedTuple):
    """An estimate with a two-sided interval."""

    estimate: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether the value lies outside the interval; False when the interval is undefined."""
        return value < self.low or value > self.high


NOTHING = Interval(math.nan, math.nan, math.nan)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion, without continuity correction.

    Args:
        successes: number of ones, 0 to ``n``.
        n: number of trials; 0 gives nan.
        confidence: two-sided level, between 0 and 1.
    """
    if n == 0:
        return NOTHING
    z = float(scipy_stats.norm.ppf(0.5 + confidence / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the interval touches 0 or 1 exactly; rounding must not push the estimate out of it.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(share, low, high)


def mean_interval(
    values: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = 0.95
) -> Interval:
    """Mean with a percentile bootstrap interval.

    Args:
        values: [n] numbers; none gives nan, one gives a mean with a nan interval: it says nothing of the
            spread.
        seed: seed of the resampling.
        resamples: number of bootstrap replicates.
        confidence: two-sided level.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size < 2:
        return Interval(float(data.sum()), math.nan, math.nan) if data.size else NOTHING
    replicates = bootstrap_means(data[:, None], seed=seed, resamples=resamples)[:, 0]
    return percentile_interval(float(data.mean()), replicates, confidence)


def student_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean with Student's interval; fewer than two values say nothing of the spread, and it is nan."""
    data = np.asarray(values, dtype=np.float64)
    if data.size < 2:
        return Interval(float(data.sum()), math.nan, math.nan) if data.size else NOTHING
    reach = scipy_stats.t.ppf(0.5 + confidence / 2, data.size - 1) * data.std(ddof=1) / math.sqrt(data.size)
    return Interval(float(data.mean()), float(data.mean() - reach), float(data.mean() + reach))


def score_interval(
    scores: ArrayLike, clusters: Sequence[Hashable] | None = None, *, seed: int = 0, confidence: float = 0.95
) -> tuple[Interval, str]:
    """Mean of scores in [0, 1] with its interval and the name of the method: ``wilson``, ``bootstrap``, ``clustered``.

    Args:
        scores: [n] numbers in [0, 1].
        clusters: [n] labels of what scores may share, such as a document; None or all different: independent.
        seed: seed of the resampling.
        confidence: two-sided level.
    """
    data = np.asarray(scores, dtype=np.float64)
    if share_clusters(clusters) and not (data == data[0]).all():
        return clustered_interval(data, clusters or (), confidence), "clustered"
    if np.isin(data, (0.0, 1.0)).all():
        return wilson_interval(int(data.sum()), data.size, confidence), "wilson"
    if (data == data[0]).all():
        return constant_interval(data, 0.0, 1.0, confidence), "wilson"
    return mean_interval(data, seed=seed, confidence=confidence), "bootstrap"


def bootstrap_means(data: NDArray[np.float64], *, seed: int = 0, resamples: int = RESAMPLES) -> NDArray[np.float64]:
    """Means of bootstrap resamples of the rows.

    Args:
        data: [n, c]; the columns of one row stay together.
        seed: seed of the resampling.
        resamples: number of replicates R.

    Returns:
        [R, c] means.
    """
    rng = np.random.default_rng(seed)
    # With few distinct rows (right or wrong, a gain of -1, 0 or 1) one multinomial draw says how often each
    # row was taken: the same distribution as drawing indices, at a fraction of the time.
    distinct, counts = np.unique(data, axis=0, return_counts=True)
    n = len(data)
    if len(distinct) <= 32:
        return rng.multinomial(n, counts / n, size=resamples) @ distinct / n
    means = np.empty((resamples, data.shape[1]))
    step = max(1, _CHUNK_CELLS // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        means[start : start + size] = data[rng.integers(0, n, size=(size, n))].mean(axis=1)
    return means


def bootstrap_standard_error(values: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Standard error of the mean as the standard deviation of the bootstrap replicates."""
    data = np.asarray(values, dtype=np.float64)
    if data.size < 2:
        return math.nan
    return float(bootstrap_means(data[:, None], seed=seed, resamples=resamples).std(ddof=1))


def clustered_standard_error(values: ArrayLike, clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean when samples of one cluster are not independent.

    The residuals are summed within each cluster, and C / (C - 1) corrects for C clusters. With one sample a
    cluster it is the usual standard error.

    Args:
        values: [n] numbers.
        clusters: [n] labels, such as the document that a question belongs to.

    Returns:
        nan with fewer than two clusters.
    """
    data = np.asarray(values, dtype=np.float64)
    labels = {label: number for number, label in enumerate(dict.fromkeys(clusters))}
    if len(labels) < 2:
        return math.nan
    sums = np.bincount([labels[label] for label in clusters], weights=data - data.mean(), minlength=len(labels))
    correction = len(labels) / (len(labels) - 1)
    return float(math.sqrt(correction * (sums**2).sum()) / data.size)


def share_clusters(clusters: Sequence[Hashable] | None) -> bool:
    """Whether any two samples belong to one cluster."""
    return clusters is not None and len(set(clusters)) < len(clusters)


def clustered_interval(values: ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95) -> Interval:
    """Mean with an interval from the clustered standard error and Student's t with C - 1 degrees of freedom.

    With one cluster there is no interval: its ends are nan.

    Args:
        values: [n] numbers.
        clusters: [n] labels, such as the document that a question belongs to.
        confidence: two-sided level.
    """
    data = np.asarray(values, dtype=np.float64)
    if not data.size:
        return NOTHING
    error, freedom = clustered_standard_error(data, clusters), len(set(clusters)) - 1
    half = error * float(scipy_stats.t.ppf(0.5 + confidence / 2, freedom)) if freedom else math.nan
    mean = float(data.mean())
    return Interval(mean, mean - half, mean + half)


def ratio_of_sums(
    top: ArrayLike, bottom: ArrayLike, *, seed: int = 0, resamples: int = 2_000, confidence: float = 0.95
) -> Interval:
    """``sum(top) / sum(bottom)`` over samples, such as time per token, with a bootstrap over the samples."""
    above, below = as_pairs(top, bottom)
    if below.size == 0 or below.sum() <= 0:
        return NOTHING
    if below.size == 1:
        return Interval(float(above[0] / below[0]), math.nan, math.nan)
    means = bootstrap_means(np.stack([above, below], axis=1), seed=seed, resamples=resamples)
    defined = means[:, 1] > 0
    return percentile_interval(float(above.sum() / below.sum()), means[defined, 0] / means[defined, 1], confidence)


def median_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Median with its order-statistic interval, which assumes no distribution.

    With too few values for the level (fewer than 6 for 95 %) there is no interval: its ends are nan.
    """
    data = np.sort(np.asarray(values, dtype=np.float64))
    if data.size == 0:
        return NOTHING
    rank = int(scipy_stats.binom.ppf((1 - confidence) / 2, data.size, 0.5))
    if rank == 0:
        return Interval(float(np.median(data)), math.nan, math.nan)
    return Interval(float(np.median(data)), float(data[rank - 1]), float(data[data.size - rank]))


def percentile(values: ArrayLike, q: float) -> float | None:
    """The q-th percentile, or None where the sample cannot tell it.

    Above the 95th it takes at least 500 values; above the 99th it is never given.

    Args:
        values: [n] numbers.
        q: 0 to 100.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0 or q > 99 or (q > 95 and data.size < _P99_NEEDS):
        return None
    return float(np.percentile(data, q))


def as_pairs(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two arrays of equal length.

    Raises:
        ValueError: the lengths differ.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths, not {first.size} and {second.size}")
    return first, second


def constant_interval(data: NDArray[np.float64], least: float, most: float, confidence: float) -> Interval:
    """Interval of the mean of equal values in [least, most]: the Wilson bound on the share that may be unlike them.

    For zeros and ones it is the Wilson interval itself.
    """
    value = float(data[0])
    if not least <= value <= most:
        return Interval(value, math.nan, math.nan)
    unlike = wilson_interval(0, data.size, confidence).high
    return Interval(value, value - (value - least) * unlike, value + (most - value) * unlike)


def percentile_interval(estimate: float, replicates: NDArray[np.float64], confidence: float) -> Interval:
    """Interval between the percentiles of bootstrap replicates."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return Interval(estimate, float(low), float(high))
