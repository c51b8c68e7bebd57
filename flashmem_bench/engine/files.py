"""The document of a command, and one table of the figures of all of them.

`<results>/engine/<stamp>.json` is written after every check, so that a command that is stopped keeps what it has;
`<results>/engine/engine.csv` is made again from all documents each time, one row a figure, and one for every check
without a figure that says why.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashmem_bench.durable import make_folder, replace, write_failure
from flashmem_bench.places import refuse_links

FOLDER, TABLE = "engine", "engine.csv"
_SHARED = ("stamp", "model", "device", "dtype", "exec", "timing", "command")
_FIGURE = ("name", "context", "estimate", "low", "high", "pairs", "expected", "bound", "verdict", "note")
COLUMNS = (*_SHARED[:-1], "check", *_FIGURE, "correct", "skipped", "command")


def write(results_dir: Path, document: dict[str, Any]) -> Path:
    """Write the document of one command and the table of all; returns the path of the document."""
    folder = results_dir / FOLDER
    refuse_links(results_dir)
    path = folder / f"{document['stamp']}.json"
    _replace(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(row for document in read(results_dir) for row in rows(document))
    _replace(folder / TABLE, table.getvalue())
    return path


def read(results_dir: Path) -> list[dict[str, Any]]:
    """Return the documents of a results folder, oldest first."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results_dir / FOLDER).glob("*.json"))]


def rows(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the tidy rows of a document."""
    shared = {name: document[name] for name in _SHARED}
    for outcome in document["checks"]:
        own = {name: outcome[name] for name in ("check", "correct", "skipped")}
        for figure in outcome["figures"] or [{"note": outcome["gate"] if not outcome["correct"] else ""}]:
            yield shared | own | {name: figure.get(name) for name in _FIGURE}


def _replace(path: Path, text: str) -> None:
    try:
        make_folder(path.parent)
        replace(path, text.encode())
    except OSError as error:
        raise write_failure(path, error) from error
