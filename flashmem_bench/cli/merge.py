"""`flashmem-bench merge`: the shards of a grid, joined into one results folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashmem_bench.cli import options as o

if TYPE_CHECKING:
    from flashmem_bench.merging import Merge


def merge(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders of shards; default: all below the results folder.")
    ] = None,
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Join what workers have finished so far. Repeat it as often as you like; exit 3 while samples are missing.

    Example: flashmem-bench merge
    """
    o.set_up_logging(debug)
    from flashmem_bench.merging import merge as join
    from flashmem_bench.merging import shard_folders

    outcome = join(results_dir, folders or shard_folders(results_dir), lambda text: o.say(text, quiet))
    if json:
        cells = [{**asdict(cell), "complete": cell.complete} for cell in outcome.cells]
        o.emit_json({"results_dir": str(results_dir), "cells": cells, "problems": outcome.problems})
    elif not quiet:
        _show(outcome)
        o.tell(f"results in {results_dir.resolve()}")
    for problem in outcome.problems:
        o.say(f"error: {problem}")
    for cell in outcome.cells:
        if cell.problem:
            o.say(f"error: {cell.suite} x {cell.method} was not joined: {cell.problem}")
    return outcome.exit_code


def _show(outcome: Merge) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="merged cells")
    for heading in ("suite", "method", "cell", "samples", "errors", "new", "missing"):
        table.add_column(heading, justify="right" if heading in ("samples", "errors", "new") else "left")
    for cell in outcome.cells:
        of = f"{cell.samples} of {cell.of}" if cell.of is not None else str(cell.samples)
        missing = ", ".join(f"shard {shard}: {what}" for shard, what in cell.missing.items())
        told = (cell.suite, cell.method, cell.cell, of, str(cell.errors), str(cell.added), missing or "-")
        table.add_row(*(Text(entry) for entry in told))
    o.console().print(table)
