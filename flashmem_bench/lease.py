"""Claims: one process at a time writes a folder, on any file system that can rename a folder.

A claim is a folder `.claim.<number>` with one file, `owner.json`, that tells the process by a random token. It is made
complete under another name and renamed into its place, which fails where one is there. The highest number is the claim
that counts, and it is never removed: its owner marks it as released when it is done. Whoever finds it released or stale
makes the next number, and of several who try, the rename lets exactly one succeed; it then removes the lower numbers.
So nobody ever takes away a claim that another has just made, and a process that was suspended while it lost its claim
sees a higher number and stops.

A claim is stale when its process is gone, which the same machine sees at once, or when its owner has not touched it for
`expiry_s`. Ages are differences of two times of one file system, since the clocks of two machines differ.

A record lock (`lockf`) is not used beside it. Some network file systems have none, some keep it to one machine, and a
process loses it when it closes any other handle of the file: a claim has to be enough alone, and two mechanisms would
fail in two ways.

Invariants: a claim is given up by the process that made it, never by a fork of it. What no scheme without the help of
the disk can rule out is a process that is suspended between the check and the write behind it; it then adds one whole
line, which counts as a sample that was written twice.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flashmem_bench.errors import StoreError
from flashmem_bench.process_identity import UNKNOWN, machine_digest, process_start

PERIOD_S = 5.0
EXPIRY_S = 60.0
_NAME = re.compile(r"\.claim\.(\d{8,})")
_DRAFT = ".claim.draft."
_OWNER, _RELEASED = "owner.json", "released"
_TRIES = 100


class ClaimHeld(Exception):
    """Another process has the claim.

    Attributes:
        pid: Its number, where it runs on this machine.
        silent_s: Seconds since it last touched the claim.
        expiry_s: Seconds of silence after which the claim may be taken over.
    """

    def __init__(self, pid: int | None, silent_s: float, expiry_s: float):
        self.pid, self.silent_s, self.expiry_s = pid, max(0.0, silent_s), expiry_s
        who = f"process {pid} of this machine" if pid is not None else "a process of another machine"
        super().__init__(f"{who}, last sign of life {self.silent_s:.0f} s ago")

    @property
    def advice(self) -> str:
        """What the user can do."""
        if self.pid is not None:
            return "wait for it to end"
        left = max(1.0, self.expiry_s - self.silent_s)
        return f"wait for it to end; if it was killed, run the same command again in {left:.0f} s"


@dataclass(frozen=True)
class _Owner:
    """What a claim tells of its owner."""

    pid: int = 0
    started: str = ""
    machine: str = ""
    expiry_s: float = EXPIRY_S
    touched: float = 0.0
    released: bool = False

    @property
    def here(self) -> bool:
        return self.machine == machine_digest()

    @property
    def gone(self) -> bool:
        return self.here and process_start(self.pid) not in (self.started, UNKNOWN)


class Claim:
    """The right of this process to write a folder; use `take`.

    Claims of one folder in one process are one object, which is given up when the last user released it, when nobody
    refers to it any more, or at the normal end of the process.
    """

    def __init__(self, folder: Path, number: int, token: str, period_s: float):
        self.folder, self.number, self.period_s = folder, number, period_s
        self._token = token.encode()
        self.users = 1
        self._path = _path(folder, number)
        self._pid = os.getpid()
        self._owner = os.open(self._path / _OWNER, os.O_RDONLY)
        self._give_up = weakref.finalize(self, _give_up, self._path, self._owner, self._pid)

    @classmethod
    def take(cls, folder: Path, *, period_s: float = PERIOD_S, expiry_s: float = EXPIRY_S) -> Claim:
        """Claim a folder that exists.

        Args:
            folder: What is to be written.
            period_s: How often the claim is touched while it is held.
            expiry_s: After so many seconds without a touch another machine may take the claim over.

        Raises:
            ClaimHeld: Another process has it.
            OSError: The folder cannot be written.
        """
        folder = Path(os.path.realpath(folder))
        with _process.lock:
            known = _process.claims.get(folder)
            if known is not None and known.is_held():
                known.users += 1
                return known
            claim = cls(folder, *_place(folder, expiry_s), period_s)
            _process.claims[folder] = claim
            _process.beat()
        _tidy(folder, claim.number)
        return claim

    def is_held(self) -> bool:
        """Whether the claim is still this process's."""
        if not self._give_up.alive or self._pid != os.getpid() or _newest(self.folder) != self.number:
            return False
        try:
            # Read rather than asked for its status: a network file system then asks its server, and may number its
            # files anew at any time.
            return self._token in (self._path / _OWNER).read_bytes()
        except OSError:
            return False

    def check(self) -> None:
        """Make sure before a write that nobody took the claim over.

        Raises:
            StoreError: It is lost, or this process is a fork of its owner.
        """
        if self._pid != os.getpid():
            raise StoreError(f"this process is a fork of the one that writes {self.folder}; only that one may")
        if not self.is_held():
            raise StoreError(
                f"another process took {self.folder} over while this one was suspended; nothing more was written here, "
                "run the same command again when the other has ended"
            )

    def touch(self) -> None:
        """Give the sign of life; a file system that does not answer is asked again at the next one."""
        # Under the lock nobody closes the handle, whose number could then be another file's.
        with _process.lock, suppress(OSError):
            if self._give_up.alive:
                os.utime(self._owner)

    def release(self) -> None:
        """Give the claim up, if no other user in this process has it."""
        with _process.lock:
            self.users -= 1
            if self.users <= 0:
                self._give_up()


def _path(folder: Path, number: int) -> Path:
    return folder / f".claim.{number:08d}"


def _newest(folder: Path) -> int:
    """Return the number of the claim that counts, 0 where there never was one."""
    try:
        with os.scandir(folder) as entries:
            found = [_NAME.fullmatch(entry.name) for entry in entries]
    except FileNotFoundError:
        return 0
    return max((int(match[1]) for match in found if match), default=0)


def _place(folder: Path, expiry_s: float) -> tuple[int, str]:
    """Put a claim of this process into place and return its number and token."""
    for _ in range(_TRIES):
        token = secrets.token_hex(8)
        draft = _draft(folder, token, expiry_s)
        try:
            number = _place_next(folder, draft, expiry_s)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        if number:
            return number, token
    raise ClaimHeld(None, 0.0, expiry_s)


def _draft(folder: Path, token: str, expiry_s: float) -> Path:
    """Make a whole claim under a name that nobody else has."""
    owner = {
        "token": token,
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "machine": machine_digest(),
        "expiry_s": expiry_s,
    }
    draft = folder / f"{_DRAFT}{token}"
    draft.mkdir()
    (draft / _OWNER).write_text(json.dumps(owner) + "\n", encoding="utf-8")
    return draft


def _place_next(folder: Path, draft: Path, expiry_s: float) -> int:
    """Try once to make the next number; 0 where another was faster and all has to be looked at again."""
    newest = _newest(folder)
    if newest:
        _require_free(_read(_path(folder, newest), expiry_s), draft)
    target = _path(folder, newest + 1)
    try:
        draft.rename(target)
    except OSError:
        # Not every system has the same word for "something is there".
        if target.exists():
            return 0
        raise
    if _newest(folder) == newest + 1:
        return newest + 1
    # Others made this number and a higher one and removed this one, all since it was looked for: it counts for nothing.
    with suppress(OSError):
        target.rename(draft)
    return 0


def _require_free(owner: _Owner | None, draft: Path) -> None:
    """Raise `ClaimHeld` unless a claim may be followed by the next one."""
    if owner is None or owner.released or owner.gone:
        return
    os.utime(draft / _OWNER)
    silent = (draft / _OWNER).stat().st_mtime - owner.touched
    if silent <= owner.expiry_s:
        raise ClaimHeld(owner.pid if owner.here else None, silent, owner.expiry_s)


def _read(path: Path, expiry_s: float) -> _Owner | None:
    """Return what a claim says; None where it vanished, so that a higher number is there."""
    try:
        with (path / _OWNER).open("rb") as handle:
            content, touched = handle.read(), os.fstat(handle.fileno()).st_mtime
    except OSError:
        return _read_without_owner(path, expiry_s)
    try:
        told = json.loads(content)
        return _Owner(
            int(told["pid"]),
            str(told["started"]),
            str(told["machine"]),
            float(told["expiry_s"]),
            touched,
        )
    except (ValueError, KeyError, TypeError):
        # A power cut can empty a file; its age still tells.
        return _Owner(expiry_s=expiry_s, touched=touched)


def _read_without_owner(path: Path, expiry_s: float) -> _Owner | None:
    if (path / _RELEASED).exists():
        return _Owner(released=True)
    try:
        return _Owner(expiry_s=expiry_s, touched=path.stat().st_mtime)
    except OSError:
        return None


def _give_up(path: Path, owner: int, pid: int) -> None:
    """Mark a claim as released; a fork of its process only forgets it."""
    os.close(owner)
    if pid == os.getpid():
        with suppress(OSError):
            (path / _OWNER).rename(path / _RELEASED)


def _tidy(folder: Path, number: int) -> None:
    """Remove lower numbers, and drafts of processes that were killed long ago."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            lower = match is not None and int(match[1]) < number
            if lower or (entry.name.startswith(_DRAFT) and _is_old(entry, folder, number)):
                shutil.rmtree(entry.path, ignore_errors=True)


def _is_old(entry: os.DirEntry[str], folder: Path, number: int) -> bool:
    with suppress(OSError):
        return (_path(folder, number) / _OWNER).stat().st_mtime - entry.stat().st_mtime > EXPIRY_S
    return False


class _Process:
    """The claims of this process and the one thread that touches them all."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.claims: weakref.WeakValueDictionary[Path, Claim] = weakref.WeakValueDictionary()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()

    def beat(self) -> None:
        """Begin to touch the claims, or take notice of a new one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="claims", daemon=True)
            self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        period = PERIOD_S
        while True:
            self._wake.wait(period)
            self._wake.clear()
            period = self._touch_all()

    def _touch_all(self) -> float:
        # Apart from the loop: a name that outlived the touch would keep a claim that nobody else refers to.
        with self.lock:
            held = list(self.claims.values())
        for claim in held:
            claim.touch()
        return min((claim.period_s for claim in held), default=PERIOD_S)


_process = _Process()


def _after_fork() -> None:
    # A fork has neither the thread nor the claims, and a lock that another thread held would stay locked for ever.
    global _process
    _process = _Process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
