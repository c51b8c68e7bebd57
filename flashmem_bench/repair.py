"""Are the files of a results folder whole, and what is done where they are not.

A fault of a disk breaks a line or a manifest. Repairing puts what is broken aside, inside the folder of its cell, and
deletes nothing: broken lines go to `quarantine.jsonl`, so that their samples are run again; a manifest gets another
name, so that the command which made the cell describes it anew and goes on with its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashmem_bench.cell_store import MANIFEST, SAMPLES, TEXTS, CellStore
from flashmem_bench.errors import StoreError
from flashmem_bench.lines import scan
from flashmem_bench.store import ResultStore

REPAIR = "flashmem-bench verify --repair puts it aside"


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be."""

    where: str
    what: str


def cells_on_disk(store: ResultStore, only: str | None = None) -> list[CellStore]:
    """Return every cell that has a manifest or rows, whether they can be read or not.

    Args:
        store: The results.
        only: The beginning of a cell's id; None takes all.
    """
    found = {path.parent for name in (MANIFEST, SAMPLES) for path in (store.root / "runs").glob(f"*/*/*/{name}")}
    return [CellStore(path, path.name) for path in sorted(found) if path.name.startswith(only or "")]


def file_problems(cell: CellStore) -> Iterator[Problem]:
    """Yield what is broken in the files of a cell."""
    where = f"{cell.path.parent.parent.name}/{cell.path.parent.name}/{cell.cell_id}"
    for name in (TEXTS, SAMPLES):
        found = scan(cell.path / name)
        for number in found.broken:
            yield Problem(f"{where} {name}", f"line {number} is broken; {REPAIR}")
        late = len(found.lines) - found.kept + bool(found.rest)
        if late:
            yield Problem(f"{where} {name}", f"ends in {late} broken lines; the command that made it runs them again")
    try:
        if not cell.manifest:
            yield Problem(where, f"{MANIFEST} is missing; the command that made the cell writes it anew")
    except StoreError:
        yield Problem(where, f"{MANIFEST} cannot be read; {REPAIR}")


def repair(cell: CellStore) -> list[str]:
    """Put aside what is broken in a cell; returns what was done, one sentence each.

    Raises:
        StoreError: Another process writes the cell, or the disk refused.
    """
    if not any(True for _ in file_problems(cell)):
        return []
    done = [
        f"{cell.path / name}: {count} broken lines put aside" for name, count in cell.put_broken_lines_aside().items()
    ]
    moved = cell.put_broken_manifest_aside()
    if moved is not None:
        done.append(f"{cell.path / MANIFEST}: put aside as {moved.name}")
    return done
