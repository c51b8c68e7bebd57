"""Runs untrusted Python and says what became of it, without letting it do anything else.

A program runs in processes of its own, with a deadline, limits, an empty environment and a folder that is gone
afterwards. What keeps it in is the *layer*, the strongest that the machine offers; each is tried out with a small
program before it is believed:

    namespaces         (root) PID, network, mount and IPC namespaces and an unprivileged user
    user-namespaces    the same for who is not root, through a user namespace
    uid                (root) an unprivileged user alone: processes are found and killed one by one
    none               not contained: limits only, under the user's own name

In the first two, killing the first process kills all, every file system is read-only, the home folder is hidden and
there is no network. `uid` writes nothing that the user's files protect; folders open to everybody stay open, and how
many files it may make is not limited. In every layer a filter of system calls refuses sockets, and what is left of a
program is killed before its outcome is told.

Not prevented: a program shares its interpreter with its tests, so one that knows this sandbox could forge a pass; and
the kernel's own faults. For programs by an enemy take a virtual machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from flashmem_bench.errors import UsageError
from flashmem_bench.grading.jail.folders import clear

Status = Literal["passed", "failed", "timeout", "memory", "output", "error"]
Kind = Literal["script", "pytest"]
LayerName = Literal["namespaces", "user-namespaces", "uid", "none"]

# Users that nobody else is, so that limits on a user's processes are limits on one program.
_FIRST_UID, _UIDS = 0x70000000, 1 << 28
# Beyond the deadline of the program: setting up, and killing what it left.
_GRACE_S = 30.0
_MARK = "FLASHMEM_SANDBOX"
# At the end of the path: a module there may be called like one of the standard library.
_BOOT = "import sys; sys.path.append(sys.argv[1]); from jail.supervisor import main; main()"


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        wall_s: Deadline, from the start of the sandbox.
        cpu_s: Processor time of any one process.
        memory_bytes: Address space of a process, and resident memory of all together.
        folder_bytes: Largest file; in namespaces everything in its folder together.
        output_bytes: Standard output and error together.
        processes: Processes and threads at a time.
        open_files: Open files of a process.
    """

    wall_s: float = 20.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    folder_bytes: int = 64 << 20
    output_bytes: int = 1 << 20
    processes: int = 64
    open_files: int = 128


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        status: passed; failed; timeout, memory and output where a limit struck; error where the sandbox itself failed.
        detail: Why, in a few words; what a failing program says is at most a line of it.
        seconds: Wall time, clean-up included.
    """

    status: Status
    detail: str
    seconds: float


@dataclass(frozen=True)
class Layer:
    """What keeps a program in.

    Attributes:
        contained: Whether a program can neither reach the processes nor the files of the user.
        active: Protections that the trial program ran into.
        missing: Protections that it did not.
        passed_over: Stronger layers that this machine refuses, and why.
    """

    name: LayerName
    contained: bool
    active: tuple[str, ...]
    missing: tuple[str, ...]
    passed_over: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Return the layer in one line."""
        contained = "contained" if self.contained else "NOT contained"
        parts = [f"{self.name}, {contained}: {', '.join(self.active) or 'no protection'}"]
        parts += [f"missing: {', '.join(self.missing)}"] if self.missing else []
        parts += [f"not available: {'; '.join(self.passed_over)}"] if self.passed_over else []
        return "; ".join(parts)


def run_program(
    files: Mapping[str, str], kind: Kind = "script", limits: Limits | None = None, layer: LayerName | None = None
) -> Outcome:
    """Run a program with its tests.

    Args:
        files: `program.py` and `tests.py` for a script, whose tests run in the program's namespace; `solution.py` and
            `test_solution.py` for pytest.
        kind: How the tests run.
        limits: What it may use.
        layer: By default the strongest that the machine offers.

    Raises:
        UsageError: This is not Linux.
    """
    report = _run(files, kind, limits or Limits(), layer or active_layer().name)
    return Outcome(report["status"], report["detail"][:300], float(report["seconds"]))


@lru_cache(maxsize=1)
def active_layer() -> Layer:
    """Return the strongest layer that holds on this machine; tried out once a process.

    Raises:
        UsageError: This is not Linux.
    """
    _require_linux()
    refused: list[str] = []
    for name in available_names():
        layer = try_layer(name)
        if isinstance(layer, Layer):
            return dataclasses.replace(layer, passed_over=tuple(refused))
        refused.append(f"{name} ({layer})")
    raise UsageError(f"programs cannot be run here even without protection: {'; '.join(refused)}")


def _require_linux() -> None:
    if not sys.platform.startswith("linux"):
        raise UsageError("programs are run on Linux only; grade code suites on a Linux machine")


def available_names() -> tuple[LayerName, ...]:
    """Return the layers that this user could have, strongest first."""
    names: tuple[LayerName, ...] = get_args(LayerName)
    return names if os.geteuid() == 0 else tuple(name for name in names if name in ("user-namespaces", "none"))


@lru_cache(maxsize=4)
def try_layer(name: LayerName) -> Layer | str:
    """Return the layer as a trial program finds it, or why it cannot be had."""
    report = _run(_trial_files(), "script", Limits(), name)
    if report["status"] != "passed":
        return str(report["detail"])
    found = json.loads(report["output"].splitlines()[-1])
    apart = found["pid"] < 10
    checks = {
        "not root": found["uid"] != 0,
        "processes out of reach": apart or found["uid"] != os.geteuid(),
        "PID namespace": apart,
        "no network": not found["socket"],
        "process limit": found["forks"] < _trial_forks(),
        "files out of reach": not found["wrote"],
        "open folders read-only": not found["wrote_open"],
        "home folder hidden": not found["home"],
    }
    return Layer(
        name,
        contained=all(checks[check] for check in ("not root", "processes out of reach", "files out of reach")),
        active=tuple(check for check, held in checks.items() if held),
        missing=tuple(check for check, held in checks.items() if not held),
    )


def _trial_files() -> dict[str, str]:
    """A program that tries what it should not be able to do, and says how far it came."""
    values = {
        "private": [str(Path.home()), str(Path(__file__).parent), "/etc", "/"],
        "open": ["/var/tmp"],
        "home": str(Path.home()),
        "count": _trial_forks(),
    }
    return {"program.py": f"{values=}\n{_TRIAL}", "tests.py": ""}


def _trial_forks() -> int:
    """A few more than are allowed, and fewer than the supervisor ends a program for."""
    return Limits().processes + 8


_TRIAL = """
import json, os, signal, socket, time
def works(action):
    try:
        return action() is not False
    except OSError:
        return False
def write(folder):
    path = os.path.join(folder, ".flashmem-trial-" + str(os.getpid()))
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.unlink(path)
children = []
try:
    while len(children) < values["count"]:
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(60)
except OSError:
    pass
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print(json.dumps({
    "uid": os.getuid(), "pid": os.getpid(), "forks": len(children), "socket": works(socket.socket),
    "wrote": [folder for folder in values["private"] if works(lambda: write(folder))],
    "wrote_open": [folder for folder in values["open"] if works(lambda: write(folder))],
    "home": works(lambda: bool(os.listdir(values["home"]))),
}))
"""


def _run(files: Mapping[str, str], kind: Kind, limits: Limits, layer: LayerName) -> dict[str, Any]:
    """Run a program and return the supervisor's report."""
    _require_linux()
    mark = f"{os.getpid()}-{secrets.token_hex(8)}"
    # In namespaces the program gets a file system of its own there.
    folder = "/tmp" if "namespaces" in layer else tempfile.mkdtemp(prefix="flashmem-sandbox-")
    job, started, report = _job(files, kind, limits, layer, folder, mark), time.monotonic(), None
    try:
        report = _supervised(job, limits.wall_s + _GRACE_S)
    finally:
        # Where the supervisor could be killed by the program, or was by somebody, it has cleaned up nothing.
        if layer == "none" or report is None or report["status"] == "error":
            _kill_marked(mark)
        clear(job["layer"], job["folder"], job["uid"])
    return {"seconds": time.monotonic() - started, **report}


def _job(
    files: Mapping[str, str], kind: Kind, limits: Limits, layer: LayerName, folder: str, mark: str
) -> dict[str, Any]:
    """Return what the supervisor needs to know."""
    root = os.geteuid() == 0
    home = str(Path.home())
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    loader = {"LD_LIBRARY_PATH": os.environ["LD_LIBRARY_PATH"]} if "LD_LIBRARY_PATH" in os.environ else {}
    return {
        "files": dict(files),
        "kind": kind,
        "layer": layer,
        "limits": dataclasses.asdict(limits),
        "folder": folder,
        "uid": _free_uid() if root and layer != "none" else None,
        "others": 0 if root or _counts_apart(layer) else _own_tasks(),
        "hidden": [home] if os.path.isdir(home) and home != "/" else [],
        "interpreter": interpreter,
        "prefix": str(Path(interpreter).parent.parent),
        "packages": _packages(),
        "wrapper": (Path(__file__).parent / "jail" / "program.py").read_text(encoding="utf-8"),
        "environment": {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            # Sets in the same order every time.
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            _MARK: mark,
            **loader,
        },
    }


def _packages() -> list[str]:
    """Return the folders of installed packages from which this process imports, those of the user included."""
    names = ("site-packages", "dist-packages")
    return [path for path in dict.fromkeys(sys.path) if os.path.basename(path) in names and os.path.isdir(path)]


def _free_uid() -> int:
    """Return the number of a user that nobody is, from the upper end of what this user namespace has."""
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, _, count = max(ranges, key=lambda entry: entry[2])
    if first <= _FIRST_UID and _FIRST_UID + _UIDS < first + count:
        return _FIRST_UID + secrets.randbelow(_UIDS)
    return first + count - 1 - secrets.randbelow(max(1, count // 4))


def _counts_apart(layer: LayerName) -> bool:
    """Whether the kernel counts a user's processes per user namespace: since Linux 5.14."""
    version = tuple(int(part) for part in platform.release().split(".")[:2] if part.isdecimal())
    return layer == "user-namespaces" and version >= (5, 14)


def _own_tasks() -> int:
    """Return the number of processes and threads of this user, which his limit counts as well."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            count += len(os.listdir(folder / "task")) if folder.stat().st_uid == os.getuid() else 0
        except OSError:
            continue
    return count


def _supervised(job: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
    """Start a supervisor, give it the job and return its report."""
    environment = {name: job["environment"][name] for name in ("LD_LIBRARY_PATH",) if name in job["environment"]}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _BOOT, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write((json.dumps(job) + "\n").encode())
        process.stdin.flush()
        said = b"".join(_pieces(process.stdout, deadline_s))
    except BrokenPipeError:
        said = process.stdout.read()
    finally:
        # The end of its standard input tells it to clean up, should this process have been interrupted.
        process.stdin.close()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
    return _report(said, job["layer"])


def _pieces(stream: Any, deadline_s: float) -> Iterator[bytes]:
    """Yield what comes until the stream or the time ends."""
    until = time.monotonic() + deadline_s
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0:
            if selector.select(left):
                piece = os.read(stream.fileno(), 1 << 16)
                if not piece:
                    return
                yield piece


def _report(said: bytes, layer: LayerName) -> dict[str, Any]:
    lines = said.decode("utf-8", "replace").strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        pass
    if layer == "none":
        # There a program can reach the process that watches it.
        return {"status": "failed", "detail": "the program killed the process that watched it"}
    return {"status": "error", "detail": f"the sandbox gave no report: {lines[-1] if lines else 'it was killed'}"}


def _kill_marked(mark: str) -> None:
    """End the processes that carry a mark in their environment: all that is left to find them by."""
    wanted = f"{_MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), 9)
        except OSError:
            continue
