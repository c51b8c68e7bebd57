"""Who is blamed when workers of a cluster are lost, without Ray: every sample gets one row, whatever happens."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flashmem_bench.answers import Finished
from flashmem_bench.errors import BenchError
from flashmem_bench.executors import ray_pool
from flashmem_bench.executors.base import Work
from flashmem_bench.executors.pieces import Fault
from flashmem_bench.executors.ray_actor import Reply
from flashmem_bench.executors.ray_cell import CellRun
from flashmem_bench.executors.ray_pool import Actor, Lost, Pool
from flashmem_bench.interrupts import Stop
from flashmem_bench.limits import Limits
from flashmem_bench.prepare import CellPlan
from flashmem_bench.registry import get_method
from flashmem_bench.rows import sample_row, text_record

SAMPLES = 30
ENVIRONMENT = {"processor": "one"}


class FakePool:
    """Actors that answer at once.

    Args:
        count: How many there are at a time; one that is lost is replaced.
        fate: What becomes of an actor that is asked for a sample: None, or why it is lost and whether with its node.
    """

    def __init__(self, count: int, fate: Callable[[Actor, int], tuple[Fault, bool] | None]):
        self.fate, self.actors, self.made, self.excluded = fate, list[Actor](), 0, list[str]()
        self.todo: dict[Actor, list[int]] = {}
        self.refuses = ""
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        asked = SimpleNamespace(remote=lambda *values: values)
        handle = SimpleNamespace(begin=asked, next=asked)
        self.actors.append(Actor(self.made, f"node {self.made}", f"machine {self.made}", handle, ready=True))
        self.made += 1

    def __iter__(self) -> Iterator[Actor]:
        return iter(list(self.actors))

    @property
    def idle(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.waiting is None]

    @property
    def others(self) -> bool:
        return bool(self.actors)

    def look(self) -> None:
        pass

    def exclude(self, node: str, why: str) -> None:
        self.excluded.append(why)
        self.actors = [actor for actor in self.actors if actor.node != node]

    def lose(self, actor: Actor, fault: Fault, with_node: bool = False) -> Lost:
        self.actors.remove(actor)
        self._start()
        return Lost(actor, fault, with_node)

    def replies(self, wait: float) -> Iterator[tuple[Actor, Reply | Lost]]:
        for actor in [actor for actor in self.actors if actor.waiting is not None]:
            values, actor.waiting = actor.waiting, None
            if actor.asked == "begin":
                if actor.node == self.refuses:
                    yield actor, Reply(None, (), "there is no model folder")
                    continue
                task = values[1]
                self.todo[actor] = [index for batch in task.batches for index in batch if index in task.wanted]
                yield actor, Reply(ENVIRONMENT)
                continue
            stopping = values[0]
            if stopping or not self.todo[actor]:
                yield actor, Reply((None, {"why_not_reused": None}))
                continue
            index = self.todo[actor][0]
            fate = self.fate(actor, index)
            if fate is not None:
                yield actor, self.lose(actor, *fate)
                continue
            self.todo[actor].pop(0)
            yield actor, Reply((finished_of(index), None))


def finished_of(index: int) -> Finished:
    return Finished(sample_row({}, {"sample_id": f"hops-{index}", "index": index}), {"sample_id": f"hops-{index}"})


@pytest.fixture
def run(bench):
    """Run a cell of hops on a fake pool; returns the rows by index, what was noted, and the cell run."""

    def go(
        pool: FakePool, stop: Stop | None = None, limits: Limits | None = None
    ) -> tuple[dict[int, Any], list[str], Any]:
        suite, notes = bench.suites["hops"], list[str]()
        request = SimpleNamespace(limits=limits or Limits(), batch_size=1, split="test")
        cluster = SimpleNamespace(
            pool=pool,
            session=SimpleNamespace(request=request),
            workers=len(pool.actors),
            environment=lambda: ENVIRONMENT,
            question=lambda actor, suite, method: (None, []),
            heard=lambda actor, text: text,
            trouble=lambda actor, reply: BenchError(f"on the node {actor.machine}: {reply.trouble}"),
        )
        plan = CellPlan(get_method("vanilla"), suite, {"suite": "hops", "method": "vanilla"}, {}, {"cell": "c"})
        work = Work(plan, [[index] for index in range(SAMPLES)], frozenset(range(SAMPLES)), stop or Stop())
        cell = CellRun(cluster, "hops", None, work, notes.append)
        rows: dict[int, Any] = {}
        for finished in cell.finished():
            assert finished.row["index"] not in rows
            rows[finished.row["index"]] = finished.row
        return rows, notes, cell

    return go


def test_a_sample_that_ends_its_worker_twice_fails_and_no_other(run) -> None:
    dead = Fault("ended before its time")
    rows, notes, _ = run(FakePool(3, lambda actor, index: (dead, False) if index in (4, 17) else None))
    assert sorted(rows) == list(range(SAMPLES))
    failed = {index: row["error"] for index, row in rows.items() if row["error"]}
    assert failed == {4: "its worker twice ended before its time", 17: "its worker twice ended before its time"}
    assert any("is gone" in note for note in notes)


def test_a_lost_node_is_not_the_fault_of_the_sample_until_the_fourth_time(run) -> None:
    lost = Fault("lost with its node")
    times = {3: 3, 8: 4}

    def fate(actor: Actor, index: int) -> tuple[Fault, bool] | None:
        if times.get(index, 0) <= 0:
            return None
        times[index] -= 1
        return lost, True

    rows, _, _ = run(FakePool(2, fate))
    assert sorted(rows) == list(range(SAMPLES))
    assert {index: row["error"] for index, row in rows.items() if row["error"]} == {8: "was lost with its node 4 times"}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_every_sample_has_one_good_row(run, seed: int) -> None:
    chance, spared = random.Random(seed), set[int]()

    def fate(actor: Actor, index: int) -> tuple[Fault, bool] | None:
        if index in spared or chance.random() < 0.6:
            return None
        spared.add(index)
        return Fault("gone"), chance.random() < 0.5

    rows, _, _ = run(FakePool(chance.randint(1, 4), fate))
    assert sorted(rows) == list(range(SAMPLES)) and not any(row["error"] for row in rows.values())


def test_stopping_begins_no_sample(run) -> None:
    stop, seen = Stop(), list[int]()

    def fate(actor: Actor, index: int) -> None:
        seen.append(index)
        stop.asked = len(seen) >= 6

    rows, _, _ = run(FakePool(2, fate), stop)
    # The other worker may have been asked for its next one already.
    assert 6 <= len(rows) <= 7 and sorted(rows) == sorted(seen)


def test_a_second_ctrl_c_does_not_wait(run) -> None:
    stop = Stop()

    def fate(actor: Actor, index: int) -> None:
        stop.asked = stop.at_once = True

    pool = FakePool(2, fate)
    rows, _, _ = run(pool, stop)
    assert len(rows) <= 2 and all(actor.piece is None for actor in pool)


def test_a_node_that_cannot_do_it_is_left_alone_and_the_last_one_ends_the_run(run) -> None:
    pool = FakePool(2, lambda actor, index: None)
    pool.refuses = "node 1"
    rows, notes, _ = run(pool)
    assert sorted(rows) == list(range(SAMPLES)) and len(pool.excluded) == 1
    assert notes == ["on the node machine 1: there is no model folder; the run goes on without that node"]
    alone = FakePool(1, lambda actor, index: None)
    alone.refuses = "node 0"
    with pytest.raises(BenchError, match="on the node machine 0: there is no model folder"):
        run(alone)


def test_times_count_only_on_machines_of_one_kind(run) -> None:
    pool = FakePool(2, lambda actor, index: None)
    rows, _, _ = run(pool)
    assert all(row.get("timing_valid") is not False for row in rows.values())
    pool = FakePool(2, lambda actor, index: None)
    pool.actors[1].machine = pool.actors[0].machine
    rows, _, _ = run(pool)
    assert all(row["timing_valid"] is False for row in rows.values())


def test_a_time_beside_a_worker_that_is_gone_by_then_does_not_count(run) -> None:
    def fate(actor: Actor, index: int) -> tuple[Fault, bool] | None:
        return (Fault("ended before its time"), False) if actor is neighbour else None

    pool = FakePool(2, fate)
    first, neighbour = pool.actors
    neighbour.machine = first.machine
    rows, _, _ = run(pool)
    assert all(row["timing_valid"] is False for row in rows.values() if row["worker"] == first.number)


def test_all_workers_of_a_node_of_another_version_are_given_up_at_once(monkeypatch) -> None:
    """Their greetings come together, and the first one excludes the node."""
    node = {"Alive": True, "NodeID": "n", "NodeManagerAddress": "there", "Resources": {"CPU": 2}}
    remote = SimpleNamespace(remote=lambda *values: object())
    actor = SimpleNamespace(remote=lambda: SimpleNamespace(hello=remote))
    ray = SimpleNamespace(
        nodes=lambda: [node],
        cluster_resources=lambda: {"CPU": 2},
        remote=lambda kind: SimpleNamespace(options=lambda **needs: actor),
        wait=lambda references, num_returns, timeout: (references[:num_returns], references[num_returns:]),
        get=lambda reference: {"version": "0.0.0", "folder": "", "shared": True, "unseen": []},
        kill=lambda handle, no_restart: None,
        exceptions=SimpleNamespace(RayError=RuntimeError),
    )
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: None)
    for name, module in {"ray": ray, "ray.util": ray, "ray.util.scheduling_strategies": strategies}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ray_pool, "join", lambda address: (ray, False))
    monkeypatch.setattr(ray_pool, "LOOK_S", 0.0)
    pool = Pool("auto", "auto", 1)
    pool.look()
    assert len(list(pool)) == 2 and list(pool.replies(0.0)) == [] and list(pool) == []
    with pytest.raises(BenchError, match=r"can work: the node there has flashmem 0\.0\.0 and this"):
        pool.look()


def test_text_of_a_failed_sample_is_kept(bench) -> None:
    sample = bench.suites["hops"].samples("test")[0]
    assert text_record(sample, None, None)["prompt"] == sample.prompt
