"""Does a results folder say what its sample rows say? Every published number made again, every hash checked.

Four layers: the files are whole (see `repair`); a cell is what its id claims (the hash of its identity) and holds
matching rows; each row obeys the formulas of the schema; and the tables on disk equal those that are made again from
the rows. Nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem_bench.cell_store import CellStore
from flashmem_bench.errors import BenchError, StoreError
from flashmem_bench.repair import Problem, cells_on_disk, file_problems
from flashmem_bench.store import ResultStore, cell_id

if TYPE_CHECKING:
    import pandas as pd

_CLOSE = 1e-9
# Tables that need the memories' folders, not the sample rows.
_NOT_FROM_ROWS = ("training",)


def verify(results_dir: Path, only: str | None = None) -> tuple[int, list[Problem]]:
    """Check a results folder, or one cell of it.

    Args:
        results_dir: The folder.
        only: The beginning of a cell's id; None checks all cells and the tables.

    Returns:
        How many numbers were compared, and what is wrong.

    Raises:
        BenchError: No cell begins so.
    """
    store = ResultStore(results_dir)
    cells = cells_on_disk(store, only)
    if not cells:
        wanted = f"cell {only}" if only else "cell"
        raise BenchError(f"there is no {wanted} in {results_dir}; see flashmem-bench list runs")
    problems, compared = [], 0
    for cell in cells:
        broken = list(file_problems(cell))
        problems += broken
        try:
            problems += cell_problems(cell) if cell.manifest else ()
            compared += sum(len(row) for row in cell.rows())
        except StoreError as error:
            # What cannot be read was named above.
            problems += [] if broken else [Problem(str(cell.path), str(error))]
    if only is None and (results_dir / "tables").is_dir():
        count, wrong = _tables(store, results_dir / "tables")
        compared, problems = compared + count, problems + wrong
    return compared, problems


def cell_problems(cell: CellStore) -> Iterator[Problem]:
    """What is wrong with one cell."""
    name = f"{cell.get('suite')}/{cell.get('method')}/{cell.cell_id}"
    identity = cell.manifest.get("identity") or {}
    if cell_id(identity) != cell.cell_id:
        yield Problem(name, f"its identity hashes to {cell_id(identity)}")
    texts = cell.texts()
    names: set[str] = set()
    yield from (Problem(f"{name} {sample}", what) for sample, what in session_problems(cell.rows()))
    for row in cell.rows():
        where = f"{name} {row.get('sample_id')}"
        if row.get("sample_id") in names:
            yield Problem(where, "two rows of one sample")
        names.add(str(row.get("sample_id")))
        for key in ("suite", "method"):
            if row.get(key) != cell.get(key):
                yield Problem(where, f"{key} is {row.get(key)!r} in the row and {cell.get(key)!r} in the manifest")
        if row.get("sample_id") not in texts:
            yield Problem(where, "its text is missing")
        yield from (Problem(where, sentence) for sentence in row_problems(row, texts.get(str(row.get("sample_id")))))


def row_problems(row: dict[str, Any], text: dict[str, Any] | None = None) -> Iterator[str]:
    """Where a sample row breaks a formula of the schema."""
    for name, value in _derived(row).items():
        if row.get(name) is None or not math.isclose(row[name], value, rel_tol=1e-6, abs_tol=_CLOSE):
            yield f"{name} is {row.get(name)}, its formula gives {value:.6g}"
    for name in ("score", "trigger_rate", "above_tau_rate"):
        value = row.get(name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            yield f"{name} is {value}"
    if text is not None and row.get("triggers") is not None and len(text.get("triggers") or ()) != row["triggers"]:
        yield f"triggers is {row['triggers']} and the text has {len(text.get('triggers') or ())}"
    yield from _reuse_problems(row)
    if row.get("truncated") is not None and row["truncated"] != (row.get("finish_reason") == "length"):
        yield f"truncated is {row['truncated']} and finish_reason {row.get('finish_reason')!r}"


def _reuse_problems(row: dict[str, Any]) -> Iterator[str]:
    """Where the positions of a prompt that went on from a kept history do not add up."""
    reused = row.get("positions_reused")
    if row.get("prefix_reused") is None or reused is None:
        return
    if row["prefix_reused"] != (reused > 0):
        yield f"prefix_reused is {row['prefix_reused']} and positions_reused {reused}"
    if reused > (row.get("prefix_tokens") or 0):
        yield f"positions_reused is {reused}, more than the {row.get('prefix_tokens')} tokens of the history"
    if row["prefix_reused"] and row.get("drawn_tokens") is None:
        # The last token of an answer is never fed.
        whole = row["prompt_tokens"] + row["output_tokens"] - 1 + row["latent_tokens"]
        if row["positions_encoded"] + reused != whole:
            yield f"positions_encoded is {row['positions_encoded']}, its formula gives {whole - reused}"


def session_problems(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Rows that reuse what no earlier row of their session had encoded: (sample id, what)."""
    there: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row.get("index") or 0):
        session, prefix = row.get("session_id"), row.get("prefix_tokens")
        # An earlier question whose attempt failed left no row that could say what it encoded.
        if session is None or prefix is None or row.get("error"):
            continue
        if session in there and (row.get("positions_reused") or 0) > there[session]:
            yield row["sample_id"], f"positions_reused is {row['positions_reused']}, {there[session]} had been encoded"
        there[session] = max(prefix, there.get(session, 0))


def _derived(row: dict[str, Any]) -> dict[str, float]:
    """Columns that follow from others, made again where those are there."""
    found = {}
    known = {key: row[key] for key in row if row[key] is not None}
    if {"triggers", "output_tokens"} <= known.keys():
        found["trigger_rate"] = known["triggers"] / (1 + known["output_tokens"])
    if {"e2e_ms", "prefill_ms"} <= known.keys():
        found["decode_ms"] = known["e2e_ms"] - known["prefill_ms"]
    phases = ("monitor_ms", "consolidate_ms", "inject_ms")
    if found.get("decode_ms", 0) > 0 and set(phases) <= known.keys() and known.get("overhead_share") is not None:
        found["overhead_share"] = sum(known[phase] for phase in phases) / found["decode_ms"]
    one_answer = known.get("drawn_tokens") is None
    if one_answer and {"e2e_ms", "ttft_ms", "output_tokens"} <= known.keys() and known["output_tokens"] > 1:
        found["tpot_ms"] = (known["e2e_ms"] - known["ttft_ms"]) / (known["output_tokens"] - 1)
    return found


def _tables(store: ResultStore, folder: Path) -> tuple[int, list[Problem]]:
    """Compare the tables on disk with those of the rows."""
    import pandas as pd

    from flashmem_bench.report.tables import build_tables

    compared, problems = 0, []
    for name, fresh in build_tables(store).items():
        path = folder / f"{name}.parquet"
        if name in _NOT_FROM_ROWS or not path.exists():
            continue
        try:
            kept = pd.read_parquet(path, dtype_backend="numpy_nullable")
        except (OSError, ValueError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            problems.append(
                Problem(f"tables/{name}", f"it cannot be read ({first}); flashmem-bench report rebuilds it")
            )
            continue
        compared += kept.size
        problems += [Problem(f"tables/{name}", sentence) for sentence in _differences(kept, fresh)]
    return compared, problems


def _differences(kept: pd.DataFrame, fresh: pd.DataFrame) -> list[str]:
    if len(kept) != len(fresh):
        return [f"{len(kept)} rows on disk, {len(fresh)} made again; flashmem-bench report rebuilds it"]
    if list(kept.columns) != list(fresh.columns):
        return ["its columns are not those of this version; flashmem-bench report rebuilds it"]
    found = []
    for column in kept.columns:
        wrong = [
            place for place, (a, b) in enumerate(zip(kept[column], fresh[column], strict=True)) if not _equal(a, b)
        ]
        if wrong:
            a, b = kept[column].iloc[wrong[0]], fresh[column].iloc[wrong[0]]
            found.append(f"{column} differs in {len(wrong)} rows, first in row {wrong[0]}: {a} on disk, {b} made again")
    return found


def _equal(a: Any, b: Any) -> bool:
    import pandas as pd

    if pd.isna(a) or pd.isna(b):
        return bool(pd.isna(a) and pd.isna(b))
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=_CLOSE, abs_tol=_CLOSE)
    return bool(a == b)
