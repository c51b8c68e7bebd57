"""Why a method's texts are the same as those of `vanilla`, where they are.

A row that equals the baseline is either a finding (the memory changes nothing) or an accident (the trigger never
fired), and a table cannot tell which. The sentence made here goes into the cell's summary and the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flashmem_bench.registry import get_method

if TYPE_CHECKING:
    from flashmem_bench.cell_store import CellStore
    from flashmem_bench.store import ResultStore

BASELINE = "vanilla"
# Parts of an identity that must agree before two cells answer the same question in the same way.
_SAME = ("suite", "suite_hash", "fingerprint", "template", "device", "dtype", "split", "generation", "truncate", "seed",
         "batch_size")  # fmt: skip


def why_equal(store: ResultStore, cell: CellStore, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Say why every text of the cell equals vanilla's; None where one differs or nothing can be compared."""
    good = [row for row in rows if row.get("error") is None]
    if cell.get("method") == BASELINE or not good:
        return None
    triggers = any(row["triggers"] for row in good)
    if not triggers and "trigger" in get_method(cell.get("method")).uses:
        return f"no memory was injected in {len(good)} samples: {_why_no_trigger(cell, good)}"
    baseline = _baseline(store, cell)
    if baseline is None or not _all_equal(cell, baseline, good):
        return None
    if not triggers:
        return _why_without_memory(good)
    injected = sum(row["triggers"] for row in good)
    if cell.get("settings", {}).get("sampling", {}).get("logits") == "pre":
        return (
            f"{injected} memories were injected, but the next token is taken from the logits before each injection, "
            "and no later token changed (on one-token answers none can)"
        )
    return f"{injected} memories were injected and none of them changed a token"


def _why_without_memory(rows: Sequence[Mapping[str, Any]]) -> str:
    if any(row.get("positions_evicted") for row in rows):
        dropped = sum(row["positions_evicted"] > 0 for row in rows)
        return f"positions were dropped from {dropped} of {len(rows)} prompts and no token changed"
    if any(row.get("drawn_tokens") for row in rows):
        return "the vote chose what greedy decoding gives, for every sample"
    return "nothing that the method changes reached a token; a prompt within a budget is left as it is"


def _why_no_trigger(cell: CellStore, rows: Sequence[Mapping[str, Any]]) -> str:
    thresholds = {row["threshold"] for row in rows if row.get("threshold") is not None}
    if thresholds:
        tau = " or ".join(f"{value:.4g}" for value in sorted(thresholds)[:3])
        return f"no decision step exceeded the threshold of {tau} nats"
    kind = cell.get("settings", {}).get("trigger", {}).get("kind", "its")
    if kind == "random":
        return "the flashmem cell that it is matched to injected none either, or the draw gave none"
    return f"the {kind} trigger never fired"


def _baseline(store: ResultStore, cell: CellStore) -> CellStore | None:
    mine = cell.manifest.get("identity", {})
    for other in store.find(suite=cell.get("suite"), method=BASELINE):
        theirs = other.manifest.get("identity", {})
        if all(mine.get(key) == theirs.get(key) for key in _SAME) and _exec(mine) == _exec(theirs):
            return other
    return None


def _exec(identity: Mapping[str, Any]) -> str | None:
    return (identity.get("settings") or {}).get("exec")


def _all_equal(cell: CellStore, baseline: CellStore, rows: Sequence[Mapping[str, Any]]) -> bool:
    mine, theirs = cell.texts(), baseline.texts()
    ids = [row["sample_id"] for row in rows]
    return all(name in theirs and mine[name]["text"] == theirs[name]["text"] for name in ids)
