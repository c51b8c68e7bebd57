"""The worker's side of a process of this machine: asked through a pipe, it answers through the same pipe.

What it is sent and what it sends are pairs of a word and a value:

    to the worker                                  from the worker
    plan    (request, suite, method, reference)    answer   what was asked for
    about   None                                   note     a sentence for the user
    task    (request, Task)                        began    (indices of samples, whether only to warm up)
    stop    None                                   row      Finished
                                                   done     what the cell's summary should say
                                                   error    Trouble

One thread listens all the time, so that the end of the pipe is the end of the process: no worker outlives the one who
asks. Ctrl-C in a terminal reaches every process there; a worker leaves it to the one who asks. Nothing heavy is
imported before a backbone is needed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from flashmem.errors import FlashMemError
from flashmem_bench.errors import UsageError, sentence
from flashmem_bench.executors.servant import Servant
from flashmem_bench.interrupts import Stop
from flashmem_bench.session import Request, Session

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Which of how many workers of this machine one is.

    Attributes:
        number: From 0.
        count: How many there are.
        log_level: Of this project's loggers.
        folder: Where the one who asks is, for relative paths.
        environment: The variables that it has now.
    """

    number: int
    count: int
    log_level: int = logging.WARNING
    folder: str = "."
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Trouble:
    """An error as it goes through the pipe: its types need not be loadable, or can be of any kind, on the other side.

    Attributes:
        message: A sentence.
        exit_code: Of the command.
    """

    message: str
    exit_code: int = 1


def main(connection: Connection, place: Place) -> None:
    """Answer what is asked until the pipe ends."""
    _leave_signals_to_the_parent()
    _end_with_the_parent()
    os.chdir(place.folder)
    os.environ.update(place.environment or {})
    # What anybody prints here must not get between the lines of the command's own output.
    with suppress(OSError, ValueError):
        os.dup2(sys.stderr.fileno(), 1)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")
    for name in ("flashmem", "flashmem_bench"):
        logging.getLogger(name).setLevel(place.log_level)
    stop, asked = Stop(), SimpleQueue[tuple[str, Any]]()
    threading.Thread(target=_listen, args=(connection, stop, asked), daemon=True, name="listener").start()
    _Worker(connection, place, stop).serve(asked)


def _leave_signals_to_the_parent() -> None:
    """Handle them by doing nothing; were they ignored, programs that are started from here would ignore them too."""
    for signum in _SIGNALS:
        signal.signal(signum, lambda number, frame: None)
    # Whoever started this process has held them back until now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _end_with_the_parent() -> None:
    """Have the kernel kill this process with its parent, should the listener be held up by a library at that time."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _listen(connection: Connection, stop: Stop, asked: SimpleQueue[tuple[str, Any]]) -> None:
    try:
        while True:
            word, value = connection.recv()
            if word == "stop":
                stop.asked = True
            else:
                asked.put((word, value))
    except (EOFError, OSError):
        # The main thread may be in the middle of a sample that nobody wants any more.
        os._exit(0)


class _Worker:
    """Holds the servant, which is made when first needed: only then is it known which device it gets."""

    def __init__(self, connection: Connection, place: Place, stop: Stop):
        self.connection, self.place, self.stop = connection, place, stop
        self._servant: Servant | None = None

    def serve(self, asked: SimpleQueue[tuple[str, Any]]) -> None:
        """Answer one request after another."""
        while True:
            word, value = asked.get()
            try:
                getattr(self, f"_{word}")(value)
            except FlashMemError as error:
                self._send("error", Trouble(str(error), error.exit_code))
            except Exception as error:
                _log.debug("worker %d failed", self.place.number, exc_info=True)
                self._send("error", Trouble(f"a worker failed: {sentence(error)}"))

    def _plan(self, value: tuple[Request, str, str, Any]) -> None:
        request, *cell = value
        self._send("answer", self._at(request).plan(*cell, self._note))

    def _about(self, value: None) -> None:
        assert self._servant is not None
        self._send("answer", self._servant.environment())

    def _task(self, value: tuple[Request, Any]) -> None:
        request, task = value
        servant = self._at(request)
        with closing(servant.answers(task, self.stop, self._note, self._began)) as finished:
            for sample in finished:
                self._send("row", sample)
        self._send("done", servant.summary())

    def _at(self, request: Request) -> Servant:
        """Return the servant, asked as the one who asks was asked, but for the device."""
        if self._servant is None:
            request = replace(request, device=take_device(request, self.place))
            self._servant = Servant(Session(request))
        session = self._servant.session
        session.request = replace(request, device=session.request.device)
        return self._servant

    def _note(self, text: str) -> None:
        self._send("note", text)

    def _began(self, indices: Sequence[int], warming: bool) -> None:
        self._send("began", (list(indices), warming))

    def _send(self, word: str, value: Any) -> None:
        try:
            self.connection.send((word, value))
        except OSError:  # Nobody listens any more.
            os._exit(0)


def take_device(request: Request, place: Place) -> str:
    """Return the device of one worker, and give it its share of the processors.

    Raises:
        UsageError: There are fewer devices than workers.
    """
    if place.count == 1:
        return request.device
    import torch

    from flashmem_bench.models import pick_device

    device = pick_device(request.device)
    if device == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, _processors() // place.count))
        return device
    if ":" in device:
        raise UsageError(f"--device {device} is one device and --workers {place.count} need one each; name no number")
    if request.placement == "auto":
        raise UsageError("a model that is spread over all devices needs --workers 1")
    there = torch.cuda.device_count() if device == "cuda" else torch.accelerator.device_count()
    if place.count > there:
        raise UsageError(
            f"--workers {place.count} need one {device} device each and this machine has {there}; "
            f"use --workers {there} or --device cpu"
        )
    if device == "cuda":
        torch.cuda.set_device(place.number)
    return f"{device}:{place.number}"


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
