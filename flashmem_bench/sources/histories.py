"""Parts of a history that many questions are asked about, and the settings of sources that are read from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flashmem_bench.errors import UsageError


def whole_number(settings: Mapping[str, Any] | None, name: str, default: int | None) -> int | None:
    """Return a setting of a suite's rows.

    Raises:
        UsageError: It is no whole number of at least 1.
    """
    value = (settings or {}).get(name, default)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise UsageError(f"suite.{name} must be a whole number of at least 1, not {value!r}")


def newest_lines(lines: Sequence[tuple[str | None, str]], words: int | None) -> str:
    """Join the lines of a history, or as many of the newest as have no more than so many words together.

    A cut by words instead of tokens is the same for every backbone, and one cut for the whole history is the same for
    every question about it: cutting each prompt to fit would leave no two of them with a common beginning.

    Args:
        lines: The heading under which each line stands (None for none), and the line. A heading is written once above
            its lines, also where the cut took the first of them, and does not count.
        words: Words separated by spaces; None keeps everything. One line is always kept.
    """
    kept: list[tuple[str | None, str]] = []
    room = words
    for heading, line in reversed(lines):
        size = len(line.split())
        if room is not None and kept and size > room:
            break
        room = None if room is None else room - size
        kept.append((heading, line))
    parts: list[str] = []
    last: str | None = None
    for heading, line in reversed(kept):
        if heading is not None and heading != last:
            parts.append(f"\n{heading}" if parts else heading)
        parts.append(line)
        last = heading
    return "\n".join(parts)
