"""Inside the sandbox: runs a program and its tests in one interpreter and says whether the tests came to their end.

That the tests passed is told by a token that lies in a pipe and is read only once they have all run: leaving early
(`sys.exit`, `os._exit`), printing that all is well or replacing builtins does not bring it up. The program shares this
interpreter with its tests, though, so one that was written against this very file could read the token; what is in
it is trusted to be wrong, greedy or destructive, not to know its examiner.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from typing import Any

_DETAIL_CHARACTERS = 300


def main(arguments: str) -> None:
    """Run what lies in the current folder.

    Args:
        arguments: JSON with `kind` (script or pytest), `path` (folders of installed packages) and the numbers of
            the pipes `verdict` and `token`.
    """
    given = json.loads(arguments)
    sys.path[:0] = [os.getcwd()]
    sys.path += given["path"]
    sys.argv = ["program"]
    # Taken now: the program may put its own in the place of any of these.
    read, write, leave, dumps, flush = os.read, os.write, os._exit, json.dumps, sys.stdout.flush
    run = _prepare_pytest() if given["kind"] == "pytest" else _prepare_script()
    status, detail = run()
    with contextlib.suppress(BaseException):
        flush()
    message = {"status": status, "detail": detail}
    if status == "passed":
        message["token"] = read(given["token"], 64).decode()
    write(given["verdict"], (dumps(message) + "\n").encode())
    leave(0 if status == "passed" else 1)


def _prepare_script() -> Any:
    """Return a function that runs program.py, then tests.py in the same namespace."""
    with open("program.py", encoding="utf-8") as program, open("tests.py", encoding="utf-8") as tests:
        source, examination = program.read(), compile(tests.read(), "tests.py", "exec")
    execute, build = exec, compile

    def run() -> tuple[str, str]:
        module = types.ModuleType("program")
        sys.modules["program"] = module
        try:
            execute(build(source, "program.py", "exec"), module.__dict__)
            execute(examination, module.__dict__)
        except BaseException as error:
            return _fault(error)
        return "passed", ""

    return run


def _fault(error: BaseException) -> tuple[str, str]:
    if isinstance(error, MemoryError):
        return "memory", "MemoryError"
    if isinstance(error, SystemExit):
        return "failed", "the program left before its tests had run"
    try:
        text = next(iter(str(error).splitlines()), "")
    except BaseException:
        text = ""
    return "failed", f"{type(error).__name__}: {text}"[:_DETAIL_CHARACTERS]


class _Watcher:
    """A pytest plugin that counts; the exit status alone can be had by leaving early."""

    def __init__(self) -> None:
        self.collected, self.passed, self.fault = 0, 0, ("failed", "no test failed and yet not all passed")

    def pytest_collection_finish(self, session: Any) -> None:
        self.collected = len(session.items)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        self.fault = _fault(call.excinfo.value)


def _prepare_pytest() -> Any:
    """Return a function that runs test_solution.py, which imports solution.py, under pytest."""
    import pytest

    start = pytest.main
    quiet = ["-q", "-s", "-x", "--tb=no", "--no-header", "--assert=plain", "-p", "no:cacheprovider"]
    alone = ["-c", os.devnull, "--rootdir", ".", "--confcutdir", "."]

    def run() -> tuple[str, str]:
        watcher = _Watcher()
        try:
            code = start([*quiet, *alone, "test_solution.py"], plugins=[watcher])
        except BaseException as error:
            return _fault(error)
        if code == 0 and watcher.passed == watcher.collected > 0:
            return "passed", ""
        return watcher.fault

    return run


if __name__ == "__main__":
    main(sys.argv[1])
