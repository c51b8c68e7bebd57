"""Records as lines of JSON, and how a file of them is read after a crash.

A file may end in a torn line, which readers ignore and the next writer cuts off. A broken line anywhere else is not the
work of a crash and is reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashmem_bench.errors import StoreError


def scalar(value: Any, key: str) -> Any:
    """Return a value of a column as it is stored; what is no plain value raises TypeError."""
    if value is None or type(value) in (bool, int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        # A lone surrogate, which a tokenizer can produce, has no UTF-8 form.
        return value.encode("utf-8", "replace").decode("utf-8")
    raise TypeError(f"{key} holds a {type(value).__name__}; only int, float, str, bool and None can be stored")


def plain(value: Any, key: str) -> Any:
    """Return any nesting of mappings, lists and plain values as it is stored."""
    if isinstance(value, Mapping):
        return {str(scalar(name, key)): plain(entry, f"{key}.{name}") for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, key) for entry in value]
    return scalar(value, key)


def line(record: dict[str, Any]) -> bytes:
    """Return a record as one line."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def whole_bytes(path: Path) -> int:
    """Length of the file up to the end of its last whole line."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    last = data[:end].rstrip(b"\n").rfind(b"\n") + 1
    # A last line with its newline can still be torn: a power cut may leave zeros where its bytes should be.
    return end if end == 0 or parsed(data[last:end]) is not None else last


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, None where the line is broken."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "sample_id" in record else None


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole records of a file; a broken line before the last one is an error."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    # Without a newline at its end the last line was cut short, even if what is there happens to parse.
    whole = lines[:-1]
    for number, line in enumerate(whole, start=1):
        record = parsed(line)
        if record is None and number < len(whole):
            raise StoreError(f"line {number} of {path} is broken; delete that line and run the same command again")
        if record is not None:
            yield record


def by_sample(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records by sample id, the last one where there are several."""
    return {record["sample_id"]: record for record in records(path)}
