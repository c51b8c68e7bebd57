"""Records as lines of JSON with a checksum, and how a file of them is read after a crash or a fault of the disk.

The last field of a line is `crc`, the CRC-32 of the line without that field, so that a flipped bit is noticed even
where the line is still JSON. It is checked and taken off when a line is read. Lines without it, which earlier versions
wrote, are accepted.

A kill can leave broken lines at the end of a file and nowhere else: readers ignore them, the next writer cuts them off.
A broken line with a whole one behind it is a fault, which is reported and never skipped in silence.

Invariant: a line is one record or nothing; no part of a broken line is ever used.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmem_bench.errors import StoreError

Record = dict[str, Any]

_CHECKED = re.compile(rb', "crc": "([0-9a-f]{8})"\}\Z')
# A last field like this is a checksum whose own name or digits were damaged.
_NEARLY = re.compile(rb', "(?:[^"]{3}": "[^"]{8}|crc": "[^"]*)"\}\Z', re.DOTALL)


def scalar(value: Any, key: str) -> Any:
    """Return the value of a column as it is stored.

    Raises:
        TypeError: It is neither int, float, str, bool nor None.
    """
    if value is None or type(value) in (bool, int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        # A lone surrogate, which a tokenizer can produce, has no UTF-8 form.
        return value.encode("utf-8", "replace").decode("utf-8")
    raise TypeError(f"{key} holds a {type(value).__name__}; only int, float, str, bool and None can be stored")


def plain(value: Any, key: str) -> Any:
    """Return any nesting of mappings, lists and plain values as it is stored; raises as `scalar`."""
    if isinstance(value, Mapping):
        return {str(scalar(name, key)): plain(entry, f"{key}.{name}") for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, key) for entry in value]
    return scalar(value, key)


def encode(record: Mapping[str, Any]) -> bytes:
    """Return a record as one line with its checksum."""
    body = {key: value for key, value in record.items() if key != "crc"}
    content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8")
    return content[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(content)


def decode(line: bytes) -> Record | None:
    """Return the record of a line without its newline, None where the line is broken."""
    found = _CHECKED.search(line)
    content = line[: found.start()] + b"}" if found else line
    if found and zlib.crc32(content) != int(found[1], 16):
        return None
    if not found and _NEARLY.search(line):
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("sample_id"), str) else None


@dataclass(frozen=True)
class Scan:
    """What a file of lines holds.

    Attributes:
        lines: Every line that ended in a newline, without it.
        records: Its record, None where it is broken; as long as `lines`.
        rest: Bytes after the last newline: a line that was cut short, even if what is there happens to be JSON.
    """

    lines: tuple[bytes, ...]
    records: tuple[Record | None, ...]
    rest: bytes = b""

    @property
    def kept(self) -> int:
        """How many lines a crash cannot have touched: all up to the last whole one."""
        return max((number for number, record in enumerate(self.records, start=1) if record is not None), default=0)

    @property
    def broken(self) -> list[int]:
        """Numbers, from 1, of the broken lines with a whole one behind them."""
        return [number for number, record in enumerate(self.records[: self.kept], start=1) if record is None]

    @property
    def whole_bytes(self) -> int:
        """Length of the file up to the end of its last whole line."""
        return sum(len(line) + 1 for line in self.lines[: self.kept])


def scan(path: Path) -> Scan:
    """Read a file of lines; one that is not there is empty.

    Raises:
        StoreError: It cannot be read.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Scan((), ())
    except OSError as error:
        raise StoreError(f"cannot read {path} ({error.strerror or error}); mend that and try again") from error
    return Scan(tuple(lines), tuple(decode(line) for line in lines), rest)


def by_sample(path: Path) -> dict[str, Record]:
    """Return the records of a file by sample id; of several of one sample the last, in the place of the first.

    Raises:
        StoreError: A line before the last whole one is broken.
    """
    found = scan(path)
    if found.broken:
        raise StoreError(
            f"{_listed(found.broken)} of {path} {'is' if len(found.broken) == 1 else 'are'} broken; put "
            f"{'it' if len(found.broken) == 1 else 'them'} aside with flashmem-bench verify --repair, then run the "
            "same command again"
        )
    return {record["sample_id"]: record for record in found.records if record is not None}


def _listed(numbers: Iterable[int], shown: int = 5) -> str:
    known = [str(number) for number in numbers]
    if len(known) == 1:
        return f"line {known[0]}"
    more = f" and {len(known) - shown} more" if len(known) > shown else ""
    return f"lines {', '.join(known[:shown])}{more}"
