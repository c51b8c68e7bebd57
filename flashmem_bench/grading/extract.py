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
}
