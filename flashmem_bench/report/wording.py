"""How numbers and findings are said, the same in the page and in the terminal.

Scores are percentages with their interval in brackets, differences are points, time ratios carry a multiplication
sign. A missing number is a dash, never a zero.
"""

from __future__ import annotations

import math
from typing import Any

DASH = "-"


def known(value: Any) -> bool:
    """Whether a value of a table is there: neither null nor nan."""
    try:
        return value is not None and not math.isnan(value)
    except TypeError:
        # pandas' own null is neither None nor a float, and refuses to say whether it is true.
        return isinstance(value, str)


def number(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits."""
    if not known(value):
        return DASH
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * value:.{digits}f} %" if known(value) else DASH


def share(value: Any) -> str:
    """A rate as a percentage in few letters: 0 %, 0.4 %, 12 %."""
    if not known(value):
        return DASH
    return f"{100 * value:.1f} %" if 0 < 100 * value < 10 else f"{100 * value:.0f} %"


def percent_interval(value: Any, low: Any, high: Any) -> str:
    """A score with its interval: 65.8 [56.9, 73.7], in percent."""
    if not (known(low) and known(high)):
        return f"{100 * value:.1f}" if known(value) else DASH
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def points(value: Any, low: Any = None, high: Any = None) -> str:
    """A difference of scores in percentage points: +3.2 [-0.5, 6.9]."""
    if not known(value):
        return DASH
    if not (known(low) and known(high)):
        return _signed(value)
    return f"{_signed(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def interval(value: Any, low: Any, high: Any) -> str:
    """A quantity with its interval: 3.07 [2.98, 3.16]."""
    if not (known(value) and known(low) and known(high)):
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def times(value: Any) -> str:
    """A ratio of times: 1.22x."""
    return f"{value:.2f}x" if known(value) else DASH


def p_value(value: Any) -> str:
    """A p-value; tiny ones as a bound."""
    if not known(value):
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def whole(value: Any) -> str:
    """A count."""
    return str(int(value)) if known(value) else DASH


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text
