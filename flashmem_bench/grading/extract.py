"""Named extractors: where in a completion the answer stands.

Each takes the completion and returns the answer as written, or None where there is none. None is not a
wrong answer but no answer: the two are counted apart (`parse_status`), since a model that forgets the
answer format fails differently from one that miscounts. An extractor never repairs an answer; that two
spellings mean the same is decided in `match`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# A sign, a currency sign and the sign after it, digits with commas, decimals. A full stop after it is not
# part of it.
_NUMBER = r"[-+]?[$\u20ac\u00a3]?[-+]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_MARKED = re.compile(r"####[ \t]*(" + _NUMBER + r")")
# In running text "2,3" is a list and "5-3" a difference, so commas must group by three and a sign must
# stand free.
_FREE = re.compile(r"(?:(?<![\w)])[-+])?[$\u20ac\u00a3]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")

_FRACTION = r"[-+]?[0-9]+[ \t]*/[ \t]*[0-9]+"
_MARKED_QUANTITY = re.compile(rf"####[ \t]*({_FRACTION}|{_NUMBER}|[Nn]one\b)")
_FREE_QUANTITY = re.compile(rf"(?<![\w)]){_FRACTION}|{_FREE.pattern}")
# The ways in which a completion says, without the mark, that a question has no answer.
_NO_ANSWER_SAID = re.compile(
    r"#### *none\b|answer is:? *[\"'*]*none\b|not enough information|insufficient information|"
    r"(?:cannot|can't|can not|impossible to|unable to)(?: be)? (?:determine|answer|solve|calculate|find)",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])[ \t]*(\{|(?=[^\s{]))")
_UNBRACED = re.compile(r"[^\s$]+")
_SAID = re.compile(r"answer(?: is|:)[:*]*[ \t]*(\S[^\n]*)", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def marked_number(text: str) -> str | None:
    """Return the number after the first `####`, as GSM8K's own answers are written.

    The first one, because a model that runs on past its answer starts the next problem.
    """
    found = _MARKED.search(_plain_signs(text))
    return found.group(1).rstrip(",") if found else None


def last_number(text: str) -> str | None:
    """Return the last number anywhere in the text."""
    found = _FREE.findall(_plain_signs(text))
    return found[-1] if found else None


def first_line(text: str) -> str | None:
    """Return the first line that is not blank, stripped."""
    return next((line.strip() for line in text.splitlines() if line.strip()), None)


def boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{...}` whose braces balance; a box without content is none."""
    for found in reversed(list(_BOX.finditer(text))):
        content = _braced(text, found.end()) if found.group(1) == "{" else _UNBRACED.match(text, found.end())
        content = content.group() if isinstance(content, re.Match) else content
        if content and content.strip():
            return content.strip()
    return None


def _braced(text: str, start: int) -> str | None:
    """Return the text from `start` up to the brace that closes the one before it; escaped braces do not count."""
    depth, place = 1, start
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] in "{}":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[start:place]
        place += 1
    return None


def final_expression(text: str) -> str | None:
    """Return the boxed answer, else what follows the last "answer is", else the last formula, else the last number."""
    found = boxed(text)
    if found:
        return found
    said = _SAID.findall(text)
    formulas = [next(filter(None, parts)) for parts in _FORMULA.findall(said[-1] if said else text)]
    last = formulas[-1] if formulas else said[-1] if said else ""
    return last.strip().rstrip(".").strip() or last_number(text)


def marked_quantity(text: str) -> str | None:
    """Return the number, fraction or `None` after the first `####`; `None` says that there is no answer."""
    found = _MARKED_QUANTITY.search(_plain_signs(text))
    return found.group(1).rstrip(",") if found else None


def last_quantity(text: str) -> str | None:
    """Return `None` where the text says that there is no answer, else its last fraction or number."""
    plain = _plain_signs(text)
    if _NO_ANSWER_SAID.search(plain):
        return "None"
    found = _FREE_QUANTITY.findall(plain)
    return found[-1] if found else None


def whole_text(text: str) -> str | None:
    """Return the whole completion, stripped."""
    return text.strip() or None


def echoed_lines(text: str, echoes: Sequence[str]) -> list[str | None]:
    """Return what stands behind each echo in the first line that begins with it; None where none does.

    Args:
        text: The completion, one answer a line, each `<echo> <value>`.
        echoes: The prefixes, up to and including the colon, such as `Ana twice:`.
    """
    lines = [line.strip() for line in text.splitlines()]
    return [_behind(echo, lines) for echo in echoes]


def _behind(echo: str, lines: Sequence[str]) -> str | None:
    found = next((line[len(echo) :].strip() for line in lines if line.startswith(echo)), None)
    return found or None


def _plain_signs(text: str) -> str:
    return text.replace("\u2212", "-")


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "marked-number": marked_number,
    "last-number": last_number,
    "first-line": first_line,
    "boxed": boxed,
    "final-expression": final_expression,
    "marked-quantity": marked_quantity,
    "last-quantity": last_quantity,
    "whole-text": whole_text,
}
