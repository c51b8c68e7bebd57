"""What a paired comparison can see: the smallest difference that n samples show, and the samples that one needs.

Two methods with right or wrong answers differ on a share of the samples, the *discordant* ones; only these carry
information. For a true difference d and a discordant share s, the difference of one sample has the variance s - d^2,
and s where there is no difference. All formulas are the normal approximation of McNemar's test (Miettinen 1968).
"""

from __future__ import annotations

import math

from scipy import stats as scipy_stats

POWER = 0.8


def minimum_detectable_difference(
    n: float, discordant: float, *, alpha: float = 0.05, power: float = POWER
) -> float | None:
    """Smallest difference of scores that a two-sided paired test finds with this power.

    Args:
        n: paired samples.
        discordant: share of samples on which the two methods differ, 0 to 1.
        alpha: two-sided level.
        power: chance to find it.

    Returns:
        The difference, or None where even the largest possible one, the discordant share itself, is too small.
    """
    if n <= 0 or samples_needed(discordant, discordant, alpha=alpha, power=power) > n:
        return None
    low, high = 0.0, discordant
    for _ in range(60):
        middle = (low + high) / 2
        enough = middle > 0 and samples_needed(middle, discordant, alpha=alpha, power=power) <= n
        low, high = (low, middle) if enough else (middle, high)
    return high


def samples_needed(difference: float, discordant: float, *, alpha: float = 0.05, power: float = POWER) -> float:
    """Paired samples after which a two-sided test finds a difference with this power.

    Args:
        difference: of the scores, not 0.
        discordant: share of samples on which the two methods differ, at least the difference.
        alpha: two-sided level.
        power: chance to find it.

    Raises:
        ValueError: the difference is 0, or larger than the discordant share.
    """
    size = abs(difference)
    if not 0 < size <= discordant:
        raise ValueError(f"a difference lies above 0 and up to the discordant share {discordant:g}, not {difference:g}")
    level, reach = scipy_stats.norm.ppf([1 - alpha / 2, power])
    return float(((level * math.sqrt(discordant) + reach * math.sqrt(discordant - size**2)) / size) ** 2)


def samples_for_margin(margin: float, discordant: float, *, alpha: float = 0.05, power: float = POWER) -> float:
    """Paired samples after which two equally good methods are shown to be no worse than each other.

    Args:
        margin: of the non-inferiority test, above 0.
        discordant: share of samples on which the two methods differ.
        alpha: level of the two-sided interval whose lower end decides.
        power: chance to show it.

    Raises:
        ValueError: the margin is not above 0.
    """
    if margin <= 0:
        raise ValueError(f"a margin lies above 0, not at {margin:g}")
    level, reach = scipy_stats.norm.ppf([1 - alpha / 2, power])
    return float(discordant * ((level + reach) / margin) ** 2)
