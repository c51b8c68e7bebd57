"""`flashmem-bench report`: tables, figures and report.html from the results folder."""

from __future__ import annotations

from typing import Annotated

import typer

from flashmem_bench.cli import options as o


def report(
    allow_unequal: Annotated[
        bool, typer.Option("--allow-unequal", help="Compare cells under different conditions too, and say which.")
    ] = False,
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Write tables/, figures/ and report.html."""
    o.set_up_logging(debug)
    from flashmem_bench.errors import StoreError

    if not (results_dir / "runs").is_dir():
        raise StoreError(
            f"there are no results in {results_dir}; make some with flashmem-bench run, or give --results-dir"
        )
    from flashmem_bench.report import build_report

    paths = build_report(results_dir, unequal=allow_unequal)
    if json:
        o.emit_json({name: _plain(value) for name, value in vars(paths).items()})
        return 0
    if not quiet:
        for sentence in paths.warnings:
            if sentence.startswith("a cell is left out"):
                o.say(sentence)
        _show(results_dir)
    o.tell(f"report: {paths.html.resolve()}")
    return 0


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, int | float | bool) else str(value)


def _show(results_dir: o.Path) -> None:
    from flashmem_bench.report.console import runs_table
    from flashmem_bench.report.tables import build_tables
    from flashmem_bench.store import ResultStore

    runs = build_tables(ResultStore(results_dir))["runs"]
    o.console().print(runs_table(runs[runs["role"] == "main"]))
