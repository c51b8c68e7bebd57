"""Comparisons: whether an extracted answer says the same as the right one.

Numbers are compared by value and without floating point, so `18`, `18.00`, `$18` and `18.` agree and long
integers do not round. Words are compared without case, outer punctuation, a leading article and the spaces
around commas; order counts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from fractions import Fraction

_DECIMAL = re.compile(r"([-+]?)([0-9]*)(?:\.([0-9]*))?")
_ARTICLES = re.compile(r"^(?:(?:the|an?) )+")


def normal_number(text: str) -> str | None:
    """Return the one spelling of a number: without `+`, currency, commas, per cent and needless zeros.

    Returns:
        The number, or None where the text is none.
    """
    bare = re.sub(r"[\s,$%\u20ac\u00a3]", "", text.replace("\u2212", "-")).rstrip(".")
    found = _DECIMAL.fullmatch(bare)
    if not found or not (found[2] or found[3]):
        return None
    whole, fraction = found[2].lstrip("0") or "0", (found[3] or "").rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return value if found[1] != "-" or value == "0" else f"-{value}"


def same_number(answer: str, gold: str) -> bool:
    """Return whether both are numbers of the same value."""
    value = normal_number(answer)
    return value is not None and value == normal_number(gold)


def same_quantity(answer: str, gold: str) -> bool:
    """Return whether both are numbers or fractions of the same value, or both the word `None`.

    `1/2` is 0.5, but 0.33 is not `1/3`: nothing is rounded.
    """
    if "none" in (answer.strip().lower(), gold.strip().lower()):
        return answer.strip().lower() == gold.strip().lower()
    value = _fraction(answer)
    return value is not None and value == _fraction(gold)


def _fraction(text: str) -> Fraction | None:
    over, _, under = text.partition("/")
    parts = [normal_number(over), normal_number(under or "1")]
    if None in parts or parts[1] == "0":
        return None
    return Fraction(str(parts[0])) / Fraction(str(parts[1]))


def normal_words(text: str) -> str:
    """Return the text in lower case, single-spaced, without outer punctuation or leading article."""
    spaced = " ".join(text.lower().split())
    return _ARTICLES.sub("", re.sub(r" ?, ?", ",", spaced).strip(string.punctuation + string.whitespace))


def same_words(answer: str, gold: str) -> bool:
    """Return whether both are the same words in the same order."""
    return normal_words(answer) == normal_words(gold)


def item_shares(
    values: Sequence[str | None], gold: Sequence[str], echoes: Sequence[str], hard: Sequence[str]
) -> dict[str, float]:
    """Grade a list of look-ups.

    Args:
        values: What the completion says behind each echo; None where it says nothing.
        gold: The right value of each echo.
        echoes: The echoes, in order.
        hard: Those echoes that need two links.

    Returns:
        `items_right`, the share of all items right; `one_link` and `two_link`, the shares among the items
        of one and of two links (left out where there are none); `all_right`, 1.0 where nothing is wrong.
    """
    right = [value is not None and same_words(value, truth) for value, truth in zip(values, gold, strict=True)]
    two = [ok for ok, echo in zip(right, echoes, strict=True) if echo in set(hard)]
    one = [ok for ok, echo in zip(right, echoes, strict=True) if echo not in set(hard)]
    shares = {"items_right": _share(right), "all_right": float(all(right))}
    return shares | {name: _share(part) for name, part in (("one_link", one), ("two_link", two)) if part}


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
