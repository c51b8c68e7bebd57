"""`flashmem-bench ablate`: one axis, its values as cells of a method."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmem_bench.cli import options as o

if TYPE_CHECKING:
    from flashmem_bench.ablation_training import Schedule
    from flashmem_bench.ablations import Axis, Point
    from flashmem_bench.runner import CellResult
    from flashmem_bench.session import Request, Session


def ablate(
    axis: Annotated[str | None, typer.Argument(help="Axis; --list shows them.", show_default=False)] = None,
    values: Annotated[list[str] | None, typer.Option("--values", help="Values; repeat or use commas.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the axes and stop.")] = False,
    suite: o.Suites = None,
    method: o.Methods = None,
    model: o.Model = "flashmem-tiny",
    limit: o.Limit = None,
    seed: o.Seed = "0",
    minutes: Annotated[
        str | None, typer.Option("--minutes", help="Training time of each value, for axes that train.")
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
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Vary one setting of a method. Cells that exist already are not run again; axes that change the memory train it.

    Example: flashmem-bench ablate monitor-threshold --values p50,p85,p99,1.5
    """
    o.set_up_logging(debug)
    from flashmem_bench.ablation_training import DEFAULT_MINUTES, Schedule
    from flashmem_bench.ablations import AXES, DEFAULT_LIMIT, get_axis, points
    from flashmem_bench.errors import UsageError
    from flashmem_bench.registry import get_methods
    from flashmem_bench.session import Request
    from flashmem_bench.settings import parse_assignments

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
        results_dir=results_dir,
        calibrate_missing=True,
        command=o.command_line(),
    )
    schedule = Schedule(o.number(minutes, "--minutes") or DEFAULT_MINUTES, recipe)
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


@dataclasses.dataclass(frozen=True)
class Sweep:
    """An axis with its points, and how it trains if it does."""

    axis: Axis
    points: list[Point]
    schedule: Schedule
    train_seeds: tuple[int, ...]

    def methods(self, request: Request, point: Point) -> tuple[str, ...]:
        """Return the methods that a point runs."""
        return (point.method,) if point.method else request.methods

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Training seeds; one that is None where nothing is trained."""
        return self.train_seeds if self.axis.trains else (None,)


def run_axis(request: Request, sweep: Sweep, *, json: bool, quiet: bool) -> int:
    """Run every point of an axis and show the sheet."""
    from flashmem_bench.cli.run import conclude
    from flashmem_bench.runner import Interrupted
    from flashmem_bench.session import Session

    _refuse_unread(request, sweep.axis)
    o.say(cost_sentence(request, sweep), quiet)
    session, results = Session(request), []
    _ = session.store
    for point in sweep.points:
        try:
            results += _run_point(session, request, sweep, point, quiet)
        except Interrupted:
            o.say(f"interrupted; everything finished is stored. Continue with: {request.command}")
            return 130
    code = conclude(request, results, json=json, quiet=True)
    if not json and not quiet:
        _show(request, sweep.axis, results)
    return code


def _run_point(session: Session, request: Request, sweep: Sweep, point: Point, quiet: bool) -> list[CellResult]:
    """Run the cells of one value; where the axis trains, each with its own memory."""
    from flashmem_bench.progress import progress_for
    from flashmem_bench.runner import run_grid

    mark = {"axis": sweep.axis.name, "value": point.text, "reference": point.reference}
    if point.method:
        mark["of"] = sweep.axis.reference
    results: list[CellResult] = []
    for suite, method, seed in itertools.product(request.suites, sweep.methods(request, point), sweep.seeds):
        session.request = _request_of(session, request, sweep, point, (suite, method, seed), quiet)
        results += run_grid(session.request, progress=progress_for(quiet), session=session, descr={"ablation": [mark]})
    return [result for result in results if result.method in sweep.methods(request, point)]


def _request_of(
    session: Session, request: Request, sweep: Sweep, point: Point, cell: tuple[str, str, int | None], quiet: bool
) -> Request:
    """Return the request of one cell, its memory trained."""
    from flashmem_bench.ablation_training import train_point, trained_method
    from flashmem_bench.watch import watching

    suite, method, seed = cell
    wanted = dataclasses.replace(request, suites=(suite,), methods=(method,))
    if seed is None:
        return dataclasses.replace(wanted, settings={**request.settings, **point.settings})
    with watching(quiet) as watcher:
        session.request = request
        trained = train_point(session, point, suite, trained_method(method), seed, sweep.schedule, watcher)
    # The shape of the memory comes with its checkpoint.
    settings = {k: v for k, v in {**request.settings, **point.settings}.items() if not k.startswith("memory.")}
    return dataclasses.replace(wanted, settings=settings, checkpoint=str(trained.path))


def _refuse_unread(request: Request, axis: Axis) -> None:
    """Refuse a method that does not read the axis' setting: all of its cells would be the same."""
    from flashmem_bench.ablations import METHOD
    from flashmem_bench.errors import UsageError
    from flashmem_bench.registry import get_methods
    from flashmem_bench.settings import resolve

    if axis.trains or axis.key == METHOD:
        return
    for spec in get_methods(request.methods):
        settings = resolve({}, fixed=spec.fixed, method=spec.name)
        if axis.key in spec.fixed:
            raise UsageError(f"method {spec.name} fixes {axis.key}; choose another method for {axis.name}")
        if axis.key not in spec.relevant(settings):
            raise UsageError(f"method {spec.name} does not read {axis.key}; choose another method for {axis.name}")


def cost_sentence(request: Request, sweep: Sweep) -> str:
    """Say what the axis will cost before it is run, as far as earlier rows tell the time of a sample."""
    from flashmem_bench.models import model_key
    from flashmem_bench.store import ResultStore

    axis = sweep.axis
    arms = sum(len(sweep.methods(request, point)) for point in sweep.points)
    cells = arms * len(request.suites) * len(sweep.seeds)
    samples = cells * (request.limit or 0)
    times = []
    for cell in ResultStore(request.results_dir).cells():
        if cell.get("suite") in request.suites and cell.get("model") == model_key(request.model):
            times += [row["e2e_ms"] for row in cell.rows() if row.get("e2e_ms") is not None]
    estimate = f", about {samples * sum(times) / len(times) / 6e4:.1f} minutes" if times else ""
    trained = f"; {cells} memories of {sweep.schedule.minutes:g} minutes are trained first" if axis.trains else ""
    return (
        f"{axis.name}: {len(sweep.points)} values, {cells} cells of up to {request.limit} samples{estimate}{trained}; "
        "what is finished is not made again"
    )


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
