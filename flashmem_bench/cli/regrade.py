"""`flashmem-bench regrade`: stored answers graded again, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmem_bench.cli import options as o

if TYPE_CHECKING:
    from flashmem_bench.regrading import Regraded


def regrade(
    suite: o.Suites = None,
    method: o.Methods = None,
    cell: Annotated[
        str | None, typer.Option("--cell", help="The beginning of a cell's id.", metavar="ID", show_default=False)
    ] = None,
    set_: o.Set = None,
    data_dir: o.DataDir = None,
    skip_bad_rows: o.SkipBadRows = False,
    trust_suite: o.TrustSuite = False,
    allow_code_execution: o.AllowCode = False,
    allow_uncontained_code: o.AllowUncontained = False,
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Grade stored answers again with the graders of this version; times and texts stay as they are.

    Example: flashmem-bench regrade --suite math --results-dir results
    """
    o.set_up_logging(debug)
    from flashmem_bench.errors import BenchError
    from flashmem_bench.regrading import regrade_cell
    from flashmem_bench.session import Request, Session
    from flashmem_bench.settings import parse_assignments

    wanted = {_stored_name(name): name for name in o.known_suites(suite)} if suite else {}
    found = _cells(results_dir, wanted, o.split_list(method), cell)
    request = Request(
        suites=tuple(wanted.values()),
        methods=(),
        settings=parse_assignments(set_ or []),
        data_dir=data_dir,
        skip_bad_rows=skip_bad_rows,
        trust_suite=trust_suite,
        allow_code_execution=allow_code_execution,
        allow_uncontained_code=allow_uncontained_code,
        results_dir=results_dir,
        command=o.recorded_command(),
    )
    session, results, failed = Session(request), [], 0
    for entry in found:
        try:
            results.append(regrade_cell(session, entry, wanted))
        except BenchError as error:
            failed += 1
            o.say(f"error: {entry.get('suite')} x {entry.get('method')}, {entry.cell_id}: {error}")
    if json:
        o.emit_json({"results_dir": str(results_dir), "cells": [vars(result) for result in results], "failed": failed})
    elif not quiet:
        _show(results)
    return 0 if not failed else 3 if results else 1


def _stored_name(name: str) -> str:
    """Return the name that a suite's cells have."""
    from flashmem_bench.suites import find_suite

    return find_suite(name).name


def _cells(results_dir: o.Path, suites: Any, methods: tuple[str, ...], cell: str | None) -> list[Any]:
    from flashmem_bench.errors import BenchError, StoreError
    from flashmem_bench.store import ResultStore

    if not (results_dir / "runs").is_dir():
        raise StoreError(f"there are no results in {results_dir}; make some with flashmem-bench run")
    found = [
        entry
        for entry in ResultStore(results_dir).cells()
        if (not suites or entry.get("suite") in suites)
        and (not methods or entry.get("method") in methods)
        and (cell is None or entry.cell_id.startswith(cell))
    ]
    if not found:
        raise BenchError(f"no cell of {results_dir} is meant by this; see flashmem-bench list runs")
    return found


def _show(results: list[Regraded]) -> None:
    for result in results:
        place = f"{result.suite} x {result.method} ({result.cell})"
        if result.why:
            o.tell(f"{place}: left as it was: {result.why}")
            continue
        left = f", {result.left} left as they were" if result.left else ""
        o.tell(f"{place}: {result.graded} graded again, {result.changed} changed{left}; score {_share(result.before)} "
              f"to {_share(result.after)}")  # fmt: skip
    o.tell(f"{sum(result.changed for result in results)} of {sum(result.graded for result in results)} grades changed; "
          "flashmem-bench report makes the tables anew")  # fmt: skip


def _share(score: float | None) -> str:
    return "none" if score is None else f"{score:.3f}"
