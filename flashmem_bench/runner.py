"""Runs the grid of suites and methods, sample by sample, so that nothing finished is ever lost.

A cell is run in the fixed order of its suite's samples. Each finished sample is written while the next one runs, its
progress shows when the disk has it, and the same command continues where it stopped: finished samples are skipped,
samples that ended in an error are tried again, and a larger `--limit` extends the cell.

Who answers is an executor's business (`executors`): this process or others. A batch of neighbours is made of the
suite's order whatever is done already, so that it has the same members in every attempt.

Ctrl-C, or SIGTERM, lets the samples in progress finish; a second one does not wait.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import StoreError
from flashmem_bench.executors.base import Executor, Work
from flashmem_bench.executors.here import Here
from flashmem_bench.interrupts import Interrupted, Stop, interruptible
from flashmem_bench.limits import TooManyErrors
from flashmem_bench.matching import needs_all, reference_for
from flashmem_bench.prepare import CellPlan, preflight
from flashmem_bench.privacy import redact
from flashmem_bench.progress import Progress, Silent
from flashmem_bench.registry import get_methods
from flashmem_bench.selection import batches_of, share_of
from flashmem_bench.session import Request, Session
from flashmem_bench.summary import cell_summary
from flashmem_bench.writer import RowWriter

if TYPE_CHECKING:
    from flashmem_bench.answers import Finished
    from flashmem_bench.executors.supervisor import Workers
    from flashmem_bench.methods.base import MethodSpec
    from flashmem_bench.store import CellStore


@dataclass
class CellResult:
    """What became of one cell.

    Attributes:
        status: complete, partial (some samples failed, or have no row) or failed (all did).
        error: The first error sentence.
        stopped: Why samples have no row; None where all have one.
    """

    suite: str
    method: str
    cell: str
    status: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    stopped: str | None = None
    new_samples: int = 0
    summary: dict[str, Any] = field(default_factory=dict)


def run_grid(
    request: Request,
    *,
    progress: Progress | None = None,
    session: Session | None = None,
    descr: Mapping[str, Any] | None = None,
    workers: Workers | None = None,
) -> list[CellResult]:
    """Run every method on every suite of a request.

    Args:
        request: What to run.
        progress: Told what happens.
        session: Loaded parts to share with other calls; its request must name the same model and folders.
        descr: Added to the description of every cell, such as the ablation that it belongs to.
        workers: Processes to share with other calls, see `worker_processes`.

    Raises:
        FlashMemError: A mistake that concerns the whole request, or too many samples failed.
        Interrupted: The user pressed Ctrl-C, or a scheduler sent SIGTERM.
    """
    session = session or Session(request)
    progress = progress or Silent()
    specs = get_methods(request.methods)
    session.permit_code()
    _ = session.store  # An unwritable folder is found before a model is loaded.
    referred = get_methods(spec.reference for spec in specs if spec.reference)
    for note in preflight(session, request.suites, [*specs, *referred]):
        progress.note(note)
    with interruptible() as stop:
        try:
            with closing(executor_for(session, stop, workers)) as executor:
                grid = _Grid(session, executor, progress, stop, descr or {})
                for suite, spec in _order(request, specs):
                    grid.run(suite, spec.name)
        except KeyboardInterrupt:
            raise Interrupted(stop.signum) from None
    return list(grid.results.values())


def executor_for(session: Session, stop: Stop, workers: Workers | None = None) -> Executor:
    """Return who answers a request: this process, unless it asks for several or for one that can be stopped."""
    if session.request.executor == "ray":
        from flashmem_bench.executors.ray_cluster import RayCluster

        return RayCluster(session, stop)
    if not session.request.in_processes:
        return Here(session)
    from flashmem_bench.executors.local import Local

    return Local(session, stop, workers)


@contextmanager
def worker_processes(request: Request) -> Iterator[Workers | None]:
    """Keep worker processes, and the backbone in each, from one `run_grid` to the next; None where none are needed."""
    if not request.in_processes:
        yield None
        return
    from flashmem_bench.executors.supervisor import Workers

    with closing(Workers(request.workers, request.device)) as workers:
        yield workers


def _order(request: Request, specs: Sequence[MethodSpec]) -> list[tuple[str, MethodSpec]]:
    """Return the cells in their order. What a shard alone may be unable to run comes last."""
    cells = list(itertools.product(dict.fromkeys(request.suites), specs))
    if request.shard is None:
        return cells
    return sorted(cells, key=lambda cell: needs_all(cell[1], request.match))


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
        reference = reference_for(session, suite, spec, wanted)
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
    chosen = _Chosen.of(session, plan)
    cell = session.store.open_cell(plan.identity, {**plan.descr, **chosen.shard})
    run = _CellRun(session, plan, chosen, cell, progress, stop or Stop(), executor or Here(session))
    progress.start(f"{plan.suite.name} x {plan.spec.name}", run.total, run.total - len(run.missing))
    try:
        if run.missing:
            run.run()
        else:
            run.settle()
    finally:
        progress.stop()
        cell.close()
    return run.result()


@dataclass(frozen=True)
class _Chosen:
    """The samples that a request wants of a cell.

    Attributes:
        ids: Sample ids by index.
        batches: Indices that are answered together; see `selection.batches_of`.
        shard: Which part of how many samples they are; empty where they are all.
    """

    ids: dict[int, str]
    batches: list[list[int]]
    shard: dict[str, Any]

    @classmethod
    def of(cls, session: Session, plan: CellPlan) -> _Chosen:
        request, samples = session.request, plan.suite.samples(session.request.split)
        wanted, batches = batches_of(request, samples.sessions(), plan.suite.name)
        mine, batches = share_of(request, batches, wanted, samples)
        part = request.shard
        of = {"index": part.index, "count": part.count, "samples": len(mine), "of": len(wanted)} if part else None
        return cls({index: samples[index].sample_id for index in mine}, batches, {"shard": of} if of else {})


class _CellRun:
    """One attempt at what is missing of a cell."""

    def __init__(
        self,
        session: Session,
        plan: CellPlan,
        chosen: _Chosen,
        cell: CellStore,
        progress: Progress,
        stop: Stop,
        executor: Executor,
    ):
        self.session, self.plan, self.cell = session, plan, cell
        self.progress, self.stop, self.executor = progress, stop, executor
        self._ids, self._batches, self._shard = chosen.ids, chosen.batches, chosen.shard
        self.missing = self._lacking()
        self.finished = self.failed = 0
        self._answered_by: set[int | None] = set()
        self._way: dict[str, Any] = {}

    def _lacking(self) -> frozenset[int]:
        done = {row["sample_id"] for row in self.cell.rows() if row.get("error") is None}
        return frozenset(index for index, name in self._ids.items() if name not in done)

    @property
    def total(self) -> int:
        """Samples that the request wants of the cell."""
        return len(self._ids)

    def run(self) -> None:
        """Answer and store what is missing.

        Raises:
            Interrupted: The user asked to stop.
            TooManyErrors: See `Limits.fail_on_error`.
            StoreError: Another process writes the cell, or the disk refused.
        """
        with self.cell.claimed():
            # Another process may have ended since the samples were looked at.
            self.missing = self._lacking()
            if self.missing:
                self._answer()

    def _answer(self) -> None:
        pending = [batch for batch in self._batches if not self.missing.isdisjoint(batch)]
        work = Work(self.plan, pending, self.missing, self.stop)
        answers = self.executor.answers(work, self.progress.note)
        made_by = {"executor": self.executor.name, "workers": self.executor.workers}
        # The token tells attempts apart when the cells of several folders are merged.
        known = {
            "command": redact(self.session.request.command),
            "token": secrets.token_hex(8),
            **self._shard,
            **made_by,
        }
        info = {**known, **self.executor.environment()}
        attempt = self.cell.begin_attempt(info)
        writer = RowWriter(self.cell, self._durable)
        try:
            with writer, closing(answers):
                for finished in answers:
                    self._store(writer, finished, attempt)
            if self.stop.asked:
                raise Interrupted(self.stop.signum)
            self._way = self.executor.summary()
        except BaseException:
            # On a full disk this fails as well, and what failed first is what the user should read.
            with suppress(StoreError):
                # Whoever interrupts the last sample has them all.
                self._finish("complete" if self.finished == len(self.missing) else "partial", writer)
            raise
        self._finish("partial" if self._stopped else "complete", writer)

    def settle(self) -> None:
        """Describe a cell that has every sample and does not say so: its writer was killed after the last one."""
        manifest, rows = self.cell.manifest, self.cell.rows()
        ended = all("finished_at" in entry for entry in manifest.get("attempts", [])[-1:])
        summary = manifest.get("summary", {})
        # Samples beyond those that are wanted now may be part of a larger run that is not complete.
        if (ended and summary.get("status") == "complete") or len(rows) != self.total:
            return
        kept = {key: value for key, value in summary.items() if key != "stopped"}
        described = {**kept, **cell_summary(self.session.store, self.cell, "complete")}
        self.cell.finish(described, None if ended else {"killed": True})

    def _finish(self, status: str, writer: RowWriter) -> None:
        # Not all workers that were asked for need have had a sample.
        known = {"write_ms": round(writer.write_ms, 3), "answered_by": len(self._answered_by)}
        self.cell.finish(self._summary(status), known)

    def _store(self, writer: RowWriter, finished: Finished, attempt: int) -> None:
        row = {**finished.row, "attempt": attempt}
        self._answered_by.add(row.get("worker"))
        # A second Ctrl-C must not fall between a sample and its row.
        with self.stop.shielded():
            writer.put(row, finished.text)
        self._count_failure(row)

    def _durable(self, row: Mapping[str, Any]) -> None:
        """Called when a kill can no longer cost a row."""
        self.finished += 1
        self.progress.advance(row)

    def _count_failure(self, row: Mapping[str, Any]) -> None:
        if row.get("error") is None:
            return
        self.failed += 1
        if self.failed == 1:
            self.first_error = row["error"]
        limits, request = self.session.request.limits, self.session.request
        if limits.exceeded(self.failed, self.total):
            raise TooManyErrors(
                f"{self.failed} of {self.total} samples of {self.plan.suite.name} x {self.plan.spec.name} failed, more "
                f"than --fail-on-error {limits.fail_on_error:g} allows; the first: {self.first_error.rstrip('.')}; "
                f"everything finished is stored, and this goes on: {request.command}"
            )

    @property
    def _stopped(self) -> str | None:
        """Why the executor left samples; None where it left none."""
        return self._way.get("stopped")

    def result(self) -> CellResult:
        """Return what the cell has now of the samples that were wanted."""
        wanted = set(self._ids.values())
        # On disk they are in the order in which they were finished.
        rows = sorted((row for row in self.cell.rows() if row["sample_id"] in wanted), key=lambda row: row["index"])
        errors = [row["error"] for row in rows if row.get("error")]
        status = "partial" if self._stopped else "complete"
        if errors:
            status = "failed" if len(errors) == self.total else "partial"
        return CellResult(
            suite=self.plan.suite.name,
            method=self.plan.spec.name,
            cell=self.cell.cell_id,
            status=status,
            rows=rows,
            error=errors[0] if errors else None,
            stopped=self._stopped and f"{self._stopped}; {self.total - len(rows)} of {self.total} samples have no row",
            new_samples=self.finished,
            summary=self.cell.manifest.get("summary", {}),
        )

    def _summary(self, status: str) -> dict[str, Any]:
        return {**cell_summary(self.session.store, self.cell, status), **self.executor.summary()}
