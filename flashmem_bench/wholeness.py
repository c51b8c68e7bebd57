"""Whether texts and rows of the latency protocol have the shape that everything above them relies on.

The store sees to manifests and sample rows. A folder can still hold what this program never wrote: it was mended by
hand, came from elsewhere, or lost a bit that left valid JSON. What has the wrong type is named here, with its file,
instead of failing somewhere inside a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from flashmem_bench.errors import StoreError
from flashmem_bench.schema import TABLES

_KINDS = {"string": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
_MEND = "move that folder away and run its command again, or put back a copy"
_LARGEST = 2**63
_OF_EVERY_RUN = ("model", "method", "device", "dtype", "exec", "protocol", "context", "run", "e2e_ms")


def check_texts(texts: Mapping[Any, Mapping[str, Any]], cell: Path) -> None:
    """Refuse texts whose parts are not what they should be.

    Raises:
        StoreError: With the file, the sample and the part.
    """
    for name, text in texts.items():
        problem = next(_text_problems(text), None)
        if problem is not None:
            raise StoreError(f"{cell / 'texts.jsonl'}: the text of {str(name)[:80]!r}: {problem}; {_MEND}")


def check_latency(rows: Sequence[Any], path: Path) -> None:
    """Refuse rows of the latency protocol in which a column holds what it cannot, or is missing.

    Raises:
        StoreError: With the file, the row and the column.
    """
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            problem: str | None = f"it is {_shown(row)}"
        else:
            missing = [name for name in _OF_EVERY_RUN if row.get(name) is None]
            problem = f"{missing[0]} is missing" if missing else _row_problem(row)
        if problem is not None:
            raise StoreError(f"{path}: row {number}: {problem}; delete that line, or move the file away")


def _row_problem(row: Mapping[str, Any]) -> str | None:
    """Return the first column of a row that holds what it cannot, in a clause."""
    kinds = _columns()
    for name, value in row.items():
        kind = kinds.get(name)
        if value is not None and not (_is(value, kind) if kind else _is_scalar(value)):
            return f"{name} is {_shown(value)}, not {_KINDS[kind] if kind else 'one value'}"
    return None


def _text_problems(text: Mapping[str, Any]) -> Iterator[str]:
    for key in ("prompt", "text", "target", "answer"):
        if text.get(key) is not None and not isinstance(text[key], str):
            yield f"{key} is {_shown(text[key])}, not text"
    for key, kind in (("tokens", "string"), ("entropies", "float"), ("output_entropies", "float")):
        entries = text.get(key)
        if entries is None:
            continue
        if not isinstance(entries, list) or not all(entry is None or _is(entry, kind) for entry in entries):
            yield f"{key} is {_shown(entries)}, not a list of {_KINDS[kind].removeprefix('a ')}s"
    triggers = text.get("triggers")
    if triggers is not None:
        whole = isinstance(triggers, list) and all(isinstance(one, dict) and _is_place(one) for one in triggers)
        if not whole:
            yield f"triggers is {_shown(triggers)}, not a list of places"
    if not _encodable(text):
        yield "it holds half of a letter"


def _is_place(trigger: Mapping[str, Any]) -> bool:
    place = trigger.get("text_index")
    return isinstance(place, int) and not isinstance(place, bool) and 0 <= place < _LARGEST


@lru_cache(maxsize=1)
def _columns() -> dict[str, str]:
    return {column.name: column.dtype for column in TABLES["latency"]}


def _is(value: Any, kind: str) -> bool:
    if kind == "string":
        return isinstance(value, str) and _encodable(value)
    if kind == "bool":
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int if kind == "int" else (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else -_LARGEST <= value < _LARGEST


def _is_scalar(value: Any) -> bool:
    return value is None or any(_is(value, kind) for kind in _KINDS)


def _encodable(value: Any) -> bool:
    """Whether every text in a JSON value can be written down again."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, Mapping):
        return all(_encodable(key) and _encodable(entry) for key, entry in value.items())
    return all(map(_encodable, value)) if isinstance(value, list) else True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
