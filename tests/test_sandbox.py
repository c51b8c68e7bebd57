"""The code sandbox: hostile programs are graded failures within their deadline and leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from flashmem_bench.errors import UsageError
from flashmem_bench.grading import sandbox
from flashmem_bench.grading.sandbox import Layer, Limits, available_names, run_program, try_layer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")

TIGHT = Limits(cpu_s=5, memory_bytes=256 << 20, folder_bytes=4 << 20, output_bytes=100_000, processes=24)
# For programs that do not end by themselves; nothing that has to succeed runs under it.
SHORT = dataclasses.replace(TIGHT, wall_s=0.8)
GOOD = {"program.py": "def double(x):\n    return 2 * x\n", "tests.py": "assert double(4) == 8"}
CONTAINED = ["namespaces", "user-namespaces", "uid"]

# Name -> what the program does before or instead of `double`, and the statuses that may come of it.
HOSTILE = {
    "fork bomb": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        {"timeout"},
    ),
    "memory bomb": ("x = bytearray(1 << 40)", {"memory"}),
    "slow memory bomb": ("x = []\nwhile True:\n    x.append(bytearray(1 << 20))", {"memory"}),
    "shared-out memory bomb": (
        "import os, time\nfor _ in range(3):\n    os.fork()\nx = b'x' * (100 << 20)\ntime.sleep(60)",
        {"memory"},
    ),
    "endless loop": ("while True:\n    pass", {"timeout"}),
    "a gigabyte of output": ("while True:\n    print('x' * 65536)", {"output"}),
    "kill of the parent": ("import os\nos.kill(os.getppid(), 9)", {"failed"}),
    "kill of everybody": ("import os\nos.kill(-1, 9)\nraise SystemExit", {"failed"}),
    "a large file": ("with open('x', 'wb') as f:\n    while True:\n        f.write(b'x' * (1 << 20))", {"failed"}),
    "sleep": ("import time\ntime.sleep(600)", {"timeout"}),
    "socket": ("import socket\nsocket.create_connection(('127.0.0.1', PORT)).sendall(b'out')", {"failed"}),
    "a daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n"
        "    os._exit(0)\nos._exit(0)",
        {"failed"},
    ),
    "zombies": ("import os\nwhile True:\n    if os.fork() == 0:\n        os._exit(0)", {"failed", "timeout"}),
    "leaving at once": ("import os\nos._exit(0)", {"failed"}),
    "exit": ("import sys\nsys.exit(0)", {"failed"}),
    "a claim": ('print(\'passed\\n\' + \'{"status": "passed", "token": ""}\')\nimport os; os._exit(0)', {"failed"}),
    "a claim in every pipe": (
        'import os\nfor fd in range(3, 128):\n    try:\n        os.write(fd, b\'{"status": "passed"}\\n\')\n'
        "    except OSError:\n        pass\nos._exit(0)",
        {"failed"},
    ),
    "other builtins": (
        "import builtins, os, json\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
        "builtins.AssertionError = type('Fine', (SystemExit,), {})\nos.read = lambda *a: b''\n"
        'json.dumps = lambda *a: \'{"status": "passed"}\'\nos._exit = lambda code: None\ndef double(x): return 0',
        {"failed"},
    ),
    "no end": ("import atexit, time\natexit.register(time.sleep, 600)\nraise ValueError('no')", {"failed"}),
    "an error that is hard to read": (
        "class Odd(Exception):\n    def __str__(self):\n        raise SystemExit(0)\nraise Odd",
        {"failed"},
    ),
    "a deep tree": (
        "import os\nfor _ in range(1200):\n    os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0)\n1 / 0",
        {"failed"},
    ),
}
# Those after which another program might suffer.
DISTURBING = {"fork bomb", "memory bomb", "kill of everybody", "a daemon", "zombies", "other builtins"}


def marked(folder: Path, mark: bytes, uid: int | None = None) -> bool:
    """Whether the process of a folder of /proc has a mark in its environment, and this owner."""
    try:
        return mark in (folder / "environ").read_bytes() and uid in (None, folder.stat().st_uid)
    except OSError:
        return False


def own_processes() -> list[str]:
    """Return the processes, zombies aside, that carry the mark of a sandbox of this process."""
    mark = f"FLASHMEM_SANDBOX={os.getpid()}-".encode()
    return [folder.name for folder in Path("/proc").glob("[0-9]*") if marked(folder, mark)]


@pytest.fixture(params=CONTAINED)
def layer(request) -> str:
    """Every contained layer that this machine allows."""
    if request.param not in available_names():
        pytest.skip(f"{request.param} needs root")
    found = try_layer(request.param)
    if not isinstance(found, Layer):
        pytest.skip(f"this machine refuses {request.param}: {found}")
    assert found.contained
    return request.param


@pytest.fixture
def listener():
    """A port of this machine that nobody should reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def run(program: str, layer: str | None = None, limits: Limits = TIGHT, tests: str = GOOD["tests.py"]):
    return run_program({"program.py": program, "tests.py": tests}, "script", limits, layer)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_fails_and_leaves_nothing(name, layer, listener):
    code, statuses = HOSTILE[name]
    before = psutil.Process().children()
    outcome = run(
        code.replace("PORT", str(listener.getsockname()[1])), layer, SHORT if "timeout" in statuses else TIGHT
    )
    assert outcome.status in statuses, outcome
    assert own_processes() == [] and psutil.Process().children() == before
    with pytest.raises(BlockingIOError):
        listener.accept()
    if name in DISTURBING:
        assert run(GOOD["program.py"], layer).status == "passed"


def test_nothing_can_be_written_outside(layer, tmp_path):
    shared = Path("/var/tmp") / f"flashmem-test-{os.getpid()}"
    targets = [str(tmp_path / "file"), str(Path(sandbox.__file__).with_name("file")), "/etc/flashmem-test", "/file"]
    program = (
        "def written(path):\n    try:\n        open(path, 'w').write('x')\n        return True\n"
        "    except OSError:\n        return False\n"
    )
    assert run(program, layer, tests=f"assert not any(map(written, {targets}))").status == "passed"
    run(program, layer, tests=f"assert written({str(shared)!r})")
    # What lies in a folder open to everybody is gone with the program.
    assert not shared.exists()


def test_the_folder_of_a_program_is_its_own_and_gone_afterwards(layer, monkeypatch):
    made, make = [], tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **names: made.append(make(**names)) or made[-1])
    program = "import os\nfolder = os.getcwd()\nopen('x', 'w').write('x')\nos.makedirs('a/b')\nos.chmod('a', 0)\n"
    tests = "assert os.environ['HOME'] == os.environ['TMPDIR'] == folder and 'x' in os.listdir(folder)"
    assert run(program, layer, tests=tests).status == "passed"
    assert len(made) == (layer == "uid") and not any(Path(folder).exists() for folder in made)


def test_the_environment_is_empty_and_sets_have_one_order(layer, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    program = "import os, sys\nnames = set(os.environ)\n"
    tests = "assert 'SECRET_TOKEN' not in names and sys.stdin.read() == '' and sys.argv == ['program']"
    assert run(program, layer, tests=tests).status == "passed"
    shown = [run("", layer, tests="raise ValueError(hash('text'))").detail for _ in range(2)]
    assert shown[0] == shown[1]


def test_ordinary_programs_are_not_disturbed(layer):
    program = (
        "from __future__ import annotations\nimport dataclasses, multiprocessing, subprocess, tempfile, threading\n"
        "@dataclasses.dataclass\nclass Pair:\n    left: int\n    right: int\n"
        "def double(x):\n    thread = threading.Thread(target=print)\n    thread.start(); thread.join()\n"
        "    with multiprocessing.Pool(2) as pool:\n        assert pool.map(abs, [-1, 2]) == [1, 2]\n"
        "    with tempfile.TemporaryFile() as file:\n        file.write(b'x')\n"
        "    assert subprocess.run(['true']).returncode == 0\n    return x + Pair(x, x).right\n"
        "if __name__ == '__main__':\n    input()\n"
    )
    assert run(program, layer, Limits()).status == "passed"


NOT_PROGRAMS = ["x = '\x00'", "x = '\udcff'", GOOD["program.py"] + "'''", "-" * 100_000 + "1", "(" * 100_000]


@pytest.mark.parametrize("program", NOT_PROGRAMS, ids=range(len(NOT_PROGRAMS)))
def test_text_that_is_no_program_fails(program):
    assert run(program).status in ("failed", "memory")


def test_why_a_program_failed_is_told_in_a_line():
    assert run("def double(x): return x").detail == "AssertionError: "
    assert run("x = 1 / 0").detail == "ZeroDivisionError: division by zero"
    long = run("raise ValueError('x' * 10**6 + '\\n' + 'y')")
    assert long.detail.startswith("ValueError: xxx") and len(long.detail) <= 300
    assert "before its tests had run" in run("import os; os._exit(3)").detail


def under_pytest(solution: str, test: str = "def test_it():\n    assert double(4) == 8\n", layer=None):
    files = {"solution.py": solution, "test_solution.py": "from solution import *\n" + test}
    return run_program(files, "pytest", Limits(), layer)


def test_pytest_runs_inside(layer):
    assert under_pytest(GOOD["program.py"], layer=layer).status == "passed"
    wrong = under_pytest("def double(x): return 3", layer=layer)
    assert (wrong.status, wrong.detail.split(":")[0]) == ("failed", "AssertionError")


@pytest.mark.parametrize(
    "solution",
    [
        "import pytest\npytest.exit('fine', returncode=0)",
        "import pytest\npytest.skip('no', allow_module_level=True)",
        "import pytest\ndef double(x): pytest.skip('no')",
        "import pytest\ndef double(x): pytest.xfail('no')",
        "import os\nos._exit(0)",
        "def double(x): raise SystemExit(0)",
        "__all__ = []",
        "def double(x): raise MemoryError",
    ],
)
def test_a_way_round_the_tests_is_no_pass_under_pytest(solution):
    assert under_pytest(solution).status in ("failed", "memory")


def test_a_file_without_tests_is_no_pass_under_pytest():
    assert under_pytest(GOOD["program.py"], "x = 1").status == "failed"


# Who asks, and what may happen to them

ASKING = """
import sys
from flashmem_bench.grading.sandbox import Limits, run_program
files = {"program.py": "import os, time\\nos.fork()\\ntime.sleep(600)", "tests.py": ""}
run_program(files, "script", Limits(wall_s=300.0), sys.argv[1])
"""


def test_a_program_does_not_outlive_who_asked_for_it(layer):
    asking = psutil.Popen([sys.executable, "-c", ASKING, layer])
    mark, inside = f"FLASHMEM_SANDBOX={asking.pid}-".encode(), []
    try:
        # The program and its child.
        while len(inside) < 2:
            assert asking.poll() is None
            below = asking.children(recursive=True)
            inside = [process for process in below if marked(Path("/proc", str(process.pid)), mark)]
        folder = inside[0].environ()["HOME"]
    finally:
        asking.kill()
        asking.wait()
    _, alive = psutil.wait_procs(below, timeout=60)
    assert alive == []
    # In namespaces it is a folder in memory, which went with them.
    assert folder == "/tmp" or not Path(folder).exists()


def test_a_sandbox_that_cannot_start_is_an_error_and_no_grade(monkeypatch, layer):
    monkeypatch.setattr(sandbox, "_BOOT", "import sys; sys.exit('no supervisor today')")
    outcome = run(GOOD["program.py"], layer)
    assert outcome.status == "error" and "no supervisor today" in outcome.detail


def test_a_layer_says_what_it_lacks_and_which_were_passed_over(monkeypatch):
    found = Layer("uid", True, ("no network",), ("PID namespace",))
    answers = {"namespaces": "PermissionError", "user-namespaces": "no", "uid": found}
    monkeypatch.setattr(sandbox, "try_layer", answers.__getitem__)
    monkeypatch.setattr(sandbox, "available_names", lambda: tuple(answers))
    layer = sandbox.active_layer.__wrapped__()
    assert layer.sentence() == (
        "uid, contained: no network; missing: PID namespace; not available: namespaces (PermissionError); "
        "user-namespaces (no)"
    )


def test_programs_are_run_on_linux_only(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(UsageError, match="on a Linux machine"):
        run(GOOD["program.py"])


@pytest.mark.parametrize(
    ("ranges", "first", "last"),
    [("0 0 4294967295", 0x70000000, 0x7FFFFFFF), ("0 1000 1\n1 100000 65536", 49153, 65536), ("0 1000 1", 0, 0)],
)
def test_the_user_of_a_program_is_one_that_exists_here(ranges, first, last, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: ranges)
    assert all(first <= sandbox._free_uid() <= last for _ in range(50))


NOBODY = 0x6FFFFF00
UNPRIVILEGED = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from flashmem_bench.grading.sandbox import Limits, run_program
limits = Limits(wall_s=2.0, cpu_s=5, processes=24)
for program in json.loads(sys.stdin.read()):
    outcome = run_program({"program.py": program, "tests.py": "assert double(4) == 8"}, "script", limits, "none")
    print(outcome.status)
"""


def interpreter_for(who: dict) -> str:
    """Return an interpreter that a user can start, new enough for this package."""
    check = "import sys, ctypes; sys.exit(sys.version_info < (3, 11))"
    for path in (sys.executable, "/usr/bin/python3"):
        try:
            if subprocess.run([path, "-c", check], cwd="/", capture_output=True, **who).returncode == 0:
                return path
        except OSError:
            continue
    pytest.skip("no interpreter here can be started by another user")


def test_without_any_containment_limits_still_hold_and_nothing_is_left():
    """As an ordinary user: as root this layer would be no test but a danger."""
    root = os.geteuid() == 0
    who = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if root else {}
    names = ["fork bomb", "kill of the parent", "a daemon", "socket", "memory bomb"]
    programs = [HOSTILE[name][0].replace("PORT", "9") for name in names] + [GOOD["program.py"]]
    command = [interpreter_for(who), "-c", UNPRIVILEGED, json.dumps([str(Path(sandbox.__file__).parents[2])])]
    done = subprocess.run(command, input=json.dumps(programs), capture_output=True, text=True, cwd="/", **who)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["timeout", "failed", "failed", "failed", "memory", "passed"]
    left = [folder for folder in Path("/proc").glob("[0-9]*") if marked(folder, b"FLASHMEM_SANDBOX=", NOBODY)]
    assert not root or left == []
