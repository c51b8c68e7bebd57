"""Results of an earlier version become results of this one, in place, and a kill at any moment does no harm.

A step changes rows; it is given the row of one version and returns that of the next. Cells are changed one by one, each
file atomically: first the rows, then the manifest that says of which version they are, and last of all the folder. What
was changed before a kill is changed again to the same, so the next command goes on. Ids of cells do not change, since
they hold no version of the tables. Broken lines stay as they are, for `verify` to name.

One process migrates: others are refused meanwhile, and it refuses while a process of an earlier version is writing.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flashmem_bench.cell_store import MANIFEST, SAMPLES
from flashmem_bench.durable import read_json, remove_leftovers, replace, replace_json, write_failure
from flashmem_bench.errors import StoreError
from flashmem_bench.lease import Claim, ClaimHeld
from flashmem_bench.lines import Record, encode, scan
from flashmem_bench.schema import SCHEMA_VERSION

Step = Callable[[Record], Record]
_LOCK = ".lock"
_log = logging.getLogger(__name__)


def _one_process(row: Record) -> Record:
    """Version 2 to 3: before it, one process did all and every time counted."""
    return {**row, "timing_valid": row.get("timing_valid", True), "workers": row.get("workers", 1),
            "worker": row.get("worker")}  # fmt: skip


STEPS: dict[int, Step] = {2: _one_process}


def can_migrate(version: object) -> bool:
    """Return whether there is a way from a version to this one."""
    if not isinstance(version, int) or version >= SCHEMA_VERSION:
        return False
    return all(step in STEPS for step in range(version, SCHEMA_VERSION))


def migrate(root: Path, schema: Path) -> None:
    """Make the results of an earlier version results of this one.

    Args:
        root: The results folder.
        schema: Its file that holds the version; written last.

    Raises:
        StoreError: Another process writes the folder, or the disk refused; the next command goes on.
    """
    with _alone(root):
        document = read_json(schema)
        version = document.get("schema_version")
        if not isinstance(version, int) or version >= SCHEMA_VERSION:
            return
        folders = sorted({path.parent for name in (MANIFEST, SAMPLES) for path in root.glob(f"runs/*/*/*/{name}")})
        for folder in folders:
            _refuse_while_written(folder)
        for folder in folders:
            _migrate_cell(folder, version)
        _write(schema, lambda: replace_json(schema, {**document, "schema_version": SCHEMA_VERSION}))
    _log.warning("%s: %d cells of version %d are now of version %d", root, len(folders), version, SCHEMA_VERSION)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    try:
        claim = Claim.take(root)
    except ClaimHeld as held:
        raise StoreError(
            f"another process is bringing {root} to the version of this program ({held}); {held.advice}, then run the "
            "same command again"
        ) from held
    except OSError as error:
        raise write_failure(root, error) from error
    try:
        yield
    finally:
        claim.release()


def _refuse_while_written(folder: Path) -> None:
    """Raise where a process of an earlier version, which knows only record locks, is writing a cell."""
    if not (folder / _LOCK).exists():
        return
    try:
        with (folder / _LOCK).open("ab") as handle:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(
            f"an earlier version of flashmem-bench is writing {folder}; wait for it to end, then run the same command "
            "again"
        ) from error
    except OSError:
        # A file system without locks, where the earlier version could not have run either.
        return


def _migrate_cell(folder: Path, version: int) -> None:
    manifest = _manifest(folder)
    version = int(manifest.get("schema_version", version))
    if version >= SCHEMA_VERSION:
        return
    found = scan(folder / SAMPLES)
    steps = [STEPS[number] for number in range(version, SCHEMA_VERSION)]
    lines = [
        line + b"\n" if record is None else encode(_through(steps, record))
        for line, record in zip(found.lines, found.records, strict=True)
    ]
    if (folder / SAMPLES).exists():
        remove_leftovers(folder)
        _write(folder, lambda: replace(folder / SAMPLES, b"".join(lines) + found.rest))
    if manifest:
        changed = {**manifest, "schema_version": SCHEMA_VERSION}
        _write(folder, lambda: replace_json(folder / MANIFEST, changed))
    (folder / _LOCK).unlink(missing_ok=True)


def _manifest(folder: Path) -> Record:
    """Return the manifest, empty where it cannot be read; `verify` names it then."""
    try:
        return read_json(folder / MANIFEST)
    except StoreError:
        return {}


def _through(steps: list[Step], row: Record) -> Record:
    for step in steps:
        row = step(row)
    return row


def _write(path: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise write_failure(path, error) from error
