"""`flashmem-bench run`: the grid of suites and methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmem_bench.cli import options as o

if TYPE_CHECKING:
    from flashmem_bench.runner import CellResult
    from flashmem_bench.session import Request


@dataclass(frozen=True)
class Asked:
    """What the command line asked for.

    Attributes:
        stories: How many samples of each cell are traced.
    """

    request: Request
    stories: int
    json: bool
    quiet: bool


@o.reads(o.answering)
def asked(
    answering: dict[str, Any],
    suite: o.Suites = None,
    method: o.Methods = None,
    model: o.Model = "flashmem-tiny",
    limit: o.Limit = None,
    seed: o.Seed = "0",
    batch_size: o.BatchSize = "1",
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    checkpoint: o.Checkpoint = None,
    set_: o.Set = None,
    truncate: o.Truncate = None,
    match: o.Match = "within",
    limit_sessions: o.LimitSessions = None,
    questions_per_session: o.QuestionsPerSession = None,
    no_prefix_reuse: o.NoPrefixReuse = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Keep the story of the first samples, for the report.", rich_help_panel="Output"),
    ] = False,
    trace_samples: Annotated[
        str | None,
        typer.Option(
            "--trace-samples", help="Keep that of the first N of each cell (8).", metavar="N", rich_help_panel="Output"
        ),
    ] = None,
    data_dir: o.DataDir = None,
    skip_bad_rows: o.SkipBadRows = False,
    trust_suite: o.TrustSuite = False,
    allow_code_execution: o.AllowCode = False,
    allow_uncontained_code: o.AllowUncontained = False,
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> Asked:
    """Read the options of every command that runs the grid."""
    o.set_up_logging(debug)
    from flashmem_bench.registry import get_methods
    from flashmem_bench.session import Request
    from flashmem_bench.settings import parse_assignments

    request = Request(
        suites=o.known_suites(suite),
        methods=tuple(spec.name for spec in get_methods(o.required(method, "--method", "methods"))),
        model=model,
        limit=o.count(limit, "--limit"),
        limit_sessions=o.count(limit_sessions, "--limit-sessions"),
        questions_per_session=o.count(questions_per_session, "--questions-per-session"),
        prefix_reuse=not no_prefix_reuse,
        seed=o.count(seed, "--seed", least=0) or 0,
        batch_size=o.count(batch_size, "--batch-size") or 1,
        device=device,
        dtype=dtype,
        checkpoint=checkpoint,
        settings=parse_assignments(set_ or []),
        truncate=truncate,
        match=match,
        data_dir=data_dir,
        skip_bad_rows=skip_bad_rows,
        trust_suite=trust_suite,
        allow_code_execution=allow_code_execution,
        allow_uncontained_code=allow_uncontained_code,
        results_dir=results_dir,
        **answering,
        command=o.command_line(),
    )
    return Asked(request, _stories(trace, trace_samples), json, quiet)


@o.reads(asked)
def run(asked: Asked) -> int:
    """Run methods on suites. The same command continues where it stopped.

    Example: flashmem-bench run --suite wordmath --method vanilla,flashmem --limit 50
    """
    return execute(asked)


def _stories(trace: bool, samples: str | None) -> int:
    """Return how many samples of a cell are traced; naming a number asks for it as well."""
    from flashmem_bench.tracing import DEFAULT_SAMPLES

    named = o.count(samples, "--trace-samples")
    return named if named is not None else DEFAULT_SAMPLES if trace else 0


def execute(asked: Asked) -> int:
    """Run a request, trace the first samples of its cells, show its table and return the exit code."""
    from flashmem_bench.interrupts import Interrupted
    from flashmem_bench.progress import progress_for
    from flashmem_bench.runner import run_grid
    from flashmem_bench.session import Session
    from flashmem_bench.tracing import trace_cells

    request = asked.request
    progress, session = progress_for(asked.quiet), Session(request)
    try:
        results = run_grid(request, progress=progress, session=session)
    except Interrupted as interrupted:
        o.say(interrupted.sentence(request.command))
        return interrupted.exit_code
    traces = trace_cells(session, results, asked.stories, progress.note) if asked.stories else []
    return conclude(request, results, json=asked.json, quiet=asked.quiet, traces=traces)


def conclude(request: Any, results: list[CellResult], *, json: bool, quiet: bool, traces: Sequence[Path] = ()) -> int:
    """Show what became of the cells and return the exit code of the command."""
    if json:
        document = {"results_dir": str(request.own_dir), "cells": [_cell(result) for result in results]}
        o.emit_json({**document, "traces": [str(path) for path in traces]} if traces else document)
    elif not quiet:
        show(request, results)
        if traces:
            o.say(f"{len(traces)} traces; flashmem-bench report makes a page of each")
    failed = [result for result in results if result.status != "complete"]
    for result in failed:
        name, count = f"{result.suite} x {result.method}", sum(1 for row in result.rows if row.get("error"))
        if result.error:
            told = (
                f"error: {count} of {len(result.rows)} samples of {name} failed; the first: {result.error.rstrip('.')}"
            )
            o.say(f"{told}. The same command tries them again")
        if result.stopped:
            o.say(f"error: {name}: {result.stopped}. Continue with: {request.command}")
    if not failed:
        return 0
    return 1 if all(result.status == "failed" for result in results) else 3


def show(request: Any, results: list[CellResult]) -> None:
    """Print the table of the cells of this command."""
    from flashmem_bench.report.console import runs_table
    from flashmem_bench.report.tables import build_tables
    from flashmem_bench.store import ResultStore

    console = o.console()
    ours = {result.cell for result in results}
    tables = build_tables(ResultStore(request.own_dir))
    runs = tables["runs"]
    console.print(runs_table(runs[runs["cell"].isin(ours)]))
    for result in results:
        why = result.summary.get("why_equal")
        if why:
            console.print(f"{result.suite} x {result.method}: texts equal vanilla's: {why}", highlight=False)
    console.print(f"results in {request.own_dir.resolve()}", highlight=False, soft_wrap=True)


def _cell(result: CellResult) -> dict[str, Any]:
    scores = [row["score"] for row in result.rows if row.get("score") is not None]
    return {
        "suite": result.suite,
        "method": result.method,
        "cell": result.cell,
        "status": result.status,
        "samples": len(result.rows),
        "new_samples": result.new_samples,
        "score": sum(scores) / len(scores) if scores else None,
        "error": result.error,
        "stopped": result.stopped,
        "why_equal": result.summary.get("why_equal"),
    }
