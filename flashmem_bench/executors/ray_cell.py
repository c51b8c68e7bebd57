"""One cell answered by the workers of a Ray cluster: who gets which piece, and what happens when a node is lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import BenchError
from flashmem_bench.executors.base import Work, joined
from flashmem_bench.executors.failures import failed
from flashmem_bench.executors.pieces import Fault, Piece, Pieces
from flashmem_bench.executors.ray_pool import Actor, Lost
from flashmem_bench.executors.servant import Task

if TYPE_CHECKING:
    from flashmem_bench.answers import Finished
    from flashmem_bench.executors.ray_actor import Reply
    from flashmem_bench.executors.ray_cluster import RayCluster
    from flashmem_bench.prepare import Reference

_TICK_S = 0.2
# A node that is lost is not the fault of the sample under way, unless it happens again and again.
_LOST_NODES = 4
# The first answer of an actor in a cell also loads, compiles and warms up: it may take so many times as long.
_WARM_UP = 10
# What two workers must have in common before their times are those of one machine.
_KIND = ("device_name", "processor", "cpus", "cpu_quota", "threads", "python", "platform", "versions")


class CellRun:
    """Hands the missing samples of a cell out and takes their rows.

    Args:
        cluster: The executor.
        suite: The suite, as the executor's request names it.
        reference: What the cell's method is matched to.
        work: What is missing.
        note: Told what the user should know, each sentence once.
    """

    def __init__(
        self,
        cluster: RayCluster,
        suite: str,
        reference: Reference | None,
        work: Work,
        note: Callable[[str], None],
    ):
        self.cluster, self.pool, self.suite, self.reference, self.work = cluster, cluster.pool, suite, reference, work
        request = cluster.session.request
        self.limits, self._together = request.limits, request.batch_size
        self.samples = work.plan.suite.samples(request.split)
        workers = max(1, len(list(self.pool)))
        self.pieces = Pieces.of(work.batches, work.wanted, self.samples, workers, self._together > 1)
        self._kind = kind_of(cluster.environment())
        self._losses: Counter[int] = Counter()
        self._shared, self._warm = set[str](), set[int]()
        self._summaries: list[dict[str, Any]] = []
        self._said: set[str] = set()
        self._say, self._stopped = note, None
        self._winding_up, self._since = False, time.monotonic()

    def finished(self) -> Generator[Finished]:
        """Yield each sample when its row has come.

        Raises:
            FlashMemError: What would fail for every sample.
        """
        self._since = time.monotonic()
        with self.work.stop.shielded():
            try:
                while self.pieces.left and (self._busy() or not self._winding_up):
                    self._hand_out()
                    for actor, reply in self.pool.replies(_TICK_S):
                        yield from self._lost(reply) if isinstance(reply, Lost) else self._take(actor, reply)
                    yield from self._look()
                self._let_end()
            finally:
                # Whoever still has a piece was left in the middle of it.
                for actor in self._busy():
                    self.pool.lose(actor, Fault("not waited for"))
                    actor.piece = None

    def summary(self) -> dict[str, Any]:
        """Return what the cell's summary should say of the way in which its samples were answered."""
        found = joined(self._summaries)
        return {**found, "stopped": self._stopped} if self._stopped else found

    def _busy(self) -> list[Actor]:
        return [actor for actor in self.pool if actor.piece is not None]

    def _hand_out(self) -> None:
        if self._winding_up:
            return
        self.pool.look()
        for actor in self.pool.idle:
            if actor.piece is None and self.pieces.waiting:
                self._begin(actor, self.pieces.take())

    def _begin(self, actor: Actor, piece: Piece | None) -> None:
        assert piece is not None
        plan = self.work.plan
        task = Task(self.suite, plan.spec.name, plan.cell, self.reference, piece.batches, piece.wanted)
        question, lacking = self.cluster.question(actor, self.suite, plan.spec.name)
        actor.piece, actor.first = piece, actor.number not in self._warm
        actor.ask("begin", question, task, *lacking)

    def _take(self, actor: Actor, reply: Reply) -> Iterator[Finished]:
        for text in reply.notes:
            self._note(self.cluster.heard(actor, text))
        if actor.piece is None:
            return
        if reply.trouble is not None:
            self._trouble(actor, reply)
        elif actor.asked == "begin":
            actor.machine_kind = kind_of(reply.value)
            actor.ask("next", self._winding_up or self.work.stop.asked)
        else:
            finished, summary = reply.value
            if finished is None:
                self._done(actor, summary)
                return
            actor.first = False
            self._warm.add(actor.number)
            # It goes on while the row is stored.
            actor.ask("next", self._winding_up or self.work.stop.asked)
            if self.pieces.finished(finished.row["index"]):
                yield self._marked(actor, finished)

    def _done(self, actor: Actor, summary: dict[str, Any]) -> None:
        assert actor.piece is not None
        left = self.pieces.left.intersection(actor.piece.wanted)
        actor.piece = None
        self._summaries.append(summary)
        if left and not self._winding_up:
            raise BenchError(f"a worker has ended its piece of {self._name} without {len(left)} of its samples")

    def _trouble(self, actor: Actor, reply: Reply) -> None:
        """Go on without a node that cannot do what others can; where there is no other, that is the end."""
        assert actor.piece is not None
        error, piece, actor.piece = self.cluster.trouble(actor, reply), actor.piece, None
        if actor.asked != "begin":
            raise error
        self.pool.exclude(actor.node, str(error))
        if not self.pool.others:
            raise error
        self._note(f"{error}; the run goes on without that node")
        self.pieces.give_back(piece, (), Fault("refused"))

    def _lost(self, lost: Lost) -> Iterator[Finished]:
        """Give what a worker has left to others; those that it failed by get their rows."""
        actor, fault = lost.actor, lost.fault
        if actor.piece is None:
            return
        piece, actor.piece = actor.piece, None
        # Actors answer in order, so what was under way is what comes next.
        begun = [] if actor.asked == "begin" else self._under_way(piece)
        self._losses.update(begun if lost.with_node else ())
        blamed = [index for index in begun if not lost.with_node or self._losses[index] >= _LOST_NODES]
        if lost.with_node and blamed:
            fault = Fault(f"was {fault.reason} {_LOST_NODES} times", frozenset(blamed))
        guilty = self.pieces.give_back(piece, blamed, fault)
        self._note(f"a worker on {actor.machine} is gone ({fault.reason}); its samples go to others")
        for index in guilty:
            reason = fault.reason if fault.overdue is not None else f"its worker twice {fault.reason}"
            yield self._marked(actor, failed(self.work.plan, index, self.samples[index], reason))

    def _under_way(self, piece: Piece) -> list[int]:
        left = (index for batch in piece.batches for index in batch if index in self.pieces.left & piece.wanted)
        return [index for index, _ in zip(left, range(self._together), strict=False)]

    def _marked(self, actor: Actor, finished: Finished) -> Finished:
        """Say who answered; a time counts where the machine is the attempt's kind and nobody else is at work on it."""
        self._see_who_shares()
        finished.row.update(worker=actor.number, workers=self.cluster.workers)
        if actor.machine in self._shared or (actor.machine_kind is not None and actor.machine_kind != self._kind):
            finished.row["timing_valid"] = False
        return finished

    def _see_who_shares(self) -> None:
        """Note machines with several workers; one that is gone by the end of a sample may have disturbed it."""
        count = Counter(actor.machine for actor in self.pool if actor.ready)
        self._shared.update(machine for machine, there in count.items() if there > 1)

    def _look(self) -> Iterator[Finished]:
        """Do what the limits or the user demand."""
        now, limits, stop = time.monotonic(), self.limits, self.work.stop
        self._see_who_shares()
        if stop.asked:
            self._wind_up()
        if stop.at_once:
            self._end()
        elif limits.cell_timeout is not None and now - self._since > limits.cell_timeout and not self._winding_up:
            self._winding_up = True
            self._stopped = f"the cell took longer than {limits.cell_timeout:g} s (--cell-timeout)"
            self._end()
        if limits.sample_timeout is not None:
            for actor in self._busy():
                limit = limits.sample_timeout * (_WARM_UP if actor.first else 1)
                if actor.asked == "next" and now - actor.since > limit:
                    reason = f"took longer than {limits.sample_timeout:g} s (--sample-timeout); its worker was stopped"
                    overdue = frozenset(self._under_way(actor.piece) if actor.piece else ())
                    yield from self._lost(self.pool.lose(actor, Fault(reason, overdue)))

    def _wind_up(self) -> None:
        """Let those who answer a sample finish it, and end those who do not."""
        if self._winding_up:
            return
        self._winding_up = True
        for actor in self._busy():
            if actor.asked == "begin":
                self.pool.lose(actor, Fault("not waited for"))

    def _end(self) -> None:
        for actor in self._busy():
            self.pool.lose(actor, Fault("not waited for"))

    def _let_end(self) -> None:
        """Take the summaries of the last pieces; every row is there already."""
        deadline = time.monotonic() + 5.0
        while not self._winding_up and self._busy() and time.monotonic() < deadline:
            for actor, reply in self.pool.replies(_TICK_S):
                if isinstance(reply, Lost):
                    actor.piece = None
                else:
                    for _ in self._take(actor, reply):
                        pass

    @property
    def _name(self) -> str:
        return f"{self.work.plan.suite.name} x {self.work.plan.spec.name}"

    def _note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)


def kind_of(environment: dict[str, Any]) -> dict[str, Any]:
    """Return what of an environment decides times, the load of the moment left out."""
    return {key: environment.get(key) for key in _KIND}
