"""Pure statistics: intervals, paired comparisons and ratios.

Scores get a Wilson interval when every score is 0 or 1, else a percentile bootstrap. Two methods on the same
samples are always compared in pairs: bootstrap of the differences, exact McNemar on the samples that changed
sides. Times are compared by the geometric mean of the per-prompt ratios, which does not care which method is
the numerator.

Every bootstrap draws from a ``numpy.random.Generator`` seeded by the caller, so a report made twice is the
same report. Nothing is rounded, no outlier is removed, and a quantity that the data cannot give is ``None``
(a p99 from 50 values) or nan (an interval of no values). No input or output, no torch, no pandas.

The standard error of a bootstrap is the standard deviation of its replicates, not divided by anything.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

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
    return _percentile_interval(float(data.mean()), replicates, confidence)


def score_interval(scores: ArrayLike, *, seed: int = 0, confidence: float = 0.95) -> tuple[Interval, str]:
    """Mean of scores in [0, 1] with its interval and the name of the method, ``wilson`` or ``bootstrap``."""
    data = np.asarray(scores, dtype=np.float64)
    if np.isin(data, (0.0, 1.0)).all():
        return wilson_interval(int(data.sum()), data.size, confidence), "wilson"
    if (data == data[0]).all():
        return _constant_interval(data, 0.0, 1.0, confidence), "wilson"
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
    first, second = _pairs(a, b)
    differences = first - second
    if differences.size and (differences == differences[0]).all():
        return _constant_interval(differences, -1.0, 1.0, confidence)
    return mean_interval(differences, seed=seed, resamples=resamples, confidence=confidence)


def seeds_and_samples(scores: ArrayLike, *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95) -> Interval:
    """Mean over training seeds and samples, with a percentile bootstrap that draws both together.

    Each replicate draws seeds and, for all of them alike, samples: the runs answered the same questions.

    Args:
        scores: [r, n], one row a training seed, one column a sample.
    """
    data = np.asarray(scores, dtype=np.float64)
    runs, n = data.shape
    rng = np.random.default_rng(seed)
    # The mean over drawn seeds and samples is w_seed @ data @ w_sample with multinomial weights.
    of_seeds = rng.multinomial(runs, np.full(runs, 1 / runs), size=resamples) / runs
    of_samples = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    replicates = np.einsum("br,br->b", of_seeds, of_samples @ data.T)
    return _percentile_interval(float(data.mean()), replicates, confidence)


def mcnemar_exact(fixed: int, broken: int) -> float:
    """Two-sided exact p-value that the samples that changed sides did so by chance.

    Args:
        fixed: pairs that only the first method has right.
        broken: pairs that only the second method has right.
    """
    return float(scipy_stats.binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0


def wilcoxon_p(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided Wilcoxon signed-rank p-value over pairs of graded scores; ties are left out."""
    first, second = _pairs(a, b)
    changed = (first - second)[first != second]
    return float(scipy_stats.wilcoxon(changed).pvalue) if changed.size else 1.0


def geometric_mean_ratio(
    a: ArrayLike, b: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = 0.95
) -> Interval:
    """Geometric mean of ``a / b`` over pairs with a bootstrap interval of the mean log-ratio.

    Pairs in which either value is not positive carry no ratio and are left out.
    """
    top, bottom = _pairs(a, b)
    usable = (top > 0) & (bottom > 0)
    logs = np.log(top[usable] / bottom[usable])
    return Interval(*np.exp(mean_interval(logs, seed=seed, resamples=resamples, confidence=confidence)).tolist())


def ratio_of_sums(
    top: ArrayLike, bottom: ArrayLike, *, seed: int = 0, resamples: int = 2_000, confidence: float = 0.95
) -> Interval:
    """``sum(top) / sum(bottom)`` over samples, such as time per token, with a bootstrap over the samples."""
    above, below = _pairs(top, bottom)
    if below.size == 0 or below.sum() <= 0:
        return NOTHING
    if below.size == 1:
        return Interval(float(above[0] / below[0]), math.nan, math.nan)
    means = bootstrap_means(np.stack([above, below], axis=1), seed=seed, resamples=resamples)
    defined = means[:, 1] > 0
    return _percentile_interval(float(above.sum() / below.sum()), means[defined, 0] / means[defined, 1], confidence)


def auroc(values: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve: the probability that a positive has the higher value, ties counted half.

    Args:
        values: [n] numbers.
        positive: [n] booleans.

    Returns:
        nan without a positive or without a negative.
    """
    level, marked = _levels(values, positive)
    return _auroc(np.bincount(level[marked], minlength=level.max() + 1), np.bincount(level[~marked], minlength=1))


def precision_at_count(values: ArrayLike, positive: ArrayLike) -> float:
    """Share of positives among the highest values, as many of them as there are positives; equal to recall.

    Among ties at the edge the share of positives in the tie counts, so the order of the input does not matter.
    """
    level, marked = _levels(values, positive)
    return _precision(np.bincount(level[marked], minlength=level.max() + 1), np.bincount(level[~marked], minlength=1))


def ranking_intervals(
    values: ArrayLike, positive: ArrayLike, groups: ArrayLike, *, seed: int = 0, resamples: int = 1000
) -> tuple[Interval, Interval]:
    """AUROC and precision at count with 95 % bootstrap intervals: whole groups are drawn, never single values.

    Values are sorted once; a replicate only weighs each group by how often it was drawn.

    Args:
        values: [n] numbers.
        positive: [n] booleans.
        groups: [n] labels of the samples that the values belong to.
        seed: of the bootstrap.
        resamples: number of replicates.
    """
    level, marked = _levels(values, positive)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    most, even = level.max() + 1, np.full(len(names), 1 / len(names))
    replicates = []
    for _ in range(resamples):
        weight = rng.multinomial(len(names), even)[member].astype(np.float64)
        up = np.bincount(level[marked], weights=weight[marked], minlength=most)
        down = np.bincount(level[~marked], weights=weight[~marked], minlength=most)
        replicates.append((_auroc(up, down), _precision(up, down)))
    found = np.asarray(replicates)
    found = found[~np.isnan(found).any(axis=1)]
    area, share = auroc(values, positive), precision_at_count(values, positive)
    if not len(found):
        return Interval(area, math.nan, math.nan), Interval(share, math.nan, math.nan)
    return _percentile_interval(area, found[:, 0], 0.95), _percentile_interval(share, found[:, 1], 0.95)


def _levels(values: ArrayLike, positive: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The place of each value among the distinct values, ascending, and which values are positive."""
    _, level = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
    return level, np.asarray(positive, dtype=bool)


def _auroc(up: NDArray[Any], down: NDArray[Any]) -> float:
    """AUROC from the weight of positives and of negatives at each level, ascending."""
    down = np.pad(down, (0, len(up) - len(down)))
    pairs = up.sum() * down.sum()
    below = np.cumsum(down) - down
    return float((up * (below + down / 2)).sum() / pairs) if pairs else math.nan


def _precision(up: NDArray[Any], down: NDArray[Any]) -> float:
    """Precision at count from the same weights: levels are taken from the top, the last one in part."""
    down = np.pad(down, (0, len(up) - len(down)))
    room = up.sum()
    if not room:
        return math.nan
    up, here = up[::-1], (up + down)[::-1]
    left = room - (np.cumsum(here) - here)
    taken = np.clip(np.divide(left, here, out=np.zeros(len(here)), where=here > 0), 0, 1)
    return float((up * taken).sum() / room)


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


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths, not {first.size} and {second.size}")
    return first, second


def _constant_interval(data: NDArray[np.float64], least: float, most: float, confidence: float) -> Interval:
    """Interval of the mean of equal values in [least, most]: the Wilson bound on the share that may be unlike them.

    For zeros and ones it is the Wilson interval itself.
    """
    value = float(data[0])
    if not least <= value <= most:
        return Interval(value, math.nan, math.nan)
    unlike = wilson_interval(0, data.size, confidence).high
    return Interval(value, value - (value - least) * unlike, value + (most - value) * unlike)


def _percentile_interval(estimate: float, replicates: NDArray[np.float64], confidence: float) -> Interval:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return Interval(estimate, float(low), float(high))
