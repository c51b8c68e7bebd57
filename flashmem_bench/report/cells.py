"""Finished cells as the report sees them, and the rule for which of them may be compared.

Two cells are compared only when they answered the same prompts under the same conditions: backbone, device,
dtype, batch size and execution mode, checked on the recorded values rather than on names. Everything else is
shown apart, with the reason among the warnings.

A cell that exists only as a point of an ablation axis is kept out of the headline tables. Of several headline
cells of one suite and method, each carries the settings in which they differ.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flashmem_bench.cell_store import CellStore
from flashmem_bench.errors import StoreError
from flashmem_bench.registry import method_names
from flashmem_bench.store import ResultStore
from flashmem_bench.wholeness import check_texts

_log = logging.getLogger(__name__)

VANILLA = "vanilla"
FLASHMEM = "flashmem"
PLACEBOS = (
    "flashmem-random-trigger",
    "flashmem-random-memory",
    "flashmem-shuffled-memory",
    "flashmem-mean-memory",
    "flashmem-noop-memory",
)
CONDITIONS = ("model", "device", "dtype", "batch_size", "exec")
_SHOWN_LETTERS = 16
# Parts of an identity that decide what was asked and how much could be answered.
_SAME_QUESTION = ("suite_hash", "split", "template", "truncate", "attention", "generation.", "prefix_reuse")


@dataclass(frozen=True)
class Cell:
    """One cell with its rows in suite order.

    Attributes:
        store: where it lies.
        manifest: its manifest, read once.
        rows: finished samples, ordered by index.
    """

    store: CellStore
    manifest: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    @property
    def cell_id(self) -> str:
        """Id of the cell."""
        return self.store.cell_id

    @property
    def suite(self) -> str:
        """Name of the suite."""
        return str(self.manifest["descr"]["suite"])

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.manifest["descr"]["method"])

    @property
    def summary(self) -> dict[str, Any]:
        """What the runner said at the end of the last finished attempt."""
        return self.manifest.get("summary") or {}

    @property
    def train_seed(self) -> int | None:
        """Training seed of its memory; None where it has none or nobody knows."""
        return self.rows[0].get("train_seed")

    @property
    def scope(self) -> str | None:
        """What its memory was trained on: suite, joint or transfer; None where it has none."""
        return self.rows[0].get("checkpoint_scope")

    @property
    def ablation(self) -> list[dict[str, Any]]:
        """The axes that this cell is a point of."""
        return self.manifest["descr"].get("ablation") or []

    @property
    def is_main(self) -> bool:
        """Whether it belongs in the headline tables."""
        marks = self.ablation
        return self.manifest.get("direct", False) or not marks or any(mark.get("reference") for mark in marks)

    @property
    def status(self) -> str:
        """``complete``, or ``partial`` when the last attempt was stopped or some samples failed."""
        return "partial" if self.stopped or self.summary.get("status") == "partial" else "complete"

    @property
    def stopped(self) -> bool:
        """Whether the last attempt was killed or interrupted before its last sample."""
        attempts = self.manifest.get("attempts") or []
        # A manifest that was made anew has no attempts, and a summary since its command was run again.
        if "finished_at" not in attempts[-1] if attempts else not self.summary:
            return True
        return self.summary.get("status") == "partial" and not self.summary.get("errors")

    @cached_property
    def condition(self) -> tuple[Any, ...]:
        """What must agree before two cells are compared; the backbone counts by its weights where known."""
        first = self.rows[0]
        backbone = _leaf(self.settings, "fingerprint") or first.get("model")
        return (backbone, *(first.get(name) for name in CONDITIONS[1:]))

    @property
    def condition_text(self) -> str:
        """The conditions in words."""
        first = self.rows[0]
        model, device, dtype, batch, mode = (first.get(name) for name in CONDITIONS)
        return f"{model}, {device}, {dtype}, batch {batch}, {mode}"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The identity with dotted keys."""
        return flatten(self.manifest.get("identity") or {})

    @cached_property
    def texts(self) -> dict[str, dict[str, Any]]:
        """Texts, tokens and entropies by sample id."""
        texts = self.store.texts()
        check_texts(texts, self.store.path)
        return texts

    @cached_property
    def timed_attempt(self) -> int | None:
        """The attempt whose times stand for the cell, see `timed_rows`; None where no time counts."""
        return self.timed_rows[0].get("attempt") if self.timed_rows else None

    @cached_property
    def timed_rows(self) -> tuple[dict[str, Any], ...]:
        """The rows whose times count, all of one attempt."""
        return timed_rows(self.rows)

    @cached_property
    def timed_by_sample(self) -> dict[str, dict[str, Any]]:
        """The rows whose times count, by sample id."""
        return {row["sample_id"]: row for row in self.timed_rows}

    @cached_property
    def by_sample(self) -> dict[str, dict[str, Any]]:
        """Rows by sample id."""
        return {row["sample_id"]: row for row in self.rows}


def load_cells(
    store: ResultStore, suites: Collection[str] | None = None, problems: list[str] | None = None
) -> list[Cell]:
    """All cells with at least one row that can be read, in the order of the tables: suite, method, id.

    Args:
        store: the results.
        suites: names to restrict to; None takes all.
        problems: gets a sentence for every cell that cannot be read; None sends them to the log.
    """
    order = {name: place for place, name in enumerate(method_names())}
    cells = []
    for entry in store.cells():
        try:
            manifest = entry.manifest
            if suites is not None and manifest["descr"]["suite"] not in suites:
                continue
            rows = tuple(sorted(entry.rows(), key=lambda row: (row.get("index") or 0, row["sample_id"])))
        except StoreError as error:
            if problems is None:
                _log.warning("a cell is left out: %s", error)
            else:
                problems.append(f"a cell is left out: {error}")
            continue
        if rows:
            cells.append(Cell(entry, manifest, rows))
    return sorted(cells, key=lambda cell: (cell.suite, order.get(cell.method, len(order)), cell.method, cell.cell_id))


def timed_rows(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The rows of a cell that its times may come from.

    Two attempts may have run on other machines, or on one that did something else, so their times are never put
    together: those of the attempt with the most usable times count, of the later one where two have as many.
    """
    attempts: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("timing_valid") is not False and row.get("e2e_ms") is not None:
            attempts.setdefault(row.get("attempt") or 0, []).append(row)
    best = max(attempts, key=lambda number: (len(attempts[number]), number), default=None)
    return tuple(attempts[best]) if best is not None else ()


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with its keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat.update(flatten(inner, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


def settings_differences(cells: Sequence[Cell]) -> dict[str, str]:
    """For each cell id the settings in which it differs from its peers.

    Peers are the headline cells of the same suite and method under the same conditions; ablation points have none.
    """
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in (cell for cell in cells if cell.is_main):
        groups.setdefault((cell.suite, cell.method, cell.condition), []).append(cell)
    different = {cell.cell_id: "" for cell in cells}
    for peers in groups.values():
        told = [_told(peer, peers) for peer in peers]
        keys = sorted({key for settings in told for key in settings})
        odd = [key for key in keys if len({repr(settings.get(key)) for settings in told}) > 1]
        for peer, settings in zip(peers, told, strict=True):
            different[peer.cell_id] = ", ".join(f"{_short_key(key)}={_shown(settings.get(key))}" for key in odd)
    return different


def _told(cell: Cell, peers: Sequence[Cell]) -> dict[str, Any]:
    """The settings of a cell, its memory named by scope and training seed where these say which one it is."""
    memories = {(peer.settings.get("memory"), (peer.scope, peer.train_seed)) for peer in peers}
    if cell.train_seed is None or len({names for _, names in memories}) < len(memories):
        return cell.settings
    return {**cell.settings, "memory": f"{cell.scope} seed {cell.train_seed}"}


def _short_key(key: str) -> str:
    return key.removeprefix("settings.")


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


def shared_samples(a: Cell, b: Cell) -> list[str]:
    """Ids of the samples that both cells have, in suite order."""
    return [name for name in a.by_sample if name in b.by_sample]


def timed_pairs(a: Cell, b: Cell) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows of samples whose times count in both cells, in suite order."""
    return [(row, b.timed_by_sample[name]) for name, row in a.timed_by_sample.items() if name in b.timed_by_sample]


def refusal(a: Cell, b: Cell) -> str | None:
    """Why two cells of one suite cannot be compared; None when they can."""
    if a.condition != b.condition:
        return f"{a.condition_text} against {b.condition_text}"
    shared = shared_samples(a, b)
    if not shared:
        return "no sample in common"
    for key in sorted({*a.settings} & {*b.settings}):
        if key.startswith(_SAME_QUESTION) and a.settings[key] != b.settings[key]:
            return f"different {key}: {_shown(a.settings[key])} against {_shown(b.settings[key])}"
    odd = sum(a.by_sample[name].get("prompt_sha") != b.by_sample[name].get("prompt_sha") for name in shared)
    if odd:
        return f"{odd} of {len(shared)} common samples have different prompts"
    return None


def partner(cell: Cell, method: str, cells: Iterable[Cell], *, unequal: bool = False) -> Cell | None:
    """The headline cell of a method that a cell is best compared with, None when none may be.

    Among those that may, the one with the same seed, then with most settings equal, then with most samples
    shared. With `unequal`, where none may be compared, one of the others that have samples in common.
    """
    there = [other for other in cells if (other.suite, other.method) == (cell.suite, method) and other.is_main]
    candidates = [other for other in there if refusal(cell, other) is None]
    if unequal and not candidates:
        candidates = [other for other in there if shared_samples(cell, other)]
    return max(candidates, key=lambda other: closeness(cell, other), default=None)


def closeness(a: Cell, b: Cell) -> tuple[bool, int, int]:
    """How well two cells go together: same seed, equal settings, shared samples."""
    equal = sum(b.settings.get(key) == value for key, value in a.settings.items())
    return a.rows[0].get("seed") == b.rows[0].get("seed"), equal, len(shared_samples(a, b))


def _leaf(settings: Mapping[str, Any], name: str) -> Any:
    return next((value for key, value in settings.items() if key.rpartition(".")[2].endswith(name)), None)
