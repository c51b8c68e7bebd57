"""Worker processes: the rows of any number of them are the same, and what ends one costs the guilty sample alone."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flashmem_bench.answers import Finished
from flashmem_bench.checkpoints import UNTRAINED
from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.executors.base import Work
from flashmem_bench.executors.local_cell import CellRun
from flashmem_bench.executors.local_worker import Place, Trouble, take_device
from flashmem_bench.executors.pieces import Fault, Piece
from flashmem_bench.executors.supervisor import Event, Worker, Workers
from flashmem_bench.interrupts import Stop
from flashmem_bench.limits import Limits, TooManyErrors
from flashmem_bench.prepare import CellPlan
from flashmem_bench.progress import Silent
from flashmem_bench.registry import get_method, method_names
from flashmem_bench.rows import sample_row
from flashmem_bench.runner import run_grid
from flashmem_bench.session import Request, Session
from flashmem_bench.store import ResultStore
from flashmem_bench.verification import verify
from tests import faulty
from tests.long_rows import write_long_data
from tests.test_own_suite import JSONL, YAML

# What may differ between two runs of the same cell: clocks, which start made a row, and who answered.
_VARYING = ("_ms", "started_at", "attempt", "overhead_share", "worker", "workers", "timing_valid")


def table(results: Path) -> dict:
    """Rows and texts of all cells without what may differ between two runs."""
    found: dict = {}
    for cell in ResultStore(results).cells():
        where = (cell.get("suite"), cell.get("method"), cell.cell_id)
        for row in cell.rows():
            found[*where, row["sample_id"]] = {k: v for k, v in row.items() if not k.endswith(_VARYING)}
        for name, text in cell.texts().items():
            found[*where, name, "text"] = text
    return found


def differences(found: Path, whole: Path) -> tuple[int, int]:
    """How many rows and texts of an undisturbed run are missing, and how many others are not as they are there."""
    ours, theirs = table(found), table(whole)
    return len(theirs.keys() - ours.keys()), sum(theirs.get(key) != value for key, value in ours.items())


def manifests(results: Path) -> list[dict]:
    return [cell.manifest for cell in ResultStore(results).cells()]


def alive(pids: list[int]) -> list[int]:
    """Processes that still run, zombies not counted."""

    def runs(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    return [pid for pid in pids if runs(pid)]


def until(condition, what: str, seconds: float = 100.0):
    """Wait for something that must come; nobody's speed is judged."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come")


@pytest.fixture
def grid(bench, tmp_path):
    """Run a request in workers, or, without `workers`, in this process on the shared backbone."""

    def go(results: Path, suites: str, methods: str, progress=None, data=bench.data, **more):
        if not results.exists():
            bench.results(results)
        memory = results / "checkpoints" / bench.model.name / "joint" / "flashmem" / "seed0"
        more = {"checkpoint": str(memory), **more} if "flashmem" in methods else more
        request = dataclasses.replace(bench.request(results, suites, methods, **more), data_dir=data)
        backbone = None if request.in_processes else bench.backbone
        return run_grid(request, session=Session(request, backbone), progress=progress)

    return go


METHODS = "vanilla,flashmem,flashmem-random-trigger,flashmem-random-memory"


@pytest.fixture(scope="module")
def long_data(tmp_path_factory):
    return write_long_data(tmp_path_factory.mktemp("long"))


def test_rows_are_the_same_for_one_process_and_four_workers(grid, long_data, tmp_path):
    one, four, common = tmp_path / "one", tmp_path / "four", {"data": long_data, "limit": 10}
    common["settings"] = {"trigger.threshold": 0.05}
    grid(one, "hops,babi-session", METHODS, **common)
    grid(four, "hops,babi-session", METHODS, workers=4, **common)
    assert table(four) == table(one) and len(table(one)) == 2 * 4 * 20
    for manifest in manifests(four):
        (attempt,) = manifest["attempts"]
        assert (attempt["executor"], attempt["workers"]) == ("local", 4) and 1 <= attempt["answered_by"] <= 4
        assert manifest["summary"]["status"] == "complete"
    assert {attempt["workers"] for manifest in manifests(one) for attempt in manifest["attempts"]} == {1}
    rows = [row for cell in ResultStore(four).cells() for row in cell.rows()]
    assert {row["workers"] for row in rows} == {4} and not any(row["timing_valid"] for row in rows)
    assert len({row["worker"] for row in rows}) > 1
    assert all(not verify(four, cell.cell_id)[1] for cell in ResultStore(four).cells())


FAULTS = {"raises": 2, "hangs": 5, "grows": 7, "dies": 8, "dies once": 10}
WORDS = {"grows": "allocates without end", "dies": "kills its process", "dies once": "kills its process once"}


def test_a_sample_that_raises_hangs_grows_or_kills_fails_alone(grid, bench, tmp_path, monkeypatch, tally):
    ids = [bench.suites["hops"].samples()[index].sample_id for index in range(12)]
    faulty.install(tmp_path / "plugin", monkeypatch, {ids[index]: fault for fault, index in FAULTS.items()})
    limits = Limits(sample_timeout=10.0, worker_memory=1.5)
    results, notes = tmp_path / "results", Notes()
    (result,) = grid(results, "hops", "faulty", notes, limit=12, workers=2, limits=limits)
    (plain,) = grid(tmp_path / "plain", "hops", "vanilla", limit=12)
    assert result.status == "partial" and len(result.rows) == 12
    errors = {row["index"]: row["error"] for row in result.rows if row["error"]}
    assert errors == {
        2: "ValueError: this sample is not well",
        5: "took longer than 10 s (--sample-timeout); its worker was stopped",
        7: "needed more than 1.5 GiB (--worker-memory); its worker was stopped",
        8: "its worker was twice ended by SIGKILL (the system does that where memory runs out)",
    }
    keys = ("sample_id", "prompt_sha", "output_tokens", "score", "answer_extracted", "finish_reason")
    wrong = sum(
        [row[key] for key in keys] != [same[key] for key in keys]
        for row, same in zip(result.rows, plain.rows, strict=True)
        if row["index"] not in errors
    )
    for fault in FAULTS:
        tally(f"a sample that {WORDS.get(fault, fault)} (a worker)", 1, lost=12 - len(result.rows), wrong=wrong)
    assert set(result.rows[5]) == set(result.rows[2]), "made here, it has the columns of one that was made there"
    for row in result.rows:
        assert (row["suite"], row["method"], row["cell"], row["seed"]) == ("hops", "faulty", result.cell, 0)
    assert "hops x faulty: a worker was ended with exit code 7; what it had is asked again" in notes.texts
    assert not verify(results, result.cell)[1]
    assert not workers_of(os.getpid())


def test_of_a_batch_only_the_guilty_one_fails(grid, bench, tmp_path, monkeypatch):
    ids = [bench.suites["hops"].samples()[index].sample_id for index in range(4)]
    faulty.install(tmp_path / "plugin", monkeypatch, {ids[1]: "hangs"})
    limits = Limits(sample_timeout=5.0)
    (result,) = grid(tmp_path / "results", "hops", "faulty", limit=4, batch_size=4, limits=limits)
    assert [bool(row["error"]) for row in result.rows] == [False, True, False, False]
    assert not any(row["timing_valid"] for row in result.rows if not row["error"]), "they were asked one by one"


class Notes(Silent):
    """Keeps what the user is told, and does something when a row is there."""

    def __init__(self, on_row=lambda row: None):
        self.texts, self.on_row = [], on_row

    def note(self, text):
        self.texts.append(text)

    def advance(self, row):
        self.on_row(row)


def test_what_failed_too_often_ends_the_run(grid, bench, tmp_path, monkeypatch):
    ids = [bench.suites["hops"].samples()[index].sample_id for index in range(8)]
    faulty.install(tmp_path / "plugin", monkeypatch, {ids[index]: "raises" for index in (1, 3, 4)})
    results = tmp_path / "results"
    with pytest.raises(TooManyErrors) as caught:
        grid(results, "hops", "faulty,vanilla", limit=8, limits=Limits(fail_on_error=0.2), command="the command")
    assert str(caught.value) == (
        "2 of 8 samples of hops x faulty failed, more than --fail-on-error 0.2 allows; the first: ValueError: this "
        "sample is not well; everything finished is stored, and this goes on: the command"
    )
    assert caught.value.exit_code == 1
    (cell,) = ResultStore(results).cells()
    assert [row["index"] for row in cell.rows()] == [0, 1, 2, 3]
    assert cell.manifest["summary"]["status"] == "partial"
    faulty_cell, vanilla = grid(results, "hops", "faulty,vanilla", limit=8, limits=Limits(fail_on_error=0.5))
    assert (faulty_cell.status, faulty_cell.new_samples) == ("partial", 6) and vanilla.status == "complete"


def test_a_cell_that_takes_too_long_leaves_its_rest_and_the_next_one_runs(grid, bench, tmp_path, monkeypatch):
    hanging = bench.suites["hops"].samples()[3].sample_id
    faulty.install(tmp_path / "plugin", monkeypatch, {hanging: "hangs"})
    results, limits = tmp_path / "results", Limits(cell_timeout=8.0)
    slow, plain = grid(results, "hops", "faulty,vanilla", limit=5, limits=limits)
    assert slow.status == "partial" and slow.error is None and len(slow.rows) < 5
    left = f"{5 - len(slow.rows)} of 5 samples have no row"
    assert slow.stopped == f"the cell took longer than 8 s (--cell-timeout); {left}"
    assert plain.status == "complete" and plain.stopped is None
    summaries = {cell.get("method"): cell.manifest["summary"] for cell in ResultStore(results).cells()}
    assert summaries["faulty"]["status"] == "partial" and summaries["vanilla"]["status"] == "complete"
    assert summaries["faulty"]["stopped"] == "the cell took longer than 8 s (--cell-timeout)"


def test_a_row_that_cannot_be_written_ends_the_workers_and_the_same_command_goes_on(grid, tmp_path, monkeypatch):
    from flashmem_bench.cell_store import CellStore
    from flashmem_bench.errors import StoreError

    append_many, written = CellStore.append_many, []

    def full(cell, group):
        if written:
            raise StoreError("cannot write samples.jsonl (No space left on device); nothing was lost")
        append_many(cell, group)
        written.extend(row["sample_id"] for row, _ in group)

    monkeypatch.setattr(CellStore, "append_many", full)
    results, limits = tmp_path / "results", Limits(sample_timeout=600.0)
    with pytest.raises(StoreError, match="No space left"):
        grid(results, "hops", "vanilla", limit=200, limits=limits)
    assert not workers_of(os.getpid())
    (cell,) = ResultStore(results).cells()
    assert cell.done() == set(written)
    monkeypatch.undo()
    (again,) = grid(results, "hops", "vanilla", limit=200)
    assert (again.status, again.new_samples) == ("complete", 200 - len(written))


def workers_of(pid: int) -> list[int]:
    """Worker processes that a process has: those that its own children have forked."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True) if child.ppid() != pid]


class Command:
    """The real command line in a process group of its own, as a terminal or a scheduler starts it."""

    def __init__(self, bench, results: Path, plugin: Path, *more: str):
        root = Path(__file__).parent.parent
        paths = os.pathsep.join([str(plugin), str(root)])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        line = [sys.executable, "-m", "flashmem_bench", "run", "--suite", "hops", "--model", str(bench.model),
                "--results-dir", str(results), "--quiet", *more]  # fmt: skip
        self.results = results
        self.process = subprocess.Popen(
            line, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def rows(self) -> list[dict]:
        return [json.loads(line) for path in self.results.glob("runs/*/*/*/samples.jsonl") for line in path.open()]

    def signal(self, signum: int) -> None:
        """As a terminal does it: to every process of the group."""
        os.killpg(self.process.pid, signum)

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=200)
        return self.process.returncode, said


def test_the_first_interruption_finishes_the_sample_and_says_how_to_go_on(bench, tmp_path, monkeypatch):
    ids = [sample.sample_id for sample in bench.suites["hops"].samples()]
    plugin = faulty.install(tmp_path / "plugin", monkeypatch, dict.fromkeys(ids, "waits"))
    command = Command(
        bench, bench.results(tmp_path / "results"), plugin, "--method", "faulty", "--sample-timeout", "1e6"
    )

    def waiting() -> list[str]:
        return [path.stem for path in plugin.glob("*.waits")]

    until(waiting, "the first sample")
    pids = workers_of(command.process.pid)
    command.signal(signal.SIGTERM)
    while command.process.poll() is None:
        # Which samples are begun before the worker has heard of it depends on the machine; none may be left halfway.
        for name in waiting():
            (plugin / f"{name}.go").touch()
        time.sleep(0.01)
    code, said = command.end()
    assert code == 128 + signal.SIGTERM
    assert "Continue with: flashmem-bench run" in said and "Traceback" not in said
    rows = command.rows()
    assert sorted(row["sample_id"] for row in rows) == sorted(waiting()) and len(rows) < len(ids)
    assert not any(row["error"] for row in rows)
    assert len(pids) == 1
    until(lambda: not alive(pids), "the end of the worker")


def test_the_second_interruption_does_not_wait_and_loses_no_finished_row(bench, tmp_path, monkeypatch):
    last = bench.suites["hops"].samples()[5].sample_id
    plugin = faulty.install(tmp_path / "plugin", monkeypatch, {last: "waits"})
    results = bench.results(tmp_path / "results")
    command = Command(bench, results, plugin, "--method", "faulty", "--limit", "6", "--workers", "2")
    until(lambda: len(command.rows()) == 5 and (plugin / f"{last}.waits").exists(), "all but the last sample")
    pids = workers_of(command.process.pid)
    command.signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        command.process.wait(timeout=2)
    command.signal(signal.SIGINT)
    code, said = command.end()
    assert code == 130 and "Continue with: flashmem-bench run" in said and "Traceback" not in said
    assert len(command.rows()) == 5
    until(lambda: not alive(pids), "the end of the workers")


def killed(command: Command, rows: int) -> set[tuple[str, str]]:
    """Kill a command as soon as that many rows are there, and return them; its workers must end by themselves."""
    until(lambda: len(command.rows()) >= rows or command.process.poll() is not None, "so many rows")
    pids = [child.pid for child in psutil.Process(command.process.pid).children(recursive=True)]
    finished = {(row["cell"], row["sample_id"]) for row in command.rows()}
    command.process.kill()
    command.end()
    until(lambda: not alive(pids), "the end of the workers")
    return finished


@pytest.mark.slow
def test_fifty_kills_of_the_real_command_line_lose_nothing(bench, tmp_path, monkeypatch, tally):
    dice, plugin = random.Random(20250731), faulty.install(tmp_path / "plugin", monkeypatch, {})
    whole, broken = bench.results(tmp_path / "whole"), bench.results(tmp_path / "broken")
    more = ("--method", "vanilla,flashmem", "--limit", "120")
    assert Command(bench, whole, plugin, *more).end()[0] == 0
    lost: set[tuple[str, str]] = set()
    for _ in range(50):
        command = Command(bench, broken, plugin, *more, "--workers", str(dice.choice((1, 2, 3))))
        # Up to four rows more than there are: some kills come while a model is loaded, others while a row is written.
        killed_at = len(command.rows()) + dice.randrange(5)
        finished = killed(command, killed_at)
        # Before the next start: a row that is lost would only be answered again.
        lost |= finished - {
            (cell.cell_id, row["sample_id"]) for cell in ResultStore(broken).cells() for row in cell.rows()
        }
    assert Command(bench, broken, plugin, *more, "--workers", "2").end()[0] == 0
    missing, wrong = differences(broken, whole)
    tally("SIGKILL of the command line, 1 to 3 workers", 50, len(lost) + missing, wrong)
    assert all(not verify(broken, cell.cell_id)[1] for cell in ResultStore(broken).cells())


@pytest.mark.slow
@pytest.mark.parametrize("match", ["within", "pooled"])
def test_rows_of_every_method_are_the_same_for_one_process_and_four_workers(grid, tmp_path, match):
    one, four = tmp_path / "one", tmp_path / "four"
    # An untrained memory is enough: its answers are as good to compare.
    methods = [name for name in method_names() if match == "within" or "random-trigger" in name]
    common = {"limit": 6, "match": match, "checkpoint": None, "settings": {"memory.checkpoint": UNTRAINED}}
    grid(one, "hops", ",".join(methods), **common)
    grid(four, "hops", ",".join(methods), workers=4, **common)
    assert table(four) == table(one)


def test_a_suite_file_of_ones_own_is_answered_by_workers(grid, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sums.yaml").write_text(YAML)
    (tmp_path / "mine" / "sums.jsonl").write_text(JSONL)
    monkeypatch.chdir(tmp_path)
    (result,) = grid(tmp_path / "results", "mine/sums.yaml", "vanilla", workers=2)
    assert result.status == "complete" and len(result.rows) == 2
    (manifest,) = manifests(tmp_path / "results")
    (attempt,) = manifest["attempts"]
    assert attempt["answered_by"] == len({row["worker"] for row in result.rows}) and attempt["workers"] == 2


def test_what_is_wrong_in_a_worker_is_a_sentence_here(grid, tmp_path):
    with pytest.raises(BenchError, match="device 'npu' is not available here; this machine has") as caught:
        grid(tmp_path / "results", "hops", "vanilla", limit=2, workers=2, device="npu")
    assert caught.value.exit_code == 2
    assert not workers_of(os.getpid())


class Told:
    """Two workers that have told all of this already; who is killed is gone after what it had told."""

    count = 2

    def __init__(self, told):
        self.workers = {
            number: Worker(number, SimpleNamespace(kill=partial(self.kill, number)), SimpleNamespace(send=print))
            for number in range(2)
        }
        self.told, self.killed = [Event(self.workers[number], *rest) for number, *rest in told], []

    def __iter__(self):
        return iter(list(self.workers.values()))

    def kill(self, number):
        if number not in self.killed:
            self.killed.append(number)

    def get(self, number):
        return self.workers[number]

    def lives(self):
        pass

    def event(self, wait):
        if self.told:
            return self.told.pop(0)
        return Event(self.workers.pop(self.killed.pop(0)), "gone") if self.killed else None

    def stop(self, workers):
        assert not workers, "they were ended before"


def test_rows_that_were_handed_over_are_taken_before_an_error_ends_the_run(bench):
    plan = CellPlan(get_method("vanilla"), bench.suites["hops"], {}, {}, {"cell": "c"})
    rows = [Finished(sample_row({}, {"sample_id": f"hops-{index}", "index": index}), {}) for index in range(3)]
    told = Told([(0, "row", rows[0]), (0, "error", Trouble("no grader", 2)), (1, "row", rows[1]), (1, "row", rows[2])])
    session = Session(bench.request(Path("none"), "hops", "vanilla", workers=2))
    work = Work(plan, [[index] for index in range(8)], frozenset(range(8)), Stop())
    finished, taken = CellRun(session, told, "hops", None, work, print).finished(), []
    with pytest.raises(BenchError, match="no grader") as caught:
        while True:
            taken.append(next(finished).row["index"])
    assert caught.value.exit_code == 2 and taken == [0, 1, 2] and not told.workers


def test_workers_that_cannot_begin_end_the_run_with_a_sentence():
    workers = Workers(1)
    for _ in range(2):
        workers.strike(Fault("ended with exit code 1"))
    workers.lives()
    for _ in range(2):
        workers.strike(Fault("ended with exit code 1"))
    with pytest.raises(BenchError, match=r"3 workers in a row .* the last because it was ended with exit code 1; "):
        workers.strike(Fault("ended with exit code 1"))


class Still:
    """A process that is not one."""

    pid, exitcode, killed = os.getpid(), None, False

    def kill(self):
        self.killed = True


def test_limits_count_from_the_beginning_of_a_sample_and_spare_a_machine_that_slept(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    worker = Worker(0, Still(), None, Piece([[0], [1]], frozenset({0, 1})))
    worker.take([0], warming=True)
    now[0] += 29
    worker.check(memory=None, timeout=3.0)
    assert worker.fault is None, "warming up may take ten times as long"
    worker.take([0], warming=False)
    now[0] += 2
    worker.take([1], warming=False)
    now[0] += 2
    worker.postpone(2)
    worker.check(memory=None, timeout=3.0)
    assert worker.fault is None
    now[0] += 2
    worker.check(memory=None, timeout=3.0)
    assert worker.process.killed and worker.fault.overdue == {0}
    assert worker.end().reason == "took longer than 3 s (--sample-timeout); its worker was stopped"


def test_memory_of_a_worker_is_looked_at(monkeypatch):
    worker = Worker(0, Still(), None)
    worker.check(memory=1e6)
    assert worker.fault is None
    worker.check(memory=1e-6)
    assert worker.fault.overdue == frozenset() and "(--worker-memory)" in worker.fault.reason


def test_devices_of_workers(monkeypatch):
    import torch

    def device(name: str, number: int = 1, count: int = 2, **more) -> str:
        return take_device(Request(("hops",), ("vanilla",), device=name, **more), Place(number, count))

    assert device("cuda:3", count=1) == "cuda:3" and device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert [device("auto", number) for number in (0, 1)] == ["cuda:0", "cuda:1"]
    with pytest.raises(UsageError, match="--workers 3 need one cuda device each and this machine has 2"):
        device("cuda", count=3)
    with pytest.raises(UsageError, match="--device cuda:1 is one device"):
        device("cuda:1")
    with pytest.raises(UsageError, match="spread over all devices needs --workers 1"):
        device("cuda", placement="auto")
