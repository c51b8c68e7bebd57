"""Answers in processes of this machine: one for each GPU, or several that share the processors.

The runner's process loads no weights: it hands pieces of a cell to workers and stores what comes back. A worker that
exceeds a limit, or dies, costs at most the samples that it had begun; another one goes on with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from flashmem_bench.executors.base import Work
from flashmem_bench.executors.local_cell import CellRun, error_of
from flashmem_bench.executors.supervisor import Worker, Workers
from flashmem_bench.interrupts import Interrupted, Stop

if TYPE_CHECKING:
    from flashmem_bench.answers import Finished
    from flashmem_bench.prepare import CellPlan, Reference
    from flashmem_bench.session import Session

_TICK_S = 0.1


class Local:
    """See `executors.base.Executor`.

    Args:
        session: Its request says how many workers there are and what limits they have; it loads suites alone.
        stop: Whether the user asked to stop.
        workers: Processes that outlive this executor; by default it has its own.
    """

    name = "local"

    def __init__(self, session: Session, stop: Stop, workers: Workers | None = None):
        request = session.request
        self.session, self.stop, self.workers = session, stop, request.workers
        self._workers, self._own = workers or Workers(request.workers, request.device), workers is None
        self._known: dict[str, tuple[str, Reference | None]] = {}
        self._run: CellRun | None = None
        self._said: set[str] = set()

    def plan(self, suite: str, method: str, reference: Reference | None, note: Callable[[str], None]) -> CellPlan:
        """See `Executor.plan`. One worker plans, since that may make banks and thresholds; the others find them."""
        self._said = set()
        plan = self._ask("plan", (self.session.request, suite, method, reference), self._once(note)).at(self.session)
        self._known = {plan.cell: (suite, reference)}
        return plan

    def environment(self) -> dict[str, Any]:
        """See `Executor.environment`."""
        return dict(self._ask("about", self.session.request, lambda text: None))

    def answers(self, work: Work, note: Callable[[str], None]) -> Generator[Finished]:
        """See `Executor.answers`; that a method cannot be built is known when the first worker has tried."""
        suite, reference = self._known[work.plan.cell]
        self._run = CellRun(self.session, self._workers, suite, reference, work, self._once(note))
        return self._run.finished()

    def summary(self) -> dict[str, Any]:
        """See `Executor.summary`."""
        return self._run.summary() if self._run is not None else {}

    def close(self) -> None:
        """See `Executor.close`."""
        if self._own:
            self._workers.close()

    def _once(self, note: Callable[[str], None]) -> Callable[[str], None]:
        """Return what passes each sentence about a cell on once: every worker plans, and says the same."""

        def say(text: str) -> None:
            if text not in self._said:
                self._said.add(text)
                note(text)

        return say

    def _ask(self, word: str, value: Any, note: Callable[[str], None]) -> Any:
        """Return what the first worker answers; another takes its place should it end."""
        while True:
            worker = self._workers.get(0)
            worker.send(word, value)
            answered, answer = self._answer_of(worker, note)
            if answered:
                self._workers.lives()
                return answer

    def _answer_of(self, worker: Worker, note: Callable[[str], None]) -> tuple[bool, Any]:
        """Wait for an answer; returns whether it came, and it.

        Raises:
            FlashMemError: What is asked for cannot be had.
            Interrupted: The user does not wait for it.
        """
        memory = self.session.request.limits.worker_memory
        while not self.stop.asked:
            event = self._workers.event(_TICK_S)
            if event is None or event.worker is not worker:
                worker.check(memory)
            elif event.word == "note":
                note(event.value)
            elif event.word == "answer":
                return True, event.value
            elif event.word == "error":
                raise error_of(event.value)
            elif event.word == "gone":
                self._workers.strike(worker.end())
                return False, None
        raise Interrupted(self.stop.signum)
