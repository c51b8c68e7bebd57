"""`flashmem-bench describe COLUMN`: unit, formula and meaning of a result column."""

from __future__ import annotations

from typing import Annotated

import typer

from flashmem_bench.cli import options as o


def describe(
    column: Annotated[str, typer.Argument(help="Name of a column of any result table.", show_default=False)],
    json: o.Json = False,
    debug: o.Debug = False,
) -> int:
    """Explain a column of the result tables."""
    from flashmem_bench.errors import UnknownNameError
    from flashmem_bench.schema import TABLES, find_column

    found = find_column(column)
    if not found:
        raise UnknownNameError("column", column, {c.name for columns in TABLES.values() for c in columns})
    merged: dict[tuple[str, ...], list[str]] = {}
    for table, entry in found:
        merged.setdefault((entry.dtype, entry.unit, entry.formula, entry.description), []).append(table)
    if json:
        keys = ("dtype", "unit", "formula", "description")
        o.emit_json([{"column": column, "tables": tables, **dict(zip(keys, key, strict=True))}
                     for key, tables in merged.items()])  # fmt: skip
        return 0
    for (dtype, unit, formula, text), tables in merged.items():
        o.tell(f"{column} ({dtype}{', ' + unit if unit else ''}) in {', '.join(tables)}")
        o.tell(f"  {text}")
        if formula:
            o.tell(f"  = {formula}")
    return 0
