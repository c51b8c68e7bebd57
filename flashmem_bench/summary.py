"""The summary of a cell, from its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashmem_bench.equality import why_equal

if TYPE_CHECKING:
    from flashmem_bench.store import CellStore, ResultStore


def cell_summary(store: ResultStore, cell: CellStore, status: str) -> dict[str, Any]:
    """Return what the manifest says of all samples of a cell.

    Args:
        store: The folder; the plain backbone's cell in it tells why texts are equal.
        cell: The cell.
        status: complete or partial; a cell with errors is partial whatever this says.
    """
    rows = sorted(cell.rows(), key=lambda row: row["index"])
    scores = [row["score"] for row in rows if row.get("score") is not None and row.get("score_valid")]
    errors = [row["error"] for row in rows if row.get("error")]
    return {
        "status": "partial" if errors else status,
        "n": len(rows),
        "score": sum(scores) / len(scores) if scores else None,
        "errors": len(errors),
        "triggers": sum(row["triggers"] or 0 for row in rows),
        "why_equal": why_equal(store, cell, rows),
    }
