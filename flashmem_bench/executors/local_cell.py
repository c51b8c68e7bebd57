"""One cell answered by worker processes: who gets which piece, what they hand over, and what happens when one ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import BenchError
from flashmem_bench.executors.base import Work, joined
from flashmem_bench.executors.failures import failed
from flashmem_bench.executors.pieces import Pieces
from flashmem_bench.executors.servant import Task
from flashmem_bench.executors.supervisor import Event, Worker, Workers

if TYPE_CHECKING:
    from flashmem_bench.answers import Finished
    from flashmem_bench.executors.local_worker import Trouble
    from flashmem_bench.prepare import Reference
    from flashmem_bench.session import Session

# Seconds between two looks at the limits and at Ctrl-C.
_TICK_S = 0.1
# Where so long lies between them, all was held up, as by Ctrl-Z or a machine that slept: that is nobody's time.
_HELD_UP_S = 2.0
# Seconds after Ctrl-C in which a worker may still say that it has begun a sample.
_GRACE_S = 2.0


class CellRun:
    """Hands the missing samples of a cell out and takes their rows.

    Args:
        session: Its request is the user's.
        workers: The processes.
        suite: The suite, as the request names it.
        reference: What the cell's method is matched to.
        work: What is missing.
        note: Told what the user should know.

    Attributes:
        stopped: Why samples were left; None where none were.
    """

    def __init__(
        self,
        session: Session,
        workers: Workers,
        suite: str,
        reference: Reference | None,
        work: Work,
        note: Callable[[str], None],
    ):
        self.session, self.workers, self.work, self._say = session, workers, work, note
        self.limits, self.stopped = session.request.limits, None
        plan = work.plan
        self.samples = plan.suite.samples(session.request.split)
        streams = session.request.batch_size > 1
        self.pieces = Pieces.of(work.batches, work.wanted, self.samples, workers.count, streams)
        self._task = Task(suite, plan.spec.name, plan.cell, reference, [], frozenset())
        self._summaries: dict[Worker, dict[str, Any]] = {}
        self._winding_up, self._since, self._looked, self._asked_at = False, 0.0, 0.0, 0.0
        self._error: BenchError | None = None

    def finished(self) -> Generator[Finished]:
        """Yield each sample when its row has come.

        Raises:
            FlashMemError: What would fail for every sample.
        """
        self._since = self._looked = time.monotonic()
        with self.work.stop.shielded():
            try:
                while self.pieces.left and (self._busy() or not self._winding_up):
                    self._hand_out()
                    event = self.workers.event(_TICK_S)
                    while event is not None:
                        yield from self._take(event)
                        event = self.workers.event(0)
                    self._look()
                if self._error is not None:
                    raise self._error
            finally:
                self.workers.stop(self._busy())

    def summary(self) -> dict[str, Any]:
        """Return what the cell's summary should say of the way in which its samples were answered."""
        found = joined(self._summaries.values())
        return {**found, "stopped": self.stopped} if self.stopped else found

    def _busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.piece is not None]

    def _hand_out(self) -> None:
        for number in range(self.workers.count):
            if self._winding_up or not self.pieces.waiting:
                return
            worker = self.workers.get(number)
            if worker.piece is None:
                piece = worker.piece = self.pieces.take()
                assert piece is not None
                worker.answering = False
                task = replace(self._task, batches=piece.batches, wanted=piece.wanted)
                worker.send("task", (self.session.request, task))

    def _take(self, event: Event) -> Iterator[Finished]:
        worker, value = event.worker, event.value
        if event.word == "note":
            self._say(value)
        elif event.word == "began":
            worker.take(*value)
            self.workers.lives()
        elif event.word == "row":
            worker.begun.pop(value.row["index"], None)
            if self.pieces.finished(value.row["index"]):
                yield self._marked(worker, value)
        elif event.word == "done":
            self._done(worker, value)
        elif event.word == "error":
            self._fail(error_of(value))
        elif event.word == "gone" and worker.piece is not None and not self._winding_up:
            yield from self._replace(worker)

    def _done(self, worker: Worker, summary: dict[str, Any]) -> None:
        assert worker.piece is not None
        left = self.pieces.left.intersection(worker.piece.wanted)
        worker.piece, self._summaries[worker] = None, summary
        worker.begun.clear()
        if left and not self._winding_up:
            raise BenchError(f"a worker has ended its piece of {self._name} without {len(left)} of its samples")

    def _replace(self, worker: Worker) -> Iterator[Finished]:
        """Give what a worker has left to others; those that it failed by get their rows."""
        assert worker.piece is not None
        fault = worker.end()
        if self.pieces.left.isdisjoint(worker.begun):
            self.workers.strike(fault)
        guilty = self.pieces.give_back(worker.piece, worker.begun, fault)
        names = ", ".join(self.samples[index].sample_id for index in guilty)
        reason = fault.reason if fault.overdue is not None else f"a worker was {fault.reason}"
        self._say(f"{self._name}: " + (f"{names}: {reason}" if guilty else f"{reason}; what it had is asked again"))
        for index in guilty:
            error = fault.reason if fault.overdue is not None else f"its worker was twice {fault.reason}"
            yield self._marked(worker, failed(self.work.plan, index, self.samples[index], error))

    def _marked(self, worker: Worker, finished: Finished) -> Finished:
        """Say who answered; samples that others were answered beside have no time that could be compared."""
        alone = worker.piece is not None and worker.piece.alone and self.session.request.batch_size > 1
        if self.workers.count > 1:
            finished.row.update(worker=worker.number, workers=self.workers.count)
        if self.workers.count > 1 or alone:
            finished.row["timing_valid"] = False
        return finished

    def _look(self) -> None:
        """Stop what the limits or the user forbid."""
        now = time.monotonic()
        since_last = now - self._looked
        if since_last < _TICK_S:
            return
        if since_last > _HELD_UP_S:
            self._since += since_last
            for worker in self._busy():
                worker.postpone(since_last)
        self._looked, stop, limit = now, self.work.stop, self.limits.cell_timeout
        if stop.asked:
            self._wind_up(now)
        if stop.at_once:
            self._end(self._busy())
        elif limit is not None and now - self._since > limit and not self._winding_up:
            self._winding_up = True
            self.stopped = f"the cell took longer than {limit:g} s (--cell-timeout)"
            self._end(self._busy())
        for worker in self._busy():
            worker.check(self.limits.worker_memory, self.limits.sample_timeout)

    def _fail(self, error: BenchError) -> None:
        """End all workers; the rows that they have handed over are taken before the error is raised."""
        self._error, self._winding_up = self._error or error, True
        self._end(self._busy())

    def _wind_up(self, now: float) -> None:
        """Let those who answer a sample finish it, and end those who do not, such as who is loading a model."""
        if not self._winding_up:
            self._winding_up, self._asked_at = True, now
            for worker in self._busy():
                worker.send("stop")
        elif now - self._asked_at > _GRACE_S:
            # Who had begun before the question came has said so by now.
            self._end([worker for worker in self._busy() if not worker.answering])

    def _end(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.stop()

    @property
    def _name(self) -> str:
        return f"{self.work.plan.suite.name} x {self.work.plan.spec.name}"


def error_of(trouble: Trouble) -> BenchError:
    """Return what went wrong in a worker as an error of the same exit code."""
    error = BenchError(trouble.message)
    error.exit_code = trouble.exit_code
    return error
