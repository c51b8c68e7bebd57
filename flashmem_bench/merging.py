"""Joining the shards that `worker` wrote into one results folder: `flashmem-bench merge`.

Each shard is a results folder of its own. Cells of equal id are joined (see `union` for which rows count); what stands
in the way of one cell, such as a sample with two answers, leaves that cell as it was and all others go on. Workers may
still be running: what they have finished is taken, and a later merge takes the rest. Nothing is written where nothing
is new. A kill at any moment leaves a cell that the next merge completes: first the attempts are there, then the texts,
then the rows.

Traces, banks, marks of ablations and the margins of the first shard come along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmem_bench.claims import PINNED, pinned
from flashmem_bench.durable import make_folder, replace, write_failure
from flashmem_bench.errors import BenchError, StoreError
from flashmem_bench.shards import SHARDS
from flashmem_bench.store import CellStore, ResultStore, cell_id
from flashmem_bench.summary import cell_summary
from flashmem_bench.union import Copy, additions, conflicts

SCHEMA = "SCHEMA.json"


@dataclass
class MergedCell:
    """What became of one cell.

    Attributes:
        samples: Rows that it has now, errors included.
        of: Rows that it should have, as the shards say; None where none of them says.
        errors: Rows that are errors.
        added: Rows that this merge brought.
        missing: Shards that have not delivered all of theirs, with how many of how many.
        problem: Why it was left as it was; None where it was joined.
    """

    suite: str
    method: str
    cell: str
    samples: int = 0
    of: int | None = None
    errors: int = 0
    added: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def complete(self) -> bool:
        """Whether every sample is there and good."""
        return self.problem is None and not self.errors and self.samples >= (self.of or 0)


@dataclass
class Merge:
    """What became of all cells.

    Attributes:
        problems: Folders that could not be read.
    """

    cells: list[MergedCell] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 complete, 1 something was refused, 3 something is missing."""
        if self.problems or any(cell.problem for cell in self.cells):
            return 1
        return 0 if all(cell.complete for cell in self.cells) else 3


def shard_folders(results: Path) -> list[Path]:
    """Return the shards below a results folder.

    Raises:
        BenchError: There is none.
    """
    found = sorted(path.parent for path in (results / SHARDS).glob(f"*/{SCHEMA}"))
    if not found:
        raise BenchError(
            f"there are no shards in {results / SHARDS}; make them with flashmem-bench worker --shard 0/4 and so on, "
            "or name their folders"
        )
    return found


def merge(results: Path, folders: Iterable[Path], note: Callable[[str], None] = lambda text: None) -> Merge:
    """Join the cells of several results folders into one.

    Args:
        results: Where they go.
        folders: Results folders; none of them is changed.
        note: Told what comes along besides cells.

    Raises:
        StoreError: `results` cannot be used.
    """
    outcome, shards = Merge(), []
    for folder in folders:
        try:
            shards.append(_opened(folder))
        except StoreError as error:
            outcome.problems.append(str(error))
    _adopt_margins(results, shards)
    store, cells = ResultStore(results), _by_cell(shards)
    outcome.cells = [_merged(store, parts) for parts in cells.values()]
    # Only now the plain backbone's cell is there, with which summaries compare.
    for cell, parts in zip(outcome.cells, cells.values(), strict=True):
        if cell.problem is None:
            _summarise(store, cell, parts)
    copied = sum(_copy_missing(shard.root / "banks", results / "banks", "*.safetensors") for shard in shards)
    if copied:
        note(f"{copied} banks of memories came along")
    return outcome


def _opened(folder: Path) -> ResultStore:
    if not (folder / SCHEMA).is_file():
        raise StoreError(f"{folder} is no results folder (it has no {SCHEMA}); name one that worker or run has written")
    return ResultStore(folder)


def _adopt_margins(results: Path, shards: Sequence[ResultStore]) -> None:
    """Give a folder that has not begun the margins that were fixed first."""
    if (results / PINNED).exists() or (results / "runs").exists():
        return
    fixed = [(stamp, shard.root) for shard in shards if (stamp := pinned(shard.root)[1])]
    if fixed:
        _copy(min(fixed)[1] / PINNED, results / PINNED)


def _by_cell(shards: Sequence[ResultStore]) -> dict[str, list[CellStore]]:
    found: dict[str, list[CellStore]] = {}
    for shard in shards:
        for cell in shard.cells():
            found.setdefault(cell.cell_id, []).append(cell)
    return dict(sorted(found.items(), key=lambda entry: entry[1][0].path.parts[-3:]))


@dataclass(frozen=True)
class _Part:
    """A cell as one folder has it."""

    cell: CellStore
    manifest: dict[str, Any]
    copy: Copy

    @classmethod
    def read(cls, cell: CellStore) -> _Part:
        # Rows first: a worker that is still running may add a text without its row, never the other way round.
        manifest, rows, texts = cell.manifest, cell.rows(), cell.texts()
        # The rows may be of an attempt that began after the manifest was read.
        known = {entry.get("attempt") for entry in manifest.get("attempts", [])}
        if any(row.get("attempt") not in known for row in rows):
            manifest = cell.manifest
        name = str(cell.path.parents[3])
        return cls(cell, manifest, Copy(name, manifest.get("attempts", []), rows, texts))

    @property
    def descr(self) -> dict[str, Any]:
        return self.manifest.get("descr", {})

    @property
    def latest(self) -> str:
        return max((str(entry.get("started_at") or "") for entry in self.copy.attempts), default="")


def _merged(store: ResultStore, cells: Sequence[CellStore]) -> MergedCell:
    folder = cells[0].path
    outcome = MergedCell(folder.parent.parent.name, folder.parent.name, cells[0].cell_id)
    try:
        parts = [_Part.read(cell) for cell in cells]
        outcome.suite, outcome.method = parts[0].descr["suite"], parts[0].descr["method"]
        _join(store, parts, outcome)
    except StoreError as error:
        outcome.problem = str(error)
    except KeyError as error:
        outcome.problem = f"the manifest in {folder} has no {error}; run the same worker again"
    return outcome


def _join(store: ResultStore, parts: Sequence[_Part], outcome: MergedCell) -> None:
    identity = parts[0].manifest["identity"]
    for part in parts:
        if cell_id(part.manifest["identity"]) != outcome.cell:
            raise StoreError(f"{part.cell.path} is not the cell that its name says; move that folder away")
    target = next((cell for cell in store.cells() if cell.cell_id == outcome.cell), None)
    _refuse_conflicts([*([_Part.read(target)] if target else []), *parts])
    target = _described(store, identity, parts, target)
    with target.claimed():
        # Only now nobody else can write it.
        held = _Part.read(target)
        _refuse_conflicts([held, *parts])
        changes = additions(held.copy, [part.copy for part in parts])
        if changes.attempts != list(held.copy.attempts):
            target.amend(attempts=changes.attempts)
        if changes.samples:
            target.append_many(changes.samples)
    outcome.added = len(changes.samples)
    for part in parts:
        _copy_missing(part.cell.path / "traces", target.path / "traces", "*.json")
    _count(outcome, target, parts)


def _refuse_conflicts(parts: Sequence[_Part]) -> None:
    found = conflicts([part.copy for part in parts])
    if found:
        first, more = found[0], f" (and {len(found) - 1} more samples)" if len(found) > 1 else ""
        raise StoreError(
            f"sample {first.sample} has one answer in {first.first} and another in {first.second}{more}; the cell was "
            "left as it was: find out which machine is wrong, and leave its folder out or run it again"
        )


def _described(
    store: ResultStore, identity: dict[str, Any], parts: Sequence[_Part], target: CellStore | None
) -> CellStore:
    """Open the cell with the description of the attempt that began last, and the marks of all."""
    newest = max(parts, key=lambda part: (part.latest, part.copy.name))
    if target is not None and _Part.read(target).latest >= newest.latest:
        descr = target.manifest["descr"]
    else:
        descr = {key: value for key, value in newest.descr.items() if key != "shard"}
    marks = [mark for part in parts for mark in part.descr.get("ablation") or []]
    cell = target
    # A cell that was asked for by itself stays one, whatever axes it serves besides.
    if any(part.manifest.get("direct") for part in parts):
        cell = store.open_cell(identity, {**descr, "ablation": []})
    if cell is None or marks:
        cell = store.open_cell(identity, {**descr, "ablation": marks})
    return cell


def _summarise(store: ResultStore, outcome: MergedCell, cells: Sequence[CellStore]) -> None:
    """Bring the summary up to date; what only a worker can know of a cell comes from the shards."""
    (target,) = (cell for cell in store.cells() if cell.cell_id == outcome.cell)
    known: dict[str, Any] = {}
    for cell in cells:
        known |= cell.manifest.get("summary", {})
    with target.claimed():
        manifest = target.manifest
        known |= manifest.get("summary", {})
        summary = {**known, **cell_summary(store, target, "complete" if outcome.complete else "partial")}
        if summary != manifest.get("summary"):
            target.amend(summary=summary)


def _count(outcome: MergedCell, target: CellStore, parts: Sequence[_Part]) -> None:
    rows, attempts = target.rows(), target.manifest.get("attempts", [])
    outcome.samples = len(rows)
    outcome.errors = sum(1 for row in rows if row.get("error"))
    told = [entry["shard"] for entry in attempts if entry.get("shard")]
    told += [part.descr["shard"] for part in parts if part.descr.get("shard")]
    outcome.of = max((shard["of"] for shard in told), default=None)
    if outcome.of is None or outcome.samples >= outcome.of:
        return
    of_attempt = {entry["attempt"]: entry["shard"] for entry in attempts if entry.get("shard")}
    made = [of_attempt[row["attempt"]] for row in rows if row["attempt"] in of_attempt]
    outcome.missing = _missing(told, [(shard["index"], shard["count"]) for shard in made])


def _missing(told: Sequence[Mapping[str, int]], made: Sequence[tuple[int, int]]) -> dict[str, str]:
    """Return the shards that have not delivered everything, from what shards tell of themselves."""
    expected: dict[tuple[int, int], int] = {}
    for shard in told:
        key = (shard["index"], shard["count"])
        expected[key] = max(expected.get(key, 0), shard["samples"])
    missing = {}
    for count in sorted({count for _, count in expected}):
        for index in range(count):
            wanted, there = expected.get((index, count)), made.count((index, count))
            if wanted is None:
                missing[f"{index}/{count}"] = "nothing"
            elif there < wanted:
                missing[f"{index}/{count}"] = f"{there} of {wanted}"
    return missing


def _copy_missing(source: Path, target: Path, pattern: str) -> int:
    """Copy the files that are not there yet and return how many those were."""
    new = [path for path in sorted(source.glob(pattern)) if path.is_file() and not (target / path.name).exists()]
    for path in new:
        _copy(path, target / path.name)
    return len(new)


def _copy(source: Path, target: Path) -> None:
    """Copy a file so that a reader sees it whole or not at all."""
    try:
        make_folder(target.parent)
        replace(target, source.read_bytes())
    except OSError as error:
        raise write_failure(target, error) from error
