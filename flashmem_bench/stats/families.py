"""Many tests at once: p-values adjusted for how many were looked at.

Primary comparisons, fixed before the run, get Holm's adjustment, which bounds the chance of a single false one. All
others get Benjamini and Hochberg's, which bounds the share of false ones among those that are called. A p-value that is
nan stays nan and counts for nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values by Holm's step-down procedure.

    Args:
        p_values: [m] p-values of one family.

    Returns:
        [m] adjusted p-values in the given order.
    """
    adjusted, order = _ascending(p_values)
    # The smallest is multiplied by their number, the next by one less; none may fall below an earlier one.
    steps = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def benjamini_hochberg(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values by Benjamini and Hochberg's step-up procedure.

    Args:
        p_values: [m] p-values of one family.

    Returns:
        [m] adjusted p-values in the given order.
    """
    adjusted, order = _ascending(p_values)
    steps = adjusted[order] * len(order) / np.arange(1, len(order) + 1)
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(steps[::-1])[::-1])
    return adjusted


def _ascending(p_values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """A copy of the p-values, and the places of those that are known, smallest first."""
    given = np.array(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(given))
    return given, known[np.argsort(given[known], kind="stable")]
