"""Which process this is, told so that another one can find out whether it is still there.

A number of a process is given again after its end, so a process is known by its number and the moment at which it
began. Numbers mean something on one machine, until it is started again, and in one pid namespace: two containers of
one machine both have a process 7. The three together are told as a digest, which holds no host name and no user name.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from functools import lru_cache
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_ENDED = ("Z", "X", "x")
UNKNOWN = "unknown"


@lru_cache(maxsize=1)
def machine_digest() -> str:
    """Return 16 hex digits for this machine, this start of it and this pid namespace."""
    parts = [_boot(), _namespace()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _boot() -> str:
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        import psutil

        # Whole minutes: the moment of the start is worked out from a clock that may be corrected.
        return f"{uuid.getnode()} {round(psutil.boot_time() / 60)}"


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """Return a mark of when a process of this machine began; None where there is no such process any more.

    `UNKNOWN` stands for a process that is there and may not be looked at.

    A process that has ended and only waits for its parent to notice counts as gone.
    """
    if pid <= 0:
        return None
    try:
        # The name in parentheses may hold anything, even a parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (OSError, IndexError):
        return _start_without_proc(pid)
    # Ticks since the machine was started: unlike a date they never change when the clock is corrected.
    return None if fields[0] in _ENDED else f"ticks {fields[19]}"


def _start_without_proc(pid: int) -> str | None:
    try:
        # Sends nothing; a machine may hide the processes of other users, but not that they are there.
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        return UNKNOWN
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"time {process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return UNKNOWN
