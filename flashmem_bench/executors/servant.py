"""What a worker process holds: a backbone that is loaded once, and the cells that it has prepared.

A worker is asked in plain values and answers in plain values, so that the asking can go through a pipe or a cluster.
Everything that the runner would do in its own process is done by `executors.here.Here`; rows cannot differ for another
reason than the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import BenchError
from flashmem_bench.executors.base import Work, unheard
from flashmem_bench.executors.here import Here
from flashmem_bench.interrupts import Stop
from flashmem_bench.prepare import CellPlan, Reference
from flashmem_bench.registry import get_method

if TYPE_CHECKING:
    from flashmem_bench.answers import Finished
    from flashmem_bench.session import Request, Session


@dataclass(frozen=True)
class PlainPlan:
    """A cell as it goes between processes; see `prepare.CellPlan`."""

    suite: str
    method: str
    identity: dict[str, Any]
    descr: dict[str, Any]
    common: dict[str, Any]

    def at(self, session: Session) -> CellPlan:
        """Return the plan with the suite that this process has loaded."""
        spec, suite = get_method(self.method), session.suite(self.suite)
        return CellPlan(spec, suite, dict(self.identity), dict(self.descr), dict(self.common))


@dataclass(frozen=True)
class Task:
    """One shard of a cell.

    Attributes:
        cell: Id of the cell, which the worker must find as well.
        reference: What the method is matched to.
        batches: Indices of samples, see `executors.base.Work`.
        wanted: The indices among them whose rows are missing.
    """

    suite: str
    method: str
    cell: str
    reference: Reference | None
    batches: list[list[int]]
    wanted: frozenset[int]


class Servant:
    """Answers tasks.

    Args:
        session: Its request is the runner's; backbone and suites are its own.
    """

    def __init__(self, session: Session):
        self.session = session
        self._here = Here(session)
        self._plans: dict[tuple[str, str], CellPlan] = {}
        self._asked: Request | None = None

    def plan(self, suite: str, method: str, reference: Reference | None, note: Callable[[str], None]) -> PlainPlan:
        """Find what a method needs on a suite and name the cell; see `prepare.prepare` for what it raises."""
        plan = self._here.plan(suite, method, reference, note)
        self._plans, self._asked = {(suite, method): plan}, self.session.request
        return PlainPlan(suite, method, plan.identity, plan.descr, plan.common)

    def environment(self) -> dict[str, Any]:
        """Return what the timings of an attempt depend on."""
        return self._here.environment()

    def answers(
        self,
        task: Task,
        stop: Stop,
        note: Callable[[str], None],
        began: Callable[[Sequence[int], bool], None] = unheard,
    ) -> Generator[Finished]:
        """Return an iterator that yields each sample when it is done; `began` is that of `executors.base.Work`.

        Raises:
            BenchError: Here the same request names another cell.
        """
        # Values of an axis, and arms of a recipe, are the same method on the same suite under another request.
        if (task.suite, task.method) not in self._plans or self._asked != self.session.request:
            self.plan(task.suite, task.method, task.reference, note)
        plan = self._plans[task.suite, task.method]
        if plan.cell != task.cell:
            raise BenchError(
                f"a worker would write {task.suite} x {task.method} into cell {plan.cell}, not {task.cell}: it has "
                "other weights, another version or another type of device; give all workers the same"
            )
        return self._here.answers(Work(plan, task.batches, task.wanted, stop, began), note)

    def summary(self) -> dict[str, Any]:
        """Return what the summary of the cell should say of the way in which its samples were answered."""
        return self._here.summary()
