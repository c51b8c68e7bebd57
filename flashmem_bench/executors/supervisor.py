"""The parent's side of worker processes of this machine: starting them, hearing them, ending them.

Every worker has a thread here that reads its pipe, so that a message which is long on its way holds up nobody. All
messages come into one queue, in each worker's order, and the last one of a worker, however it ended, is `gone`: what it
had sent before is taken first, so no row that a worker has handed over is lost with it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import psutil

from flashmem_bench.errors import BenchError
from flashmem_bench.executors.local_worker import Place, main
from flashmem_bench.executors.pieces import Fault, Piece

# Ended by the kernel where memory runs out, most of the time.
_KILLED = "ended by SIGKILL (the system does that where memory runs out)"
# A worker that ends so many times before it has begun a sample will not begin the next time either.
_STRIKES = 3
# The first generation of a worker also compiles, records and allocates: it may take so many times as long.
_WARM_UP = 10
# Where there is a device that is no CPU: NVIDIA's, AMD's, Intel's.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri")


@dataclass(eq=False)
class Worker:
    """A process, and what it is doing as far as it has told.

    Attributes:
        number: Its place among the workers, from 0; whoever replaces it has the same.
        piece: What it was given to answer and has not done yet.
        begun: When each sample under way was begun, in seconds of a monotonic clock.
        warming: The sample under way is only to warm up.
        answering: It has begun a sample of its piece.
        fault: Why it was stopped; None while it was not.
    """

    number: int
    process: Any
    connection: Any
    piece: Piece | None = None
    begun: dict[int, float] = field(default_factory=dict)
    warming: bool = False
    answering: bool = False
    fault: Fault | None = None

    def send(self, word: str, value: Any = None) -> None:
        """Ask for something; one that is gone will not hear it, which `gone` tells."""
        with suppress(OSError):
            self.connection.send((word, value))

    def stop(self, fault: Fault | None = None) -> None:
        """Kill it; the first reason is the one that counts."""
        self.fault = self.fault or fault
        self.process.kill()

    def take(self, indices: list[int], warming: bool) -> None:
        """Note which samples it has begun."""
        if self.warming:
            self.begun.clear()
        self.warming, self.answering = warming, self.answering or not warming
        self.begun.update(dict.fromkeys(indices, time.monotonic()))

    def postpone(self, seconds: float) -> None:
        """Take time in which nothing ran off what the samples under way have taken."""
        self.begun = {index: since + seconds for index, since in self.begun.items()}

    def check(self, memory: float | None, timeout: float | None = None) -> None:
        """Stop it if it needs more than so much memory in GiB, or longer for a sample than so many seconds."""
        if timeout is not None and (overdue := self._overdue(timeout * (_WARM_UP if self.warming else 1))):
            self.stop(Fault(f"took longer than {timeout:g} s (--sample-timeout); its worker was stopped", overdue))
        if memory is not None and self._resident_gib() > memory:
            reason = f"needed more than {memory:g} GiB (--worker-memory); its worker was stopped"
            self.stop(Fault(reason, frozenset(self.begun)))

    def _overdue(self, limit: float) -> frozenset[int]:
        latest = time.monotonic() - limit
        return frozenset(index for index, since in self.begun.items() if since < latest)

    def _resident_gib(self) -> float:
        try:
            return float(psutil.Process(self.process.pid).memory_info().rss) / 2**30
        except psutil.Error:  # It is gone.
            return 0.0

    def end(self) -> Fault:
        """Return why it ended."""
        code = self.process.exitcode
        if self.fault is not None:
            return self.fault
        if code == -signal.SIGKILL:
            return Fault(_KILLED)
        if code is not None and code < 0:
            return Fault(f"ended by {signal.Signals(-code).name}")
        return Fault(f"ended with exit code {code}")


def _context(device: str) -> Any:
    """Return how processes are started: for a CPU from one that has imported what takes long, else anew.

    A driver that was asked anything, as a package may do while it is imported, is of no use to a fork.
    """
    others = device != "cpu" and any(Path(path).exists() for path in _DRIVERS)
    if sys.platform != "linux" or others:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flashmem_bench.executors.preload"])
    return context


@dataclass(frozen=True)
class Event:
    """Something that a worker has told; see `local_worker`, and `gone`."""

    worker: Worker
    word: str
    value: Any = None


class Workers:
    """The worker processes, each started when it is first wanted and again after it has ended.

    Args:
        count: How many there may be.
        device: The request's.
    """

    def __init__(self, count: int, device: str = "auto"):
        self.count = count
        self._context = _context(device)
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._alive: dict[int, Worker] = {}
        self._readers: dict[int, Thread] = {}
        self._strikes = 0

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._alive.values()))

    def get(self, number: int) -> Worker:
        """Return a worker, started if it must be."""
        if number not in self._alive:
            self._start(number)
        return self._alive[number]

    def event(self, wait: float) -> Event | None:
        """Return what was told next; None where nothing is, for so many seconds."""
        try:
            event = self._events.get(timeout=wait) if wait else self._events.get_nowait()
        except Empty:
            return None
        if event.word == "gone":
            self._forget(event.worker)
        return event

    def stop(self, workers: Iterable[Worker]) -> None:
        """End some workers and wait until they are gone; what anybody tells meanwhile is not heard."""
        stopped = list(workers)
        for worker in stopped:
            worker.stop()
        while any(self._alive.get(worker.number) is worker for worker in stopped):
            self.event(wait=1.0)

    def lives(self) -> None:
        """Note that a worker has got as far as answering."""
        self._strikes = 0

    def strike(self, fault: Fault) -> None:
        """Note that a worker has ended before it began a sample.

        Raises:
            BenchError: Several did so in a row: another one would as well.
        """
        self._strikes += 1
        if self._strikes >= _STRIKES:
            reason = fault.reason if fault.overdue is not None else f"it was {fault.reason}"
            raise BenchError(
                f"{self._strikes} workers in a row ended before they had begun a sample, the last because {reason}; "
                "look for its own message above, or run without --workers and limits"
            )

    def close(self) -> None:
        """End all workers and wait until they are gone; what they tell now is not heard."""
        for worker in self:
            worker.stop()
        for worker in self:
            self._readers[worker.number].join()
            self._forget(worker)

    def _forget(self, worker: Worker) -> None:
        worker.connection.close()
        if self._alive.get(worker.number) is worker:
            del self._alive[worker.number]

    def _start(self, number: int) -> None:
        ours, theirs = self._context.Pipe()
        level = logging.getLogger("flashmem_bench").level
        place = Place(number, self.count, level, os.getcwd(), dict(os.environ))
        process = self._context.Process(target=main, args=(theirs, place), name=f"worker {number}")
        # A Ctrl-C that comes before the worker can handle it would end it with a traceback.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        theirs.close()
        worker = self._alive[number] = Worker(number, process, ours)
        reader = self._readers[number] = Thread(target=self._read, args=(worker,), name=f"worker {number}", daemon=True)
        reader.start()

    def _read(self, worker: Worker) -> None:
        try:
            while True:
                self._events.put(Event(worker, *worker.connection.recv()))
        except Exception as error:  # The end of the pipe, perhaps in the middle of a message.
            if not isinstance(error, EOFError | OSError):
                logging.getLogger(__name__).debug("worker %d sent what cannot be read", worker.number, exc_info=True)
        worker.process.kill()
        worker.process.join()
        self._events.put(Event(worker, "gone"))
