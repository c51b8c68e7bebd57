"""`flashmem-bench list`: what there is to name, without loading torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashmem_bench.cli import options as o

KINDS = ("suites", "methods", "ablations", "models", "runs")


def list_names(
    kind: Annotated[str, typer.Argument(help="suites, methods, ablations, models or runs.", show_default=False)],
    data_dir: o.DataDir = None,
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    debug: o.Debug = False,
) -> int:
    """List suites, methods, ablations, models or runs.

    Example: flashmem-bench list suites --data-dir data
    """
    from flashmem_bench.errors import UsageError, near_misses

    makers = {
        "suites": lambda: _suites(data_dir),
        "methods": _methods,
        "ablations": _ablations,
        "models": lambda: _models(results_dir),
        "runs": lambda: _runs(results_dir),
    }
    if kind not in makers:
        near = near_misses(kind, KINDS)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UsageError(f"nothing to list under {kind!r}{hint}; there are {', '.join(KINDS)}")
    rows = makers[kind]()
    if not rows and not json:
        o.say(f"no {kind} yet in {results_dir}")
        return 0
    return show_rows(rows, json=json)


def show_rows(rows: list[dict[str, Any]], *, json: bool) -> int:
    """Print rows as a table, or as JSON."""
    if json:
        o.emit_json(rows)
        return 0
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in rows[0] if rows else ():
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    o.console().print(table)
    return 0


def _suites(data_dir: Path | None) -> list[dict[str, Any]]:
    from flashmem_bench.reachable import reach
    from flashmem_bench.suites import list_suites

    rows = []
    for info in list_suites():
        found = reach(info, data_dir)
        rows.append(
            {
                "suite": info.name,
                "kind": info.kind,
                "rows": found.rows,
                "licence": info.licence,
                "source": found.source,
                "reachable": found.reachable,
                "what": info.title,
            }
        )
    return rows


def _methods() -> list[dict[str, Any]]:
    from flashmem_bench.registry import get_method, method_names

    return [{"method": name, "what": get_method(name).summary} for name in method_names()]


def _ablations() -> list[dict[str, Any]]:
    from flashmem_bench.ablations import AXES

    return [{"axis": a.name, "what": a.summary, "values": ", ".join(a.values), "setting": a.key} for a in AXES]


def _models(results_dir: Path) -> list[dict[str, Any]]:
    from flashmem_bench.models import BUNDLED, BUNDLED_SUMMARY

    found = {BUNDLED: BUNDLED_SUMMARY}
    for part in ("checkpoints", "thresholds"):
        for folder in sorted((results_dir / part).glob("*")):
            if folder.is_dir():
                found.setdefault(folder.name, f"has {part} in {results_dir}")
    return [{"model": name, "what": text} for name, text in found.items()]


def _names(folder: Path) -> dict[str, str]:
    return {"suite": folder.parent.parent.name, "method": folder.parent.name}


def _runs(results_dir: Path) -> list[dict[str, Any]]:
    from flashmem_bench.errors import StoreError
    from flashmem_bench.store import ResultStore

    if not (results_dir / "runs").is_dir():
        return []
    rows = []
    for cell in ResultStore(results_dir).cells():
        try:
            manifest, samples = cell.manifest, len(cell.rows())
        except StoreError:
            broken = "broken, see flashmem-bench verify"
            manifest, samples = {"descr": _names(cell.path), "summary": {"status": broken}}, None
        descr, summary = manifest.get("descr", {}), manifest.get("summary", {})
        score = summary.get("score")
        rows.append(
            {
                "suite": descr.get("suite"),
                "method": descr.get("method"),
                "model": descr.get("model"),
                "cell": cell.cell_id,
                "samples": samples,
                "score": round(score, 4) if score is not None else None,
                "status": summary.get("status", "unfinished"),
            }
        )
    return rows
