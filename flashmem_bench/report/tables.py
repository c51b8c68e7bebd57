"""From cells to tidy tables.

``build_tables`` derives every table of the schema from the sample rows and nothing else, so each published
number can be recomputed from ``samples``. ``write_tables`` stores them as parquet, with units and formulas in
the metadata, and as csv. Statistics come from ``flashmem_bench.stats`` with a fixed seed: the same rows give
the same tables.

Scores are averaged over the samples whose score is valid; samples that failed stay visible in ``n`` and
``error_rate``. Times are averaged over the samples of one attempt that have them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from flashmem_bench.claims import pinned
from flashmem_bench.latency import read_rows
from flashmem_bench.published import published_score
from flashmem_bench.report.cells import Cell, closeness, load_cells, refusal, settings_differences
from flashmem_bench.report.claims import claim_records
from flashmem_bench.report.compare import compare, comparison_records
from flashmem_bench.report.exports import guarded
from flashmem_bench.report.measures import Record, cost_block, phase_block, score_block, use_block
from flashmem_bench.report.seeds import seed_records
from flashmem_bench.schema import METRIC_PREFIX, TABLES, Column, arrow_schema

if TYPE_CHECKING:
    from flashmem_bench.store import ResultStore

_PANDAS = {"string": "string", "int": "Int64", "float": "float64", "bool": "boolean"}


def build_tables(store: ResultStore, suites: Collection[str] | None = None) -> dict[str, pd.DataFrame]:
    """All tables of the schema.

    Args:
        store: the results.
        suites: names to restrict to; None takes all.

    Returns:
        Table name -> frame with exactly the schema's columns; empty tables keep theirs.
    """
    return tables_of(load_cells(store, suites), read_rows(store.root), margins=pinned(store.root))


def tables_of(
    cells: Sequence[Cell],
    latency: Sequence[Record] = (),
    training: Sequence[Record] = (),
    *,
    unequal: bool = False,
    margins: tuple[dict[str, float], str | None] = ({}, None),
) -> dict[str, pd.DataFrame]:
    """The same for cells that are already loaded.

    Args:
        cells: the cells.
        latency: rows of the latency protocol.
        training: steps of the trainings of their memories.
        unequal: compare cells under different conditions too (see `comparison_records`).
        margins: of the claims, as the results folder fixed them, and when.
    """
    comparisons = comparison_records(cells, unequal=unequal)
    records: dict[str, list[Record]] = {
        "samples": [{**row, "cell": cell.cell_id} for cell in cells for row in cell.rows],
        "metrics": [record for cell in cells for record in _metric_records(cell)],
        "runs": run_records(cells, comparisons),
        "strata": [record for cell in cells if cell.is_main for record in _stratum_records(cell)],
        "seeds": seed_records(cells),
        "comparisons": comparisons,
        "latency": list(latency),
        "ablations": ablation_records(cells),
        "training": list(training),
        "claims": claim_records(cells, latency, *margins),
    }
    return {name: frame(records[name], columns) for name, columns in TABLES.items()}


def frame(records: Iterable[Record], columns: Sequence[Column]) -> pd.DataFrame:
    """A frame with exactly these columns and their nullable types; other keys are left out."""
    rows = list(records)
    return pd.DataFrame(
        {
            column.name: pd.Series([row.get(column.name) for row in rows], dtype=_PANDAS[column.dtype])
            for column in columns
        }
    )


def write_tables(tables: dict[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Write each table as parquet and csv; returns the paths. A reader never sees half a file."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in tables.items():
        for suffix in ("parquet", "csv"):
            path = folder / f"{name}.{suffix}"
            temporary = path.with_suffix(f".{suffix}.tmp")
            if suffix == "csv":
                guarded(table).to_csv(temporary, index=False)
            else:
                arrow = pa.Table.from_pandas(table, schema=arrow_schema(TABLES[name]), preserve_index=False)
                parquet.write_table(arrow.replace_schema_metadata(arrow_schema(TABLES[name]).metadata), temporary)
            temporary.replace(path)
            paths.append(path)
    return paths


def run_records(cells: Sequence[Cell], comparisons: Sequence[Record]) -> list[Record]:
    """One record a cell: score, use, cost, and the difference from vanilla for headline cells."""
    against_vanilla = {record["cell_a"]: record for record in comparisons if record["kind"] == "baseline"}
    differences = settings_differences(cells)
    records = []
    for cell in cells:
        versus = against_vanilla.get(cell.cell_id, {})
        records.append(
            {
                **_descr_block(cell),
                "settings": differences[cell.cell_id],
                **score_block(cell.rows),
                "published_score": published_score(cell.suite, cell.method, str(cell.rows[0].get("model"))),
                "delta_vanilla": versus.get("difference"),
                "delta_low": versus.get("low"),
                "delta_high": versus.get("high"),
                "time_ratio": versus.get("time_ratio"),
                "decode_time_ratio": versus.get("decode_time_ratio"),
                "same_text_share": versus.get("same_text_share"),
                "why_equal": cell.summary.get("why_equal"),
                **use_block(cell.rows),
                **_times(cell),
                **phase_block(cell.rows, cell.timed_rows),
            }
        )
    return records


def ablation_records(cells: Sequence[Cell]) -> list[Record]:
    """One record for each axis that a cell is a point of, with its difference from the reference point."""
    records = []
    for cell in cells:
        for mark in cell.ablation:
            reference = cell if mark.get("reference") else _reference(cell, mark["axis"], cells)
            delta = compare(cell, reference, "ablation") if reference not in (None, cell) else {}
            records.append(
                {
                    **_descr_block(cell),
                    # Of an axis of methods every point belongs to the sheet of the reference method.
                    "method": mark.get("of") or cell.method,
                    "axis": mark["axis"],
                    "value": "none" if mark["value"] is None else str(mark["value"]),
                    "value_number": _number(mark["value"]),
                    "reference": bool(mark.get("reference")),
                    "reference_cell": reference.cell_id if reference else None,
                    **score_block(cell.rows),
                    "delta_reference": delta.get("difference"),
                    "delta_low": delta.get("low"),
                    "delta_high": delta.get("high"),
                    **use_block(cell.rows),
                    **_times(cell),
                }
            )
    return sorted(records, key=_axis_order)


def _descr_block(cell: Cell) -> Record:
    first = cell.rows[0]
    names = (
        "model",
        "seed",
        "train_seed",
        "device",
        "dtype",
        "batch_size",
        "exec",
        "checkpoint_scope",
        "tau_source",
    )
    return {
        "cell": cell.cell_id,
        "suite": cell.suite,
        "method": cell.method,
        **{name: first.get(name) for name in names},
        "role": "main" if cell.is_main else "ablation",
        "status": cell.status,
        "beyond_trained_context": any(row.get("beyond_trained_context") for row in cell.rows),
        "attempts": len({row.get("attempt") for row in cell.rows}),
    }


def _times(cell: Cell) -> Record:
    timed = {"timed_attempt": cell.timed_attempt, "timed_samples": len(cell.timed_rows)}
    return cost_block(cell.timed_rows) | timed


def _metric_records(cell: Cell) -> list[Record]:
    return [
        {
            "cell": cell.cell_id,
            "suite": cell.suite,
            "method": cell.method,
            "sample_id": row["sample_id"],
            "metric": key.removeprefix(METRIC_PREFIX),
            "value": value,
        }
        for row in cell.rows
        for key, value in row.items()
        if key.startswith(METRIC_PREFIX)
    ]


def _stratum_records(cell: Cell) -> list[Record]:
    strata = dict.fromkeys(row["stratum"] for row in cell.rows if row.get("stratum") is not None)
    return [
        {
            "cell": cell.cell_id,
            "suite": cell.suite,
            "method": cell.method,
            "stratum": stratum,
            **score_block([row for row in cell.rows if row.get("stratum") == stratum]),
        }
        for stratum in sorted(strata, key=_natural)
    ]


def _reference(cell: Cell, axis: str, cells: Sequence[Cell]) -> Cell | None:
    candidates = [
        other
        for other in cells
        if other.suite == cell.suite
        and any(
            mark["axis"] == axis and mark.get("reference") and (mark.get("of") or cell.method) == other.method
            for mark in other.ablation
        )
        and refusal(cell, other) is None
    ]
    # A memory is compared with the reference memory of its own training seed.
    return max(candidates, key=lambda c: (c.train_seed == cell.train_seed, *closeness(cell, c)), default=None)


def _axis_order(record: Record) -> tuple[Any, ...]:
    number = record["value_number"]
    place = (2, 0.0, record["value"]) if number is None else (int(is_percentile(record["value"])), number, "")
    return record["axis"], record["suite"], record["method"], record["reference_cell"] or "", place


def is_percentile(value: str) -> bool:
    """Whether a value of an axis is written as a percentile, such as p85."""
    return re.fullmatch(r"p\d+(\.\d+)?", value) is not None


def _number(value: Any) -> float | None:
    if isinstance(value, str) and is_percentile(value):
        return float(value[1:])
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key by which n=16 comes after n=8."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]
