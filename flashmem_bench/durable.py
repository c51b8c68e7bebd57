"""Files that a crash leaves whole: lines appended and flushed, files replaced at once.

A failed write is an error with the reason of the operating system; none is swallowed. What a line means is no concern
of this module.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from flashmem_bench.errors import StoreError


def append_line(handle: BinaryIO, line: bytes, path: Path) -> None:
    """Write a line to the end of an open file and wait until the disk has it."""
    size = os.fstat(handle.fileno()).st_size
    try:
        if handle.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle.fileno())
    except OSError as error:
        # A full disk may have taken half the line; the file stays whole for the next attempt.
        os.truncate(path, size)
        raise write_failure(path, error) from error


def write_failure(path: Path, error: OSError) -> StoreError:
    """Return what the user is told of a failed write."""
    reason = error.strerror or str(error)
    return StoreError(f"cannot write {path} ({reason}); nothing was lost, run the same command again once mended")


def make_folder(path: Path) -> None:
    """Make a folder and its parents."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path} ({error}); move it away and run the command again") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} does not hold a JSON object; move it away and run the command again")
    return value


def replace_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as a JSON file, see `replace`."""
    replace(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")


def replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise write_failure(path, error) from error
