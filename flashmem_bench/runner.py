"""Runs the grid of suites and methods, sample by sample, so that nothing finished is ever lost.

A cell is run in the fixed order of its suite's samples. Each finished sample is written while the next one runs, and
the same command continues where it stopped: finished samples are skipped, samples that ended in an error are tried
again, and a larger `--limit` extends the cell.

Who answers is an executor's business (`executors`): this process or others. A batch of neighbours is made of the
suite's order whatever is done already, so that it has the same members in every attempt.

Ctrl-C lets the samples in progress finish; a second one does not wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashmem_bench.equality import why_equal
from flashmem_bench.executors.base import Executor, Work
from flashmem_bench.executors.here import Here
from flashmem_bench.interrupts import Interrupted, Stop, interruptible
from flashmem_bench.prepare import CellPlan, preflight, read_reference
from flashmem_bench.privacy import redact
from flashmem_bench.progress import Progress, Silent
from flashmem_bench.registry import get_methods
from flashmem_bench.selection import batches_of
from flashmem_bench.session import Request, Session
from flashmem_bench.writer import RowWriter

if TYPE_CHECKING:
    from flashmem_bench.answers import Finished
    from flashmem_bench.store import CellStore


@dataclass
class CellResult:
    """What became of one cell.

    Attributes:
        status: complete, partial (some samples failed) or failed (all did, or the cell could not begin).
        error: The first error sentence.
    """

    suite: str
    method: str
    cell: str
    status: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    new_samples: int = 0
    summary: dict[str, Any] = field(default_factory=dict)


def run_grid(
    request: Request,
    *,
    progress: Progress | None = None,
    session: Session | None = None,
    descr: Mapping[str, Any] | None = None,
) -> list[CellResult]:
    """Run every method on every suite of a request.

    Args:
        request: What to run.
        progress: Told what happens.
        session: Loaded parts to share with other calls; its request must name the same model and folders.
        descr: Added to the description of every cell, such as the ablation that it belongs to.

    Raises:
        FlashMemError: A mistake that concerns the whole request.
        Interrupted: The user pressed Ctrl-C.
    """
    session = session or Session(request)
    progress = progress or Silent()
    specs = get_methods(request.methods)
    session.permit_code()
    _ = session.store  # An unwritable folder is found before a model is loaded.
    referred = get_methods(spec.reference for spec in specs if spec.reference)
    for note in preflight(session, request.suites, [*specs, *referred]):
        progress.note(note)
    with interruptible() as stop, closing(Here(session)) as executor:
        grid = _Grid(session, executor, progress, stop, descr or {})
        for suite in dict.fromkeys(request.suites):
            for spec in specs:
                grid.run(suite, spec.name)
    return list(grid.results.values())


class _Grid:
    """The cells of a request; a method that is matched to another comes after it."""

    def __init__(self, session: Session, executor: Executor, progress: Progress, stop: Stop, descr: Mapping[str, Any]):
        self.session, self.executor, self.progress, self.stop, self.descr = session, executor, progress, stop, descr
        self.results: dict[tuple[str, str], CellResult] = {}

    def run(self, suite: str, method: str) -> None:
        """Run a cell and, before it, the one that it is matched to."""
        (spec,) = get_methods([method])
        for name in [*([spec.reference] if spec.reference else []), method]:
            if (suite, name) not in self.results:
                self.results[suite, name] = self._run(suite, name)

    def _run(self, suite: str, method: str) -> CellResult:
        (spec,) = get_methods([method])
        session = self.session
        wanted = self.results[suite, spec.reference].cell if spec.reference else None
        found = [cell for cell in session.store.cells() if cell.cell_id == wanted]
        reference = read_reference(session, suite, found[0]) if found else None
        plan = self.executor.plan(suite, method, reference, self.progress.note)
        plan.descr.update(self._description(method))
        return run_cell(session, plan, self.progress, self.stop, self.executor)

    def _description(self, method: str) -> Mapping[str, Any]:
        """What is added to a cell's description. A point of an axis of methods is not the cell it is matched to."""
        of_methods = any(mark.get("of") for mark in self.descr.get("ablation", ()))
        return {} if of_methods and method not in self.session.request.methods else self.descr


def run_cell(
    session: Session,
    plan: CellPlan,
    progress: Progress,
    stop: Stop | None = None,
    executor: Executor | None = None,
) -> CellResult:
    """Run the samples of one cell that are still missing and describe the whole cell."""
    cell = session.store.open_cell(plan.identity, plan.descr)
    run = _CellRun(session, plan, cell, progress, stop or Stop(), executor or Here(session))
    progress.start(f"{plan.suite.name} x {plan.spec.name}", run.total, run.total - len(run.missing))
    try:
        if run.missing:
            run.run()
    finally:
        progress.stop()
        cell.close()
    return run.result()


class _CellRun:
    """One attempt at what is missing of a cell."""

    def __init__(
        self, session: Session, plan: CellPlan, cell: CellStore, progress: Progress, stop: Stop, executor: Executor
    ):
        self.session, self.plan, self.cell = session, plan, cell
        self.progress, self.stop, self.executor = progress, stop, executor
        samples = plan.suite.samples(session.request.split)
        chosen, self._batches = batches_of(session.request, samples.sessions(), plan.suite.name)
        self._ids = {index: samples[index].sample_id for index in chosen}
        done = {row["sample_id"] for row in cell.rows() if row.get("error") is None}
        self.missing = frozenset(index for index, name in self._ids.items() if name not in done)
        self.finished = 0

    @property
    def total(self) -> int:
        """Samples that the request wants of the cell."""
        return len(self._ids)

    def run(self) -> None:
        """Answer and store what is missing.

        Raises:
            Interrupted: The user asked to stop.
        """
        pending = [batch for batch in self._batches if not self.missing.isdisjoint(batch)]
        work = Work(self.plan, pending, self.missing, self.stop)
        answers = self.executor.answers(work, self.progress.note)
        info = {"command": redact(self.session.request.command), **self.executor.environment()}
        attempt = self.cell.begin_attempt(info)
        try:
            with RowWriter(self.cell) as writer, closing(answers):
                for finished in answers:
                    self._store(writer, finished, attempt)
            if self.stop.asked:
                raise Interrupted
        except BaseException:
            self.cell.finish(self._summary("partial"))
            raise
        self.cell.finish(self._summary("complete"))

    def _store(self, writer: RowWriter, finished: Finished, attempt: int) -> None:
        row = {**finished.row, "attempt": attempt}
        writer.put(row, finished.text)
        self.finished += 1
        self.progress.advance(row)

    def result(self) -> CellResult:
        """Return what the cell has now of the samples that were wanted."""
        wanted = set(self._ids.values())
        # On disk they are in the order in which they were finished.
        rows = sorted((row for row in self.cell.rows() if row["sample_id"] in wanted), key=lambda row: row["index"])
        errors = [row["error"] for row in rows if row.get("error")]
        status = "complete" if not errors else "failed" if len(errors) == len(rows) else "partial"
        return CellResult(
            suite=self.plan.suite.name,
            method=self.plan.spec.name,
            cell=self.cell.cell_id,
            status=status,
            rows=rows,
            error=errors[0] if errors else None,
            new_samples=self.finished,
            summary=self.cell.manifest.get("summary", {}),
        )

    def _summary(self, status: str) -> dict[str, Any]:
        rows = sorted(self.cell.rows(), key=lambda row: row["index"])
        scores = [row["score"] for row in rows if row.get("score") is not None and row.get("score_valid")]
        errors = [row["error"] for row in rows if row.get("error")]
        return {
            "status": "partial" if errors else status,
            "n": len(rows),
            "score": sum(scores) / len(scores) if scores else None,
            "errors": len(errors),
            "triggers": sum(row["triggers"] or 0 for row in rows),
            "why_equal": why_equal(self.session.store, self.cell, rows),
            **self.executor.summary(),
        }
