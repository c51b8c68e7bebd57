"""The rows and blocks of the latency protocol on disk: one line a timed run, one a block, appended as they finish."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmem_bench.places import refuse_links
from flashmem_bench.wholeness import check_latency

RUNS, BLOCKS = "runs.jsonl", "blocks.jsonl"


def append(results_dir: Path, rows: Sequence[dict[str, Any]], name: str = RUNS) -> Path:
    """Add lines to a file of the results folder's latency part and return its path."""
    path = results_dir / "latency" / name
    refuse_links(results_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        # What a kill left of a line must not swallow the next one.
        file.write("\n" + lines if torn else lines)
    return path


def read_rows(results_dir: Path, name: str = RUNS) -> list[dict[str, Any]]:
    """Read what `append` wrote; a torn line is left out.

    Raises:
        StoreError: A whole line is no row.
    """
    path = results_dir / "latency" / name
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    if name == RUNS:
        check_latency(rows, path)
    return rows
