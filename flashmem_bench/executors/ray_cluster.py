"""Answers on a Ray cluster: pieces of a cell go to whatever workers there are, rows come back as they are finished.

The runner's process loads no weights and is the only one that writes results, so nodes need no disk in common: what a
worker does not see of memories, thresholds, banks and suite files is sent to it (`travel`). What a lost node had begun
goes to another one; nothing that had come back is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import BenchError
from flashmem_bench.executors.base import Work
from flashmem_bench.executors.ray_actor import Question, Reply
from flashmem_bench.executors.ray_cell import CellRun
from flashmem_bench.executors.ray_pool import Actor, Lost, Pool
from flashmem_bench.executors.travel import Token, absolute, called_here, named_paths, parcels, unpack
from flashmem_bench.interrupts import Interrupted, Stop
from flashmem_bench.limits import Limits
from flashmem_bench.registry import get_method

if TYPE_CHECKING:
    from flashmem_bench.answers import Finished
    from flashmem_bench.executors.travel import Parcel
    from flashmem_bench.prepare import CellPlan, Reference
    from flashmem_bench.session import Session

_TICK_S = 0.2
# Seconds without an answer after which the user is told what is waited for.
_SLOW_S = 60.0


class RayCluster:
    """See `executors.base.Executor`.

    Args:
        session: Its request says which cluster; it loads suites alone.
        stop: Whether the user asked to stop.

    Raises:
        BenchError: There is no such cluster.
    """

    name = "ray"

    def __init__(self, session: Session, stop: Stop):
        request = session.request
        self.session, self.stop = session, stop
        self.request = replace(absolute(request), workers=1, executor="local", limits=Limits())
        self.pool = Pool(request.ray_address, request.device, request.worker_cpus)
        self.token = Token(self.request.results_dir)
        self.pool.hello = (str(self.token.path), self.token.text, named_paths(self.request))
        self._sent: dict[tuple[str, str], Any] = {}
        self._environment: dict[str, Any] = {}
        self._known: dict[str, tuple[str, Reference | None]] = {}
        self._run: CellRun | None = None

    @property
    def workers(self) -> int:
        """How many there are at the moment; one that is starting is none yet."""
        return max(1, sum(actor.ready for actor in self.pool))

    def plan(self, suite: str, method: str, reference: Reference | None, note: Callable[[str], None]) -> CellPlan:
        """See `Executor.plan`. One worker plans; the banks that it makes are kept here and sent to the others."""
        name = next(to for to, of in zip(self.request.suites, self.session.request.suites, strict=True) if of == suite)
        actor, reply = self._ask(name, method, reference, note)
        plain, self._environment = reply.value
        for bank in reply.parcels:
            unpack(self.request.own_dir, [bank])
        plan = replace(plain, suite=suite).at(self.session)
        plan.descr = {k: self.heard(actor, v) if isinstance(v, str) else v for k, v in plan.descr.items()}
        self._known = {plan.cell: (name, reference)}
        return plan

    def environment(self) -> dict[str, Any]:
        """See `Executor.environment`; of the worker that has planned."""
        return dict(self._environment)

    def answers(self, work: Work, note: Callable[[str], None]) -> Generator[Finished]:
        """See `Executor.answers`."""
        suite, reference = self._known[work.plan.cell]
        self._run = CellRun(self, suite, reference, work, note)
        return self._run.finished()

    def summary(self) -> dict[str, Any]:
        """See `Executor.summary`."""
        return self._run.summary() if self._run is not None else {}

    def close(self) -> None:
        """See `Executor.close`."""
        self.pool.close()
        self.token.remove()

    def question(self, actor: Actor, suite: str, method: str) -> tuple[Question, list[Any]]:
        """Return what a worker is asked about a cell, and the files that it lacks for that."""
        lacking = []
        for parcel in parcels(self.request, suite, get_method(method), actor.unseen, actor.shared):
            if parcel.label not in actor.sent:
                actor.sent.add(parcel.label)
                lacking.append(self._reference(parcel))
        return Question(self.request, suite, actor.unseen, actor.shared), lacking

    def heard(self, actor: Actor, text: str) -> str:
        """Return what a worker says, with places called as the user calls them."""
        return called_here(text, actor.folder, self.request, self.session.request.results_dir)

    def trouble(self, actor: Actor, reply: Reply) -> BenchError:
        """Return what went wrong on a node as an error of the same exit code."""
        error = BenchError(f"on the node {actor.machine}: {self.heard(actor, reply.trouble or '')}")
        error.exit_code = reply.exit_code
        return error

    def _taken(self, actor: Actor, reply: Reply, note: Callable[[str], None]) -> Reply:
        for text in reply.notes:
            note(self.heard(actor, text))
        if reply.trouble is not None:
            raise self.trouble(actor, reply)
        return reply

    def _reference(self, parcel: Parcel) -> Any:
        if parcel.label not in self._sent:
            self._sent[parcel.label] = self.pool.put(parcel)
        return self._sent[parcel.label]

    def _ask(
        self, suite: str, method: str, reference: Reference | None, note: Callable[[str], None]
    ) -> tuple[Actor, Reply]:
        """Have one worker plan a cell; another takes its place should it be lost.

        Raises:
            BenchError: The cell cannot be planned, or there are no workers.
            Interrupted: The user does not wait for it.
        """
        asked: Actor | None = None
        began = time.monotonic()
        while not self.stop.asked:
            self.pool.look()
            if asked is None and (idle := self.pool.idle):
                asked = min(idle, key=lambda actor: actor.number)
                question, lacking = self.question(asked, suite, method)
                asked.ask("plan", question, method, reference, *lacking)
            for actor, reply in self.pool.replies(_TICK_S):
                if isinstance(reply, Lost):
                    asked = None if actor is asked else asked
                elif actor is asked:
                    return actor, self._taken(actor, reply, note)
            if asked is None and time.monotonic() - began > _SLOW_S:
                note("waiting for a free worker of the Ray cluster (`ray status` shows who has what)")
                began = float("inf")
        raise Interrupted(self.stop.signum)
