"""Running an axis of ablations: each value a cell of a method, with a memory of its own where the axis trains.

The cells of all values share one session, so the backbone and the suites are loaded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flashmem_bench.ablation_training import Schedule, train_point, trained_method
from flashmem_bench.ablations import METHOD, Axis, Point
from flashmem_bench.errors import UsageError
from flashmem_bench.models import model_key
from flashmem_bench.progress import progress_for
from flashmem_bench.registry import get_methods
from flashmem_bench.session import Request, Session
from flashmem_bench.settings import resolve
from flashmem_bench.store import ResultStore
from flashmem_bench.watch import watching

if TYPE_CHECKING:
    from flashmem_bench.executors.supervisor import Workers
    from flashmem_bench.runner import CellResult


@dataclass(frozen=True)
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


def refuse_unread(request: Request, axis: Axis) -> None:
    """Refuse a method that does not read the axis' setting: all of its cells would be the same.

    Raises:
        UsageError: There is such a method.
    """
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
    axis = sweep.axis
    arms = sum(len(sweep.methods(request, point)) for point in sweep.points)
    cells = arms * len(request.suites) * len(sweep.seeds)
    samples = cells * (request.limit or 0)
    times, wanted = [], (model_key(request.model), request.batch_size)
    for cell in ResultStore(request.results_dir).cells():
        if cell.get("suite") in request.suites and (cell.get("model"), cell.get("batch_size")) == wanted:
            # The samples of a batch share their time.
            rows = [row for row in cell.rows() if row.get("timing_valid") is not False]
            times += [row["e2e_ms"] / request.batch_size for row in rows if row.get("e2e_ms") is not None]
    estimate = f", about {samples * sum(times) / len(times) / 6e4:.1f} minutes" if times else ""
    trained = ""
    if axis.trains:
        lengths = {sweep.schedule.length(request.model, suite): None for suite in request.suites}
        trained = f"; {cells} memories of {' or '.join(lengths)} are trained first"
    return (
        f"{axis.name}: {len(sweep.points)} values, {cells} cells of up to {request.limit} samples{estimate}{trained}; "
        "what is finished is not made again"
    )


def run_sweep(request: Request, sweep: Sweep, quiet: bool) -> Iterator[CellResult]:
    """Run every point of an axis and yield what its cells gave.

    Raises:
        Interrupted: The user stopped it; everything finished is stored.
    """
    from flashmem_bench.runner import worker_processes

    session = Session(request)
    _ = session.store
    with worker_processes(request) as workers:
        for point in sweep.points:
            yield from _run_point(session, request, sweep, point, quiet, workers)


def _run_point(
    session: Session, request: Request, sweep: Sweep, point: Point, quiet: bool, workers: Workers | None
) -> Iterator[CellResult]:
    """Run the cells of one value; where the axis trains, each with its own memory."""
    from flashmem_bench.runner import run_grid

    mark = {"axis": sweep.axis.name, "value": point.text, "reference": point.reference}
    if point.method:
        mark["of"] = sweep.axis.reference
    methods = sweep.methods(request, point)
    for suite, method, seed in itertools.product(request.suites, methods, sweep.seeds):
        session.request = _request_of(session, request, sweep, point, (suite, method, seed), quiet)
        shared = {"session": session, "workers": workers}
        found = run_grid(session.request, progress=progress_for(quiet), descr={"ablation": [mark]}, **shared)
        yield from (result for result in found if result.method in methods)


def _request_of(
    session: Session, request: Request, sweep: Sweep, point: Point, cell: tuple[str, str, int | None], quiet: bool
) -> Request:
    """Return the request of one cell, its memory trained."""
    suite, method, seed = cell
    wanted = replace(request, suites=(suite,), methods=(method,))
    if seed is None:
        return replace(wanted, settings={**request.settings, **point.settings})
    with watching(quiet) as watcher:
        session.request = request
        trained = train_point(session, point, suite, trained_method(method), seed, sweep.schedule, watcher)
    # The shape of the memory comes with its checkpoint.
    settings = {k: v for k, v in {**request.settings, **point.settings}.items() if not k.startswith("memory.")}
    return replace(wanted, settings=settings, checkpoint=str(trained.path))
