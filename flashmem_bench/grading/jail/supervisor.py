"""The process that runs one program in the sandbox: sets up, watches, gives the verdict, leaves nothing behind.

    supervisor             adopts every orphan below it, watches pipes, time, memory and output
      keeper               first process of the new PID namespace, where there is one; waits for the program
        program            unprivileged, limited, in a session of its own; `program.py` around the untrusted code

It reads one job as a line of JSON from standard input and writes one report as a line of JSON to standard output. When
standard input ends, whoever asked is gone: everything is killed and nobody gets a report.

Started as a program of its own; see the package's docstring.
"""

from __future__ import annotations

import json
import os
import random
import resource
import secrets
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from . import kernel
from .folders import clear

_TICK_S = 0.05
# Between the limit's warning, which ends a program, and the kernel's kill.
_CPU_GRACE_S = 2
_CLEAN_UP_S = 20.0
_PAGE_BYTES = resource.getpagesize()
_TAIL_BYTES = 2000
_PIECE_BYTES, _PIPE_PIECES = 1 << 16, 2
_NAMESPACES = kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC


def main() -> None:
    """Do the job on standard input."""
    job = _read_job()
    started = time.monotonic()
    try:
        kernel.adopt_orphans()
        report = _supervise(job)
    except Exception as error:
        report = {"status": "error", "detail": f"{type(error).__name__}: {error}"}
    left = _kill_descendants()
    if left:
        report = {"status": "error", "detail": f"{left} processes could not be ended"}
    try:
        clear(job["layer"], job["folder"], job["uid"])
    except OSError as error:
        report = {"status": "error", "detail": f"the program's folder could not be removed: {error}"}
    report["seconds"] = time.monotonic() - started
    os.write(1, (json.dumps(report) + "\n").encode())


def _read_job() -> dict[str, Any]:
    """Read one line; Python's own reader would wait for the end of the stream, which comes later."""
    text = b""
    while not text.endswith(b"\n"):
        piece = os.read(0, _PIECE_BYTES)
        if not piece:
            sys.exit("no job")
        text += piece
    return json.loads(text)


class _Pipes:
    """The pipes between the supervisor and those below it; `far` ends are theirs."""

    def __init__(self, token: str):
        self.verdict, self.far_verdict = os.pipe()
        self.output, self.far_output = os.pipe()
        # What the keeper says: how the program ended, or why it could not begin.
        self.status, self.far_status = os.pipe()
        self.far_token, end = os.pipe()
        os.write(end, token.encode())
        os.close(end)

    def keep_near(self) -> None:
        for fd in (self.far_verdict, self.far_output, self.far_status, self.far_token):
            os.close(fd)


def _supervise(job: dict[str, Any]) -> dict[str, Any]:
    token = secrets.token_hex(16)
    pipes = _Pipes(token)
    if os.fork() == 0:
        _keep(job, pipes)
    pipes.keep_near()
    watch = _Watch(job["limits"], pipes)
    return watch.run() or _judged(watch, token)


class _Watch:
    """Reads what comes until the program has ended or broken a limit."""

    def __init__(self, limits: dict[str, Any], pipes: _Pipes):
        self.limits, self.pipes = limits, pipes
        self.texts = {pipes.verdict: b"", pipes.output: b"", pipes.status: b""}
        self.written = 0

    def run(self) -> dict[str, Any] | None:
        """Return a report where a limit was broken; None where the program ended by itself."""
        deadline = time.monotonic() + self.limits["wall_s"]
        open_ends = set(self.texts)
        while self.pipes.status in open_ends:
            left = deadline - time.monotonic()
            if left <= 0:
                return {"status": "timeout", "detail": f"no end after {self.limits['wall_s']:g} s"}
            ready, _, _ = select.select([0, *open_ends], [], [], min(left, _TICK_S))
            if 0 in ready and not os.read(0, 1):
                return {"status": "error", "detail": "nobody waits for the verdict any more"}
            open_ends -= {end for end in open_ends & set(ready) if not self._read(end)}
            broken = self._broken()
            if broken:
                return broken
        for end in (self.pipes.verdict, self.pipes.output):
            # What lies in the pipe, not what a process that is left may go on to write.
            for _ in range(_PIPE_PIECES):
                if not select.select([end], [], [], 0)[0] or not self._read(end):
                    break
        return None

    def _read(self, end: int) -> bool:
        """Read a piece, kept as far as it matters; False at the end of the pipe."""
        piece = os.read(end, _PIECE_BYTES)
        if end == self.pipes.output:
            self.written += len(piece)
        # A tail is enough of the output, and a head of what the wrapper says.
        whole = self.texts[end] + piece
        self.texts[end] = whole[-_TAIL_BYTES:] if end == self.pipes.output else whole[:_PIECE_BYTES]
        return bool(piece)

    def _broken(self) -> dict[str, Any] | None:
        if self.written > self.limits["output_bytes"]:
            return {"status": "output", "detail": f"more than {self.limits['output_bytes']} bytes of output"}
        pids = _descendants()
        # Resident sizes are cheap to read but count shared pages many times; only a large sum is worth a close look.
        most = self.limits["memory_bytes"]
        if sum(map(_resident_bytes, pids)) > most and sum(map(_proportional_bytes, pids)) > most:
            return {"status": "memory", "detail": f"more than {self.limits['memory_bytes']} bytes of memory"}
        # The keeper is one of them. Root is exempt from the kernel's limit, hence this one.
        if len(pids) > 2 * self.limits["processes"]:
            return {"status": "failed", "detail": f"more than {self.limits['processes']} processes"}
        return None


def _judged(watch: _Watch, token: str) -> dict[str, Any]:
    """Return the report on a program that ended by itself."""
    try:
        # Where the program could not begin, that comes first and how the attempt ended second.
        ended = json.loads(watch.texts[watch.pipes.status].splitlines()[0])
    except (ValueError, IndexError):
        return {"status": "failed", "detail": "the program killed the process that watched it"}
    if "error" in ended:
        return {"status": "error", "detail": ended["error"]}
    tail = watch.texts[watch.pipes.output].decode("utf-8", "replace")
    said = _last_message(watch.texts[watch.pipes.verdict])
    if ended["code"] == 0 and said.get("status") == "passed" and said.get("token") == token:
        return {"status": "passed", "detail": "", "output": tail}
    if ended["code"] == -signal.SIGXCPU:
        return {"status": "timeout", "detail": f"more than {watch.limits['cpu_s']} s of processor time"}
    if said.get("status") in ("failed", "memory"):
        return {"status": said["status"], "detail": str(said.get("detail", "")), "output": tail}
    how = f"signal {-ended['code']}" if ended["code"] < 0 else f"exit status {ended['code']}"
    status = "memory" if "MemoryError" in tail else "failed"
    return {"status": status, "detail": f"it ended with {how} before its tests had run", "output": tail}


def _last_message(text: bytes) -> dict[str, Any]:
    try:
        message = json.loads(text.splitlines()[-1])
    except (ValueError, IndexError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _descendants() -> list[int]:
    """Return the processes below this one that are not zombies."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            state, parent = _state_and_parent(entry)
            if state not in ("", "Z", "X"):
                children.setdefault(parent, []).append(int(entry))
    found, queue = [], [os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _state_and_parent(pid: str) -> tuple[str, int]:
    try:
        text = Path("/proc", pid, "stat").read_text(errors="replace")
    except OSError:
        return "", 0
    # The name in parentheses may hold anything, even a parenthesis.
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path("/proc", str(pid), "statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def _proportional_bytes(pid: int) -> int:
    """Return the memory of a process, each shared page divided by those that share it."""
    try:
        lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def _kill_descendants() -> int:
    """End every descendant; returns how many would not.

    All are stopped before any is killed, else a program that keeps forking could outrun the killing. The death of the
    first process of a PID namespace takes all others in it along.
    """
    until = time.monotonic() + _CLEAN_UP_S
    while time.monotonic() < until:
        seen: set[int] = set()
        while (pids := set(_descendants()) - seen) and time.monotonic() < until:
            for pid in pids:
                _signal(pid, signal.SIGSTOP)
            seen |= pids
        for pid in seen:
            _signal(pid, signal.SIGKILL)
        _reap()
        if not _descendants():
            return 0
        time.sleep(0.001)
    return len(_descendants())


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _keep(job: dict[str, Any], pipes: _Pipes) -> NoReturn:
    """Be the keeper: set up the layer, start the program, say how it ended."""
    try:
        kernel.die_with_parent()
        os.setsid()
        # Looked up before the user changes: an open folder stays usable although its parents may be closed to him.
        folders = [os.open(path, os.O_PATH) for path in (job["prefix"], *job["packages"])]
        if job["layer"] == "user-namespaces":
            _drop_user(job["uid"])
            kernel.set_dumpable(True)
        if job["layer"] in ("namespaces", "user-namespaces"):
            _enter_namespaces(job)
        child = os.fork()
        if child == 0:
            _become_program(job, pipes, folders)
        _say(pipes, {"code": _wait_for(child)})
    except BaseException as error:
        _say(pipes, {"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


def _say(pipes: _Pipes, message: dict[str, Any]) -> None:
    os.write(pipes.far_status, (json.dumps(message) + "\n").encode())


def _wait_for(child: int) -> int:
    """Reap whatever ends until the program does; returns its exit status, negative for a signal."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def _drop_user(uid: int | None) -> None:
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def _enter_namespaces(job: dict[str, Any]) -> None:
    """Go on as the first process of new PID, network, mount and IPC namespaces."""
    if job["layer"] == "user-namespaces":
        uid, gid = os.getuid(), os.getgid()
        kernel.unshare(_NAMESPACES | kernel.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    else:
        kernel.unshare(_NAMESPACES)
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        os._exit(0)
    kernel.die_with_parent()
    kernel.set_dumpable(False)
    _close_files(job)


def _close_files(job: dict[str, Any]) -> None:
    """Make every file system read-only, hide the home folder, give the program small ones of its own in memory."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    for folder in job["hidden"]:
        kernel.mount("tmpfs", folder, "tmpfs", flags, "size=4k,mode=0755")
    kernel.make_read_only("/")
    for folder in (job["folder"], "/dev/shm"):
        if os.path.isdir(folder):
            size = job["limits"]["folder_bytes"]
            kernel.mount("tmpfs", folder, "tmpfs", flags, f"size={size},nr_inodes=4096,mode=0777")
    try:
        kernel.mount("proc", "/proc", "proc", flags | kernel.MS_NOEXEC)
    except OSError:
        # Refused where a container hides parts of /proc. Processes outside are then seen, but out of reach.
        pass


def _become_program(job: dict[str, Any], pipes: _Pipes, folders: list[int]) -> NoReturn:
    """Give up what the program must not have, then start it."""
    try:
        os.setsid()
        if job["layer"] == "uid":
            os.chown(job["folder"], job["uid"], job["uid"])
        if job["layer"] != "user-namespaces":
            _drop_user(job["uid"])
        kernel.die_with_parent()
        kernel.forbid_new_privileges()
        kernel.forbid_sockets()
        os.chdir(job["folder"])
        for name, text in job["files"].items():
            Path(name).write_text(text, encoding="utf-8", errors="replace")
        _limit(job)
        _start(job, pipes, folders)
    except BaseException as error:
        _say(pipes, {"error": f"{type(error).__name__}: {error}"})
        os._exit(1)


def _limit(job: dict[str, Any]) -> None:
    limits = job["limits"]
    pairs = {
        resource.RLIMIT_CPU: (limits["cpu_s"], limits["cpu_s"] + _CPU_GRACE_S),
        resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (limits["folder_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (limits["open_files"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NPROC: (limits["processes"] + job["others"],) * 2,
    }
    for name, (soft, hard) in pairs.items():
        ceiling = resource.getrlimit(name)[1]
        fits = [value if ceiling == resource.RLIM_INFINITY else min(value, ceiling) for value in (soft, hard)]
        resource.setrlimit(name, (fits[0], fits[1]))


def _start(job: dict[str, Any], pipes: _Pipes, folders: list[int]) -> NoReturn:
    """Replace this process with an interpreter that runs `program.py`."""
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (pipes.far_output, 1), (pipes.far_output, 2)):
        os.dup2(source, target)
    # Numbers that the program does not know beforehand, above those in use.
    verdict, token = random.SystemRandom().sample(range(max(folders) + 10, job["limits"]["open_files"]), 2)
    os.dup2(pipes.far_verdict, verdict)
    os.dup2(pipes.far_token, token)
    prefix, *packages = (_way(path, fd) for path, fd in zip((job["prefix"], *job["packages"]), folders, strict=True))
    environment = {**job["environment"], "HOME": job["folder"], "TMPDIR": job["folder"]}
    interpreter = job["interpreter"]
    if prefix != job["prefix"]:
        interpreter = os.path.join(prefix, os.path.relpath(interpreter, job["prefix"]))
        environment |= {"PYTHONHOME": prefix, "LD_LIBRARY_PATH": f"{prefix}/lib"}
    arguments = {"kind": job["kind"], "path": packages, "verdict": verdict, "token": token}
    flags = ["-S", "-s", "-P", "-B", "-X", "utf8"]
    os.execve(interpreter, ["python", *flags, "-c", job["wrapper"], json.dumps(arguments)], environment)


def _way(path: str, fd: int) -> str:
    """Return a path by which this user reaches a folder, past parents that are closed to him."""
    if os.access(path, os.R_OK | os.X_OK):
        return path
    os.set_inheritable(fd, True)
    return f"/proc/self/fd/{fd}"
