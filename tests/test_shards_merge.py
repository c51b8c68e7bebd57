"""Shards of a grid, each run by a worker into a folder of its own and merged: the rows of one run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flashmem_bench.cli import run as command
from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.merging import Merge, merge, shard_folders
from flashmem_bench.runner import run_grid
from flashmem_bench.session import Request, Session
from flashmem_bench.shards import Shard, shard_folder, split
from flashmem_bench.store import ResultStore
from flashmem_bench.tracing import trace_cells
from tests.long_rows import write_long_data

# What a machine decides, not the samples.
OF_TIME = {"attempt", "started_at", "overhead_share", "peak_alloc_bytes", "timing_valid", "worker", "workers"}
GRID = "vanilla,flashmem,flashmem-random-trigger,flashmem-shuffled-memory"


@pytest.fixture(scope="module")
def suites(tmp_path_factory, bench):
    """All suites of the harness's tests, and one with sessions."""
    from flashmem_bench.tasks import load_suite

    suite = load_suite("babi-session", data_dir=write_long_data(tmp_path_factory.mktemp("long")))
    suite.generation = dataclasses.replace(suite.generation, max_new_tokens=8)
    return {**bench.suites, "babi-session": suite}


@dataclasses.dataclass
class Place:
    """A results folder and what runs in it."""

    bench: Any
    suites: dict[str, Any]
    results: Path

    def request(self, suites: str, methods: str, **more: Any) -> Request:
        memory = self.results / "checkpoints" / self.bench.model.name / "joint/flashmem/seed0"
        return self.bench.request(self.results, suites, methods, **{"checkpoint": str(memory), **more})

    def session(self, request: Request) -> Session:
        return Session(request, self.bench.backbone, self.suites)

    def run(self, suites: str, methods: str, **more: Any) -> list[Any]:
        request = self.request(suites, methods, **more)
        return run_grid(request, session=self.session(request))

    def shard(self, text: str, suites: str, methods: str, **more: Any) -> list[Any]:
        part = Shard.parse(text)
        return self.run(suites, methods, shard=part, rows_dir=shard_folder(self.results, part), **more)

    def merge(self) -> Merge:
        return merge(self.results, shard_folders(self.results))


@pytest.fixture
def place(bench, suites, tmp_path):
    def at(name: str) -> Place:
        return Place(bench, suites, bench.results(tmp_path / name))

    return at


def content(results: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Rows without what a clock decides, and texts, by cell and sample."""
    found = {}
    for cell in ResultStore(results).cells():
        rows = {row["sample_id"]: row for row in cell.rows()}
        kept = {
            name: {key: value for key, value in row.items() if key not in OF_TIME and not key.endswith("_ms")}
            for name, row in rows.items()
        }
        found[cell.cell_id] = (kept, cell.texts())
    return found


@pytest.mark.parametrize(
    ("names", "methods", "more"),
    [
        ("wordmath", GRID, {"limit": 7, "settings": {"trigger.threshold": 0.05}}),
        ("babi-session", "vanilla,flashmem", {"settings": {"trigger.threshold": 0.05}}),
        ("hops", "vanilla,flashmem-prompt-end", {"limit": 7, "batch_size": 3}),
    ],
    ids=["matched and placebo", "sessions", "batches"],
)
def test_merged_rows_are_those_of_one_run(place, names: str, methods: str, more: dict[str, Any]) -> None:
    plain, sharded = place("plain"), place("sharded")
    plain.run(names, methods, **more)
    for index in (2, 0, 1):
        sharded.shard(f"{index}/3", names, methods, **more)
        outcome = sharded.merge()
        assert outcome.exit_code == (0 if index == 1 else 3), outcome
    assert content(sharded.results) == content(plain.results)
    again = sharded.merge()
    assert again.exit_code == 0 and not any(cell.added for cell in again.cells)
    for cell in ResultStore(sharded.results).cells():
        told = [attempt["shard"]["index"] for attempt in cell.manifest["attempts"]]
        assert sorted(set(told)) == sorted(told)
        assert "shard" not in cell.manifest["descr"]
    banks = [{path.name for path in (each.results / "banks").glob("*.safetensors")} for each in (plain, sharded)]
    assert banks[0] == banks[1] and bool(banks[0]) == ("shuffled" in methods)


def test_a_match_over_all_samples_waits_for_the_merged_reference(place) -> None:
    plain, sharded = place("plain"), place("sharded")
    grid = ("wordmath", "flashmem-random-trigger,vanilla")
    more = {"limit": 6, "match": "pooled", "settings": {"trigger.threshold": 0.05}}
    plain.run(*grid, **more)
    for text in ("0/2", "1/2"):
        with pytest.raises(BenchError, match=r"0 of 6.*flashmem-bench merge --results-dir .* then this command again"):
            sharded.shard(text, *grid, **more)
    # All else was done before.
    assert {cell.method for cell in sharded.merge().cells} == {"flashmem", "vanilla"}
    for text in ("0/2", "1/2"):
        sharded.shard(text, *grid, **more)
    assert sharded.merge().exit_code == 0
    assert content(sharded.results) == content(plain.results)


def test_what_is_missing_is_told_by_shard(place) -> None:
    sharded = place("sharded")
    for text in ("0/4", "2/4"):
        sharded.shard(text, "wordmath", "vanilla", limit=12)
    (cell,) = ResultStore(sharded.results / "shards/2-of-4").cells()
    (samples,) = cell.path.glob("samples.jsonl")
    lines = samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(b"".join(lines[:-1]))
    outcome = sharded.merge()
    (merged,) = outcome.cells
    assert outcome.exit_code == 3
    assert merged.of == 12 and merged.samples == sum(len(cell.rows()) for cell in _cells(sharded))
    assert merged.missing == {"1/4": "nothing", "2/4": f"{len(lines) - 1} of {len(lines)}", "3/4": "nothing"}
    for text in ("1/4", "2/4", "3/4"):
        sharded.shard(text, "wordmath", "vanilla", limit=12)
    assert sharded.merge().exit_code == 0


def _cells(place: Place) -> list[Any]:
    return [cell for folder in shard_folders(place.results) for cell in ResultStore(folder).cells()]


def test_a_larger_limit_extends_shards_and_merged_cell(place) -> None:
    plain, sharded = place("plain"), place("sharded")
    plain.run("wordmath", "vanilla", limit=9)
    for limit in (4, 9):
        for text in ("0/2", "1/2"):
            sharded.shard(text, "wordmath", "vanilla", limit=limit)
        outcome = sharded.merge()
        assert (outcome.exit_code, outcome.cells[0].samples) == (0, limit)
    assert content(sharded.results) == content(plain.results)


def test_traces_marks_and_margins_come_along(place) -> None:
    sharded = place("sharded")
    part = Shard.parse("0/1")
    request = sharded.request("wordmath", "flashmem", limit=2, shard=part, rows_dir=shard_folder(sharded.results, part))
    session = sharded.session(request)
    mark = {"axis": "cooldown", "value": "8", "reference": False}
    results = run_grid(request, session=session, descr={"ablation": [mark]})
    trace_cells(session, results, 2)
    into = sharded.results.parent / "elsewhere"
    assert merge(into, shard_folders(sharded.results)).exit_code == 0
    (cell,) = ResultStore(into).cells()
    assert cell.manifest["descr"]["ablation"] == [mark] and cell.manifest["direct"] is False
    assert len(list((cell.path / "traces").glob("*.json"))) == 2
    margins = [
        json.loads((folder / "margins.json").read_text()) for folder in (into, sharded.results / "shards/0-of-1")
    ]
    assert margins[0] == margins[1]


def test_every_sample_is_in_one_shard_and_sessions_stay_together(suites) -> None:
    samples = suites["babi-session"].samples("test")
    for count in (1, 2, 5):
        parts = split([[index] for index in range(len(samples))], samples, count)
        assert sorted(index for part in parts for batch in part for index in batch) == list(range(len(samples)))
        homes = [{samples[index].session_id for batch in part for index in batch} for part in parts]
        assert sum(map(len, homes)) == len(set().union(*homes))


@pytest.mark.parametrize("text", ["4/4", "0/0", "-1/4", "1", "a/b", "1/4/2", "", "1/"])
def test_a_shard_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="i from 0 to n - 1"):
        Shard.parse(text)


def test_the_commands(place, capsys) -> None:
    sharded = place("sharded")
    options = ["--results-dir", str(sharded.results)]
    grid = ["--suite", "hops", "--method", "vanilla", "--model", str(sharded.bench.model), "--limit", "3", *options]
    assert command(["merge", *options]) == 1
    assert "there are no shards in" in capsys.readouterr().err
    assert command(["worker", "--shard", "2/2", *grid]) == 2
    assert command(["worker", "--shard", "0/2", "--json", "--quiet", *grid]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Path(document["results_dir"]) == sharded.results / "shards/0-of-2"
    assert command(["merge", "--json", *options]) == (3 if document["cells"][0]["samples"] < 3 else 0)
    (cell,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cells"]
    assert cell["of"] == 3 and cell["complete"] is (cell["samples"] == 3)
    assert command(["worker", "--shard", "1/2", "--quiet", *grid]) == 0
    assert command(["merge", *options]) == 0
    assert "3 of 3" in capsys.readouterr().out
