"""A process of its own in which a grading function runs, with a hard deadline for every call.

Some graders cannot be stopped from inside: simplifying an expression may take hours within one call of a C function,
and a signal handler of Python waits until it returns. So the function runs in a second process, which is killed when
the deadline passes and started anew for the next call. The process is kept between calls, since starting it and
importing a computer algebra system takes a second. Arguments and results cross as one line of JSON each.

Invariants: a call returns or raises within its deadline, starting not counted; a call after a time-out works; threads
may share a worker and take turns; whatever the function prints goes nowhere; no process outlives the one that started
it, since each ends with the end of its input and, if it hangs then, by an alarm clock that no Python code can hold up.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from importlib import import_module
from typing import Any

from flashmem_bench.grading.outcome import GradeTimeout

# Importing a large library on a busy machine; no grade waits for it twice.
_START_S = 120.0
# How much longer than its deadline an abandoned process may live.
_ALARM_MARGIN_S = 5
# An expression such as 10^(10^10) asks for more than this, which would take the whole machine along.
_MEMORY_BYTES = 4 * 2**30


class WorkerError(Exception):
    """The grading function raised, or its process died; the message says which."""


class Worker:
    """Runs one function in a process of its own, started at the first call.

    Args:
        function: Where the function is, as `package.module:name`. It takes and returns what JSON can hold.
        deadline_s: Seconds that a call may take.
    """

    def __init__(self, function: str, deadline_s: float):
        self.function, self.deadline_s = function, deadline_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._rest = b""

    def call(self, *arguments: Any) -> Any:
        """Return what the function returns for these arguments.

        Raises:
            GradeTimeout: It did not return within the deadline; its process is gone.
            ImportError: The function, or a package that it needs, cannot be imported.
            WorkerError: The function raised, or its process died.
        """
        with self._lock:
            process = self._running()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps([self.deadline_s, *arguments]).encode() + b"\n")
                process.stdin.flush()
                answer = self._read(time.monotonic() + self.deadline_s)
            except BrokenPipeError:
                answer = None
            except BaseException:
                self._stop()
                raise
            if answer is None:
                self._stop()
                raise WorkerError(f"the process of {self.function} died")
        if "value" in answer:
            return answer["value"]
        raise WorkerError(f"{self.function} failed: {answer['error']}")

    def close(self) -> None:
        """End the process, if there is one; a later call starts another."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        # A forked child must not write into the pipes of its parent.
        if self._process is not None and (self._owner != os.getpid() or self._process.poll() is not None):
            self._stop()
        if self._process is None:
            self._start()
        assert self._process is not None
        return self._process

    def _start(self) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # One thread each: libraries of linear algebra otherwise reserve more memory than the limit on many processors.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # In a session of its own, so that Ctrl-C in the terminal leaves the sample in progress to finish.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self.function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **threads, "PYTHONPATH": paths},
            start_new_session=True,
        )
        self._owner, self._rest = os.getpid(), b""
        atexit.register(self.close)
        try:
            ready = self._read(time.monotonic() + _START_S)
        except GradeTimeout:
            ready = None
        if ready is None or "error" in ready:
            self._stop()
            reason = ready["error"] if ready else "its process did not start"
            raise ImportError(f"{self.function}: {reason}")

    def _read(self, until: float) -> dict[str, Any] | None:
        """Return the next answer, None at the end of the output; raises GradeTimeout after the moment `until`."""
        assert self._process is not None and self._process.stdout is not None
        source = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, until - time.monotonic())):
                    self._stop()
                    sentence = f"{self.function} took longer than {self.deadline_s:g} s"
                    # It is the grader that was slow, and the answer may well be right.
                    raise GradeTimeout(sentence, counts_as_wrong=False)
                piece = os.read(source, 65536)
                if not piece:
                    return None
                self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return dict(json.loads(line))

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if self._owner == os.getpid():
            process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                # What is left to write to a dead process is lost anyway.
                with contextlib.suppress(OSError):
                    pipe.close()
        if self._owner == os.getpid():
            process.wait()
            atexit.unregister(self.close)


def serve(function: str) -> None:
    """Answer calls on standard input until it ends; the body of the second process."""
    import signal

    answers = os.fdopen(os.dup(1), "wb")
    # What libraries print must not be taken for an answer.
    os.dup2(2, 1)
    _limit_memory()

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content).encode() + b"\n")
        answers.flush()

    module, _, name = function.partition(":")
    try:
        grade = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": True})
    for line in sys.stdin.buffer:
        deadline_s, *arguments = json.loads(line)
        # The default action of the alarm ends the process even inside a C function.
        signal.alarm(int(deadline_s) + _ALARM_MARGIN_S)
        try:
            answer({"value": grade(*arguments)})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
        signal.alarm(0)


def _limit_memory() -> None:
    import resource

    # Some systems refuse this limit; the deadline holds all the same.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


if __name__ == "__main__":
    serve(sys.argv[1])
