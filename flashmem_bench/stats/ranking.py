"""How well a number ranks the positives: AUROC and precision at count, with intervals over groups of samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashmem_bench.stats.intervals import Interval, percentile_interval


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
    return percentile_interval(area, found[:, 0], 0.95), percentile_interval(share, found[:, 1], 0.95)


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
