"""Broken lines are put aside, never deleted: the samples that they were run again.

`quarantine.jsonl` of a cell has one line for each of them: the file and the number of the line there, when it was put
aside, and its bytes, written as Latin-1 so that every byte has a character.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from flashmem_bench.durable import append_lines, replace
from flashmem_bench.lines import Scan, encode, scan

QUARANTINE = "quarantine.jsonl"
_TRIES = 5


def cut_broken_end(handle: BinaryIO, path: Path, check: Callable[[], None]) -> None:
    """Cut off what a killed writer left at the end of a file.

    A line that had its newline once was whole, so it is put aside first.

    Args:
        handle: The file, open for writing.
        path: Where it lies.
        check: Raises unless the file is still this process's to write.

    Raises:
        OSError: The disk refused.
    """
    for _ in range(_TRIES):
        found = scan(path)
        size = sum(len(line) + 1 for line in found.lines) + len(found.rest)
        if found.whole_bytes == size:
            return
        put_aside(path, found, range(found.kept + 1, len(found.lines) + 1))
        check()
        if os.fstat(handle.fileno()).st_size == size:
            os.ftruncate(handle.fileno(), found.whole_bytes)
            os.fsync(handle.fileno())
            return


def put_aside(path: Path, found: Scan, numbers: range | list[int]) -> None:
    """Copy lines of a file to the quarantine of its folder."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    # A power cut leaves zeros where nothing had been written: there is nothing to keep.
    kept = [number for number in numbers if found.lines[number - 1].strip(b"\0 \r")]
    if not kept:
        return
    records = [
        {"file": path.name, "line": number, "at": at, "latin1": found.lines[number - 1].decode("latin-1")}
        for number in kept
    ]
    append_lines(path.with_name(QUARANTINE), b"".join(encode(record) for record in records))


def remove_broken(path: Path, check: Callable[[], None]) -> int:
    """Put every broken line of a file aside and return how many there were.

    Args:
        path: The file; nobody else may be writing it.
        check: Raises unless that is still so.

    Raises:
        OSError: The disk refused.
    """
    found = scan(path)
    broken = [number for number, record in enumerate(found.records, start=1) if record is None]
    if not broken and not found.rest:
        return 0
    put_aside(path, found, broken)
    whole = [line + b"\n" for line, record in zip(found.lines, found.records, strict=True) if record is not None]
    check()
    replace(path, b"".join(whole))
    return len(broken) + bool(found.rest)
