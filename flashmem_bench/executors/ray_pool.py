"""The workers of a Ray cluster: one actor on each GPU, or on so many CPUs, wherever a node has them.

A node that joins gets actors, one that is lost loses them, and a node where none can work is left alone with a
sentence. Each actor does one thing at a time; what it was asked for last is its `waiting`.

Only this module and `ray_cluster` import Ray. Ray carries messages between its own processes as pickles; no file of
ours is one.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from flashmem_bench import __version__
from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.executors.pieces import Fault, Piece
from flashmem_bench.executors.ray_actor import Answerer, Reply

# Seconds between two looks at the nodes; and without any worker before the run gives up.
LOOK_S, PATIENCE_S = 2.0, 600.0
# An actor that ends so many times in a row before it has answered anything will not answer the next time either.
_STRIKES = 3
_REACH_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Actor:
    """A worker on a node.

    Attributes:
        number: From 0; one that replaces another has a number of its own.
        node: Ray's id of the node.
        machine: Its address: actors of one machine share its memory and caches.
        handle: Ray's.
        waiting: What it was asked for last, a reference of Ray's; None where it is idle.
        asked: What that is: hello, plan, begin or next.
        since: When, in seconds of a monotonic clock.
        ready: It has said hello.
        shared: It sees the results folder.
        unseen: Paths that the request names and it does not see.
        folder: Where it keeps what is sent to it.
        sent: Labels of the files that it has.
        piece: What it was given to answer and has not done yet.
        first: Nothing of the cell has come from it yet.
        machine_kind: What its timings depend on, as far as it can be compared.
    """

    number: int
    node: str
    machine: str
    handle: Any
    waiting: Any = None
    asked: str = ""
    since: float = 0.0
    ready: bool = False
    shared: bool = False
    unseen: frozenset[str] = frozenset()
    folder: str = ""
    sent: set[tuple[str, str]] = field(default_factory=set)
    piece: Piece | None = None
    first: bool = True
    machine_kind: Any = None

    def ask(self, word: str, *values: Any) -> None:
        """Ask for something; it must be idle."""
        assert self.waiting is None
        self.waiting, self.asked, self.since = getattr(self.handle, word).remote(*values), word, time.monotonic()


@dataclass(frozen=True)
class Lost:
    """An actor that is gone.

    Attributes:
        with_node: Its whole node is gone.
    """

    actor: Actor
    fault: Fault
    with_node: bool


class Pool:
    """Joins a cluster and keeps an actor wherever there is room for one.

    Args:
        address: Of the cluster; `auto` finds the one of this machine.
        device: What the user wants: a GPU each, or CPUs.
        cpus: CPUs of an actor that has no GPU.

    Raises:
        BenchError: There is no Ray, or no such cluster.
    """

    def __init__(self, address: str, device: str, cpus: int):
        self._ray, self._ours = join(address)
        self._resource, self._amount = self._needed(device, cpus)
        self._actors: list[Actor] = []
        self._made, self._looked = 0, float("-inf")
        self._excluded: dict[str, str] = {}
        self._strikes: Counter[str] = Counter()
        self.hello: tuple[str, str, list[str]] = ("", "", [])
        self._alone_since = time.monotonic()

    def __iter__(self) -> Iterator[Actor]:
        return iter(list(self._actors))

    @property
    def idle(self) -> list[Actor]:
        """Those that could be asked for something."""
        return [actor for actor in self._actors if actor.ready and actor.waiting is None]

    def put(self, value: Any) -> Any:
        """Hand a large value to Ray, which sends it to each node once."""
        return self._ray.put(value)

    def look(self) -> None:
        """Start actors where there is room.

        Raises:
            BenchError: No node can work, or there has been none for a long time.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        for node in nodes:
            room = int(node["Resources"].get(self._resource, 0) // self._amount)
            here = sum(actor.node == node["NodeID"] for actor in self._actors)
            for _ in range(0 if node["NodeID"] in self._excluded else room - here):
                self._start(node)
        if self._actors:
            self._alone_since = now
        elif nodes and all(node["NodeID"] in self._excluded for node in nodes):
            raise BenchError(f"no node of the Ray cluster can work: {next(iter(self._excluded.values()))}")
        elif now - self._alone_since > PATIENCE_S:
            raise BenchError(
                f"the Ray cluster has had no worker for {PATIENCE_S / 60:.0f} minutes; everything finished is stored: "
                "start a node and run the same command again"
            )

    def replies(self, wait: float) -> Iterator[tuple[Actor, Reply | Lost]]:
        """Yield what has been answered within so many seconds, and who is gone."""
        waiting = {actor.waiting: actor for actor in self._actors if actor.waiting is not None}
        if not waiting:
            time.sleep(wait)
            return
        done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=wait)
        more, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=0) if done else ([], [])
        for reference in dict.fromkeys([*done, *more]):
            actor = waiting[reference]
            # Given up because of another answer of this batch, as all of an excluded node are.
            if actor.waiting is None:
                continue
            try:
                value = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                yield actor, self.lose(actor, error)
                continue
            actor.waiting = None
            if actor.asked == "hello":
                self._greet(actor, value)
            else:
                self._strikes[actor.node] = 0
                yield actor, value

    def lose(self, actor: Actor, reason: Exception | Fault) -> Lost:
        """Give an actor up, whatever it is doing."""
        if actor in self._actors:
            self._actors.remove(actor)
        with suppress(Exception):
            self._ray.kill(actor.handle, no_restart=True)
        actor.waiting = None
        if isinstance(reason, Fault):
            return Lost(actor, reason, False)
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        text = next(iter(str(reason).strip().splitlines()), type(reason).__name__)
        with_node = actor.node not in alive or "node has died" in str(reason)
        _log.debug("actor %d is lost: %s", actor.number, reason)
        if not with_node:
            self._strike(actor, text if actor.ready else _why_not_started(str(reason)))
        return Lost(actor, Fault("lost with its node" if with_node else "ended before its time"), with_node)

    def exclude(self, node: str, why: str) -> None:
        """Leave a node alone from now on; its actors end."""
        self._excluded[node] = why
        for actor in [actor for actor in self._actors if actor.node == node and actor.piece is None]:
            self.lose(actor, Fault(why))

    @property
    def others(self) -> bool:
        """Whether any node can work, as far as that is known."""
        return any(node["Alive"] and node["NodeID"] not in self._excluded for node in self._ray.nodes())

    def close(self) -> None:
        """End all actors, and leave the cluster if it was joined here."""
        with suppress(Exception):
            left = [actor.handle.leave.remote() for actor in self._actors if actor.waiting is None and actor.ready]
            if left:
                self._ray.wait(left, num_returns=len(left), timeout=2.0)
        for actor in self:
            self.lose(actor, Fault("not needed any more"))
        if self._ours:
            self._ray.shutdown()

    def _start(self, node: dict[str, Any]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        needs = {"num_cpus": self._amount} if self._resource == "CPU" else {"num_gpus": self._amount}
        remote = self._ray.remote(Answerer).options(**needs, scheduling_strategy=where, max_restarts=0)
        actor = Actor(self._made, node["NodeID"], node["NodeManagerAddress"], remote.remote())
        self._made += 1
        self._actors.append(actor)
        actor.ask("hello", *self.hello)

    def _greet(self, actor: Actor, told: dict[str, Any]) -> None:
        if told["version"] != __version__:
            self.exclude(
                actor.node,
                f"the node {actor.machine} has flashmem {told['version']} and this machine {__version__}; install the "
                "same version everywhere",
            )
            return
        actor.ready, actor.shared, actor.folder = True, told["shared"], told["folder"]
        actor.unseen = frozenset(told["unseen"])

    def _strike(self, actor: Actor, why: str) -> None:
        self._strikes[actor.node] += 1
        if self._strikes[actor.node] >= _STRIKES:
            self.exclude(actor.node, f"on the node {actor.machine} {_STRIKES} workers in a row ended: {why}")

    def _needed(self, device: str, cpus: int) -> tuple[str, int]:
        """Return what an actor takes of a node, and how much of it."""
        if ":" in device:
            raise UsageError(f"--device {device} is one device of a machine; on a cluster name its kind alone")
        there = bool(self._ray.cluster_resources().get("GPU"))
        if device == "cpu" or (device == "auto" and not there):
            return "CPU", cpus
        if not there:
            raise UsageError("no node of the Ray cluster has a GPU; use --device cpu, or add one")
        return "GPU", 1


def _why_not_started(reason: str) -> str:
    if "ModuleNotFoundError" in reason or "No module named" in reason:
        return "flashmem is not installed there; install the same version on every node"
    return next((line.strip() for line in reversed(reason.splitlines()) if line.strip()), "no reason is known")


def join(address: str) -> tuple[Any, bool]:
    """Return the module `ray`, connected, and whether that was done here.

    Raises:
        BenchError: It is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise BenchError("--executor ray needs Ray: pip install 'flashmem[ray]', here and on every node") from error
    if ray.is_initialized():
        return ray, False
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Its documentation does not say which types mean that there is no such cluster.
        why = " ".join(str(error).split())
        raise BenchError(
            f"cannot join a Ray cluster at {address} ({why[:300]}); start one with `ray start --head`, add nodes with "
            "`ray start --address=HOST:6379`, and run this on one of them"
        ) from error
    _quiet()
    return ray, True


def _reach(address: str) -> None:
    """Find out at once that nobody listens; Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()


def _quiet() -> None:
    """Send what Ray has to say of lost nodes to our log: it would go to stdout, where results are."""
    with suppress(Exception):
        from ray._private import worker

        if hasattr(worker, "print_to_stdstream"):
            worker.print_to_stdstream = lambda data, **_: _log.debug("%s", "\n".join(map(str, data.get("lines", ()))))
