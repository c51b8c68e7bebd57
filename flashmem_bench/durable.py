"""Files that a crash leaves whole: bytes appended and flushed, files replaced at once, folders that keep their entries.

A new file is durable only when its folder is flushed too. A failed append leaves the file as it was, unless somebody
else wrote to it meanwhile, whose bytes are never cut off.

No write failure is swallowed: each is the `OSError` of the system, which `write_failure` turns into a sentence. What
the bytes mean is no concern of this module.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from flashmem_bench.errors import StoreError


def append(handle: BinaryIO, content: bytes) -> None:
    """Write bytes to the end of a file in one piece, without waiting for the disk.

    Args:
        handle: Opened unbuffered for appending.
        content: Whole lines.

    Raises:
        OSError: The write failed; what a full disk took of it is cut off again.
    """
    before = os.fstat(handle.fileno()).st_size
    written = 0
    try:
        written = handle.write(content)
        if written != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        take_back(handle, before, written)
        raise


def take_back(handle: BinaryIO, before: int, written: int) -> None:
    """Cut off the last bytes of a file, if they are still the last and exactly those that were written."""
    with suppress(OSError):
        if written and os.fstat(handle.fileno()).st_size == before + written:
            os.ftruncate(handle.fileno(), before)


def append_lines(path: Path, content: bytes) -> None:
    """Add whole lines to a file and wait until the disk has them; what a kill left of a line swallows none of them.

    Several processes may do so: each call is one write.

    Raises:
        OSError: The write failed; what a full disk took of it is cut off again.
    """
    make_folder(path.parent)
    with path.open("ab", buffering=0) as handle:
        append(handle, b"\n" + content if _is_torn(path) else content)
        os.fsync(handle.fileno())


def _is_torn(path: Path) -> bool:
    with path.open("rb") as handle:
        if not os.fstat(handle.fileno()).st_size:
            return False
        handle.seek(-1, os.SEEK_END)
        return handle.read() != b"\n"


def sync_folder(path: Path) -> None:
    """Wait until the disk has the entries of a folder."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, durably."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_folder(place.parent)


def replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never a part; where that fails, the old one."""
    # Machines that share a folder may give the same number to two processes.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of files that they were replacing; nobody else may be writing the folder."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def replace_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as a JSON file, see `replace`."""
    replace(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")


def read_json(path: Path, next_step: str = "move it away and run the command again") -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        StoreError: It cannot be read, or holds something else; the sentence ends with `next_step`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"cannot read {path} ({error}); {next_step}") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} does not hold a JSON object; {next_step}")
    return value


def write_failure(path: Path, error: OSError, safe: str = "nothing was lost") -> StoreError:
    """Return what the user is told of a failed write.

    Args:
        path: What was to be written.
        error: The reason.
        safe: What nevertheless is on the disk.
    """
    reason = error.strerror or str(error)
    room = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "mend that"
    return StoreError(f"cannot write {path} ({reason}); {safe}; {room} and run the same command again")
