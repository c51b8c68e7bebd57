"""`flashmem-bench ablate`: one axis, its values as cells of a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmem_bench.cli import options as o

if TYPE_CHECKING:
    from flashmem_bench.ablations import Axis
    from flashmem_bench.runner import CellResult
    from flashmem_bench.session import Request
    from flashmem_bench.sweeps import Sweep


@o.reads(o.answering)
def ablate(
    answering: dict[str, Any],
    axis: Annotated[str | None, typer.Argument(help="Axis; --list shows them.", show_default=False)] = None,
    values: Annotated[list[str] | None, typer.Option("--values", help="Values; repeat or use commas.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the axes and stop.")] = False,
    suite: o.Suites = None,
    method: o.Methods = None,
    model: o.Model = "flashmem-tiny",
    limit: o.Limit = None,
    seed: o.Seed = "0",
    minutes: Annotated[
        str | None,
        typer.Option("--minutes", help="Training time of a value; default: the recipe's time, 5 at most."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="How axes that train do it; default: the bundled one of the suite.")
    ] = None,
    train_seed: Annotated[
        str, typer.Option("--train-seed", help="Seeds of axes that train; repeat with commas.")
    ] = "0",
    batch_size: o.BatchSize = "1",
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    checkpoint: o.Checkpoint = None,
    set_: o.Set = None,
    truncate: o.Truncate = None,
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
    """Vary one setting of a method. Cells that exist already are not run again; axes that change the memory train it.

    Example: flashmem-bench ablate monitor-threshold --values p50,p85,p99,1.5
    """
    o.set_up_logging(debug)
    from flashmem_bench.ablation_training import Schedule
    from flashmem_bench.ablations import AXES, DEFAULT_LIMIT, get_axis, points
    from flashmem_bench.errors import UsageError
    from flashmem_bench.registry import get_methods
    from flashmem_bench.session import Request
    from flashmem_bench.settings import parse_assignments
    from flashmem_bench.sweeps import Sweep

    if list_:
        return _list_axes(json)
    if axis is None:
        raise UsageError(f"name an axis: {', '.join(entry.name for entry in AXES)}")
    chosen = get_axis(axis)
    request = Request(
        suites=o.known_suites(suite or ["wordmath"]),
        methods=tuple(s.name for s in get_methods(o.split_list(method) or (chosen.method,))),
        model=model,
        limit=o.count(limit, "--limit") or DEFAULT_LIMIT,
        seed=o.count(seed, "--seed", least=0) or 0,
        batch_size=o.count(batch_size, "--batch-size") or 1,
        device=device,
        dtype=dtype,
        checkpoint=checkpoint,
        settings=parse_assignments(set_ or []),
        truncate=truncate,
        data_dir=data_dir,
        skip_bad_rows=skip_bad_rows,
        trust_suite=trust_suite,
        allow_code_execution=allow_code_execution,
        allow_uncontained_code=allow_uncontained_code,
        results_dir=results_dir,
        calibrate_missing=True,
        **answering,
        command=o.command_line(),
    )
    schedule = Schedule(o.number(minutes, "--minutes"), recipe)
    seeds = tuple(o.count(value, "--train-seed", least=0) or 0 for value in train_seed.split(","))
    sweep = Sweep(chosen, points(chosen, o.split_list(values)), schedule, seeds)
    return run_axis(request, sweep, json=json, quiet=quiet)


def _list_axes(json: bool) -> int:
    from flashmem_bench.ablations import AXES
    from flashmem_bench.cli.lists import show_rows

    rows = [
        {
            "axis": a.name,
            "what": a.summary,
            "values": ", ".join(a.values),
            "reference": a.reference,
            "tests": a.tests,
            "trains": "yes" if a.trains else "no",
        }
        for a in AXES
    ]
    return show_rows(rows, json=json)


def run_axis(request: Request, sweep: Sweep, *, json: bool, quiet: bool) -> int:
    """Run every point of an axis and show the sheet."""
    from flashmem_bench.cli.run import conclude
    from flashmem_bench.interrupts import Interrupted
    from flashmem_bench.sweeps import cost_sentence, refuse_unread, run_sweep

    refuse_unread(request, sweep.axis)
    o.say(cost_sentence(request, sweep), quiet)
    results: list[CellResult] = []
    try:
        for result in run_sweep(request, sweep, quiet):
            results.append(result)
    except Interrupted as interrupted:
        o.say(interrupted.sentence(request.command))
        return interrupted.exit_code
    code = conclude(request, results, json=json, quiet=True)
    if not json and not quiet:
        _show(request, sweep.axis, results)
    return code


def _show(request: Request, axis: Axis, results: list[CellResult]) -> None:
    from rich.table import Table

    from flashmem_bench.report.tables import build_tables
    from flashmem_bench.store import ResultStore

    sheet = build_tables(ResultStore(request.results_dir), suites={result.suite for result in results})["ablations"]
    sheet = sheet[(sheet["axis"] == axis.name) & sheet["cell"].isin({result.cell for result in results})]
    console = o.console()
    table = Table(title=f"{axis.name} ({axis.key})")
    for heading in ("suite", "method", "value", "n", "score", "95 %", "against reference", "trigger rate", "tau",
                    "ms/token"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("suite", "method", "value") else "right")
    for record in sheet.to_dict("records"):
        table.add_row(*_cells(record))
    console.print(table)
    if "cpu" in set(sheet["device"]):
        console.print("CPU timing: not comparable with a GPU.", highlight=False)
    console.print(f"results in {request.results_dir.resolve()}", highlight=False, soft_wrap=True)


def _cells(record: dict[str, Any]) -> list[str]:
    def shown(name: str, form: str) -> str:
        value = record[name]
        return "-" if value is None or value != value or str(value) == "<NA>" else format(float(value), form)

    return [
        record["suite"],
        record["method"],
        record["value"] + (" (reference)" if record["reference"] else ""),
        str(record["n"]),
        shown("score", ".3f"),
        f"{shown('score_low', '.3f')} to {shown('score_high', '.3f')}",
        shown("delta_reference", "+.3f"),
        shown("trigger_rate", ".3f"),
        shown("threshold", ".3f"),
        shown("ms_per_token", ".2f"),
    ]
