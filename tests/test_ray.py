"""A real Ray cluster of nodes on this machine: rows are those of one run, with a node killed half way and without a
disk in common."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from flashmem_bench.cli import run as command
from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.interrupts import Interrupted
from flashmem_bench.runner import run_grid
from flashmem_bench.store import ResultStore
from tests.test_own_suite import JSONL, YAML
from tests.test_shards_merge import content

ray = pytest.importorskip("ray", reason="needs the extra ray: pip install 'flashmem[ray]'")
pytestmark = pytest.mark.slow

SMALL = {"object_store_memory": 100 * 2**20}
TAU = {"trigger.threshold": 0.05}
GRID = "vanilla,flashmem,flashmem-random-trigger,flashmem-shuffled-memory"


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """A head without workers, so that every worker is on a node that can be killed."""
    from ray.cluster_utils import Cluster

    # Nodes find this package where the tests found it, and say nothing to the network.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
    yield made
    ray.shutdown()
    made.shutdown()


def kill(node: Any) -> None:
    """What a power cut does: all processes of a node at once."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [*raylet.children(recursive=True), raylet]:
        process.kill()


class Watch:
    """Told what the runner does; calls `then` once a row is the last that it waits for."""

    def __init__(self, enough: Callable[[Watch], bool] = lambda watch: False, then: Callable[[], None] = lambda: None):
        self.enough, self.then, self.by_worker, self.notes = enough, then, Counter[int](), list[str]()
        self.done, self.left = False, 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, title: str, total: int, done: int) -> None:
        self.left = total - done

    def advance(self, row: dict[str, Any]) -> None:
        self.by_worker[row["worker"]] += 1
        self.left -= 1
        if not self.done and self.enough(self):
            self.done = True
            self.then()

    def stop(self) -> None:
        pass


@pytest.fixture
def place(bench, tmp_path):
    """A request for a results folder of the test, with the harness's memories and thresholds."""

    def at(name: str, suites: str = "wordmath", methods: str = GRID, **more: Any) -> Any:
        results = tmp_path / name
        if not results.exists():
            bench.results(results)
        memory = tmp_path / "memory"
        if not memory.exists():
            shutil.copytree(results / "checkpoints" / bench.model.name / "joint/flashmem/seed0", memory)
        options = {"checkpoint": str(memory), "settings": TAU, "limit": 16, **more}
        return bench.request(results, suites, methods, **options)

    return at


def same(found: Path, plain: Path, samples: int, cells: int) -> None:
    ours, theirs = content(found), content(plain)
    assert ours == theirs
    assert len(theirs) == cells and all(len(rows) == samples for rows, _ in theirs.values())


def test_a_node_killed_half_way_leaves_a_complete_and_identical_grid(cluster, place, tally) -> None:
    nodes = [cluster.add_node(num_cpus=1, **SMALL) for _ in range(2)]
    run_grid(place("plain", limit=40))

    def half_way(watch: Watch) -> bool:
        """Both have answered, and much of the cell is left."""
        return len([n for n in watch.by_worker.values() if n >= 2]) == 2 and watch.left >= 15

    watch = Watch(half_way, lambda: kill(nodes[1]))
    results = run_grid(place("ray", limit=40, executor="ray", ray_address=cluster.address), progress=watch)
    assert watch.done and any("its samples go to others" in note for note in watch.notes)
    assert [(result.status, len(result.rows)) for result in results] == [("complete", 40)] * 4
    same(place("ray").results_dir, place("plain").results_dir, 40, 4)
    tally("a Ray node killed half way", 1)
    for cell in ResultStore(place("ray").results_dir).cells():
        (attempt,) = cell.manifest["attempts"]
        assert attempt["executor"] == "ray"
    assert not list(place("ray").results_dir.glob(".token*"))


def test_a_node_that_joins_is_given_work(cluster, place) -> None:
    cluster.add_node(num_cpus=1, **SMALL)
    watch = Watch(lambda watch: True, lambda: cluster.add_node(num_cpus=1, **SMALL))
    request = place("ray", methods="vanilla", limit=120, executor="ray", ray_address=cluster.address)
    (result,) = run_grid(request, progress=watch)
    assert result.status == "complete" and len(watch.by_worker) == 2


def test_a_worker_that_is_killed_is_replaced_and_its_sample_asked_again(cluster, place, tally) -> None:
    cluster.add_node(num_cpus=1, **SMALL)
    watch = Watch(lambda watch: watch.by_worker.total() == 5, lambda: _kill_workers(cluster))
    request = place("ray", methods="vanilla", executor="ray", ray_address=cluster.address)
    (result,) = run_grid(request, progress=watch)
    assert result.status == "complete" and len(watch.by_worker) == 2
    tally("a Ray worker killed", 1, lost=16 - len(result.rows))
    assert any("is gone" in note for note in watch.notes)


def _kill_workers(cluster: Any) -> None:
    for node in cluster.worker_nodes:
        for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
            if "Answerer" in " ".join(process.cmdline()):
                process.kill()


def test_ctrl_c_finishes_what_is_under_way_and_the_same_command_continues(cluster, place) -> None:
    import signal

    cluster.add_node(num_cpus=1, **SMALL)
    watch = Watch(lambda watch: watch.by_worker.total() == 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    request = place("ray", methods="vanilla", executor="ray", ray_address=cluster.address)
    with pytest.raises(Interrupted):
        run_grid(request, progress=watch)
    (cell,) = ResultStore(request.results_dir).cells()
    done = len(cell.rows())
    # One was being written and one was under way.
    assert done == watch.by_worker.total() and 4 <= done <= 6
    (result,) = run_grid(request)
    assert (result.status, result.new_samples) == ("complete", 16 - done)


def test_nodes_without_the_results_folder_are_sent_what_they_need(cluster, place, tmp_path, bench) -> None:
    """The node runs in a mount namespace of its own, in which an empty folder lies over everything of the user's."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "sums.yaml").write_text(YAML)
    (mine / "sums.jsonl").write_text(JSONL)
    suites, methods = f"wordmath,{mine / 'sums.yaml'}", "vanilla,flashmem"
    more = {"suites": suites, "methods": methods, "limit": 6}
    run_grid(place("plain", **more))
    run_grid(place("plain", methods="flashmem-shuffled-memory", limit=6))
    with isolated_node(cluster, tmp_path):
        watch = Watch()
        ours = {"executor": "ray", "ray_address": cluster.address}
        results = run_grid(place("ray", **more, **ours), progress=watch)
        results += run_grid(place("ray", methods="flashmem-shuffled-memory", limit=6, **ours), progress=watch)
    assert [result.status for result in results] == ["complete"] * 5
    found, plain = place("ray").results_dir, place("plain").results_dir
    assert content(found) == content(plain)
    # What was made there came here; places are called as they are called here.
    banks = [sorted(path.name for path in (folder / "banks").iterdir()) for folder in (found, plain)]
    assert banks[0] == banks[1] and len(banks[0]) == 1
    for cell in ResultStore(found).cells():
        for key in ("threshold_file", "checkpoint"):
            assert not str(cell.manifest["descr"][key]).startswith("/tmp/flashmem-")


class isolated_node:
    """A node whose processes see an empty folder in the place of another."""

    def __init__(self, cluster: Any, hidden: Path):
        start = f"{sys.executable} -m ray.scripts.scripts start --address={cluster.address} --num-cpus=1 --block "
        start += f"--object-store-memory={SMALL['object_store_memory']} --disable-usage-stats"
        self.command = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {hidden} && exec {start}"]

    def __enter__(self) -> None:
        if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
            pytest.skip("this machine lets nobody make a mount namespace")
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # The executor waits for nodes by itself; nothing to wait for here.

    def __exit__(self, *error: Any) -> None:
        process = psutil.Process(self.process.pid)
        for child in [*process.children(recursive=True), process]:
            child.kill()
        self.process.wait()


def test_without_a_cluster_or_with_a_wrong_device_there_is_one_sentence(place, monkeypatch, capsys, bench) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    request = place("ray", methods="vanilla")
    grid = ["run", "--suite", "wordmath", "--method", "vanilla", "--model", request.model, "--limit", "2"]
    grid += ["--results-dir", str(request.results_dir), "--executor", "ray", "--ray-address", "127.0.0.1:1"]
    began = time.monotonic()
    assert command(grid) == 1
    assert "ray start --head" in capsys.readouterr().err and time.monotonic() - began < 120


def test_a_cluster_that_cannot_do_it_says_so(cluster, place) -> None:
    cluster.add_node(num_cpus=1, **SMALL)
    ours = {"executor": "ray", "ray_address": cluster.address, "methods": "vanilla"}
    with pytest.raises(UsageError, match="no node of the Ray cluster has a GPU"):
        run_grid(place("ray", device="cuda", **ours))
    # Only nodes load it.
    missing = replace(place("ray", **ours), model="/none/of/this")
    with pytest.raises(BenchError, match=r"on the node .*: there is no model folder at /none/of/this"):
        run_grid(missing)
