"""The rows and blocks of the latency protocol on disk: one line a timed run, one a block, appended as they finish."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmem_bench.durable import append_lines, write_failure
from flashmem_bench.places import refuse_links
from flashmem_bench.wholeness import check_latency

RUNS, BLOCKS = "runs.jsonl", "blocks.jsonl"


def append(results_dir: Path, rows: Sequence[dict[str, Any]], name: str = RUNS) -> Path:
    """Add lines to a file of the results folder's latency part, durably, and return its path.

    Raises:
        StoreError: The write failed; none of the lines is there.
    """
    path = results_dir / "latency" / name
    refuse_links(results_dir)
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    try:
        append_lines(path, lines.encode())
    except OSError as error:
        raise write_failure(path, error, "the blocks before are safe") from error
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
