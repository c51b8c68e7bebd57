"""A node of a cluster without Ray: what travels to it where it sees no results folder, and that rows are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmem_bench.checkpoints import JOINT, checkpoint_folder
from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.executors.ray_actor import Answerer, Question, Reply
from flashmem_bench.executors.servant import Servant, Task
from flashmem_bench.executors.travel import (
    ENDINGS,
    Parcel,
    Token,
    absolute,
    called_here,
    named_paths,
    parcels,
    unpack,
)
from flashmem_bench.interrupts import Stop
from flashmem_bench.registry import get_method
from flashmem_bench.runner import run_grid
from flashmem_bench.session import Session
from flashmem_bench.store import cell_id
from flashmem_bench.thresholds import threshold_folder
from tests.test_own_suite import JSONL, YAML
from tests.test_shards_merge import content


@pytest.fixture
def node() -> Iterator[Answerer]:
    answerer = Answerer()
    yield answerer
    answerer.leave()


@pytest.fixture
def mine(tmp_path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "sums.yaml").write_text(YAML)
    (folder / "sums.jsonl").write_text(JSONL)
    (folder / "secret.txt").write_text("stays here")
    return folder / "sums.yaml"


def told(reply: Reply) -> Any:
    assert reply.trouble is None, reply.trouble
    return reply.value


def pieces_of(node: Answerer, question: Question, task: Task, sent: list[Parcel]) -> list[Any]:
    """Every sample of a task, pulled as a cluster does."""
    told(node.begin(question, task, *sent))
    found = []
    while (answer := told(node.next(False)))[0] is not None:
        found.append(answer[0])
    return found


@pytest.mark.parametrize(("own", "method"), [(True, "flashmem"), (False, "flashmem-shuffled-memory")])
def test_a_node_that_sees_nothing_gets_what_it_needs_and_gives_the_same_rows(
    bench, tmp_path, mine, node, own: bool, method: str
) -> None:
    suite, results, plain = str(mine) if own else "hops", tmp_path / "results", bench.results(tmp_path / "plain")
    memory = bench.results(results) / "checkpoints" / bench.model.name / "joint/flashmem/seed0"
    here = bench.request(plain, suite, method, checkpoint=str(memory), settings={"trigger.threshold": 0.05}, limit=2)
    run_grid(here, session=Session(here, bench.backbone))
    ((cell, (rows, texts)),) = content(plain).items()

    asked = absolute(replace(here, results_dir=results))
    token, paths = Token(results), named_paths(asked)
    sent = parcels(asked, suite, get_method(method), frozenset(paths), False)
    # From here on the node cannot see any of it.
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for folder in (results, mine.parent):
        folder.rename(hidden / folder.name)
    hello = node.hello(str(token.path), token.text, paths)
    assert hello["shared"] is False and set(hello["unseen"]) == {str(memory), *([suite] if own else [])}
    assert all(parcel.path.endswith(ENDINGS) for parcel in sent)

    question = Question(asked, suite, frozenset(hello["unseen"]), False)
    reply = node.plan(question, method, None, *sent)
    plan, environment = told(reply)
    found = pieces_of(node, question, Task(suite, method, cell, None, [[0], [1]], frozenset([0, 1])), [])
    assert len(found) == 2 and environment["versions"]
    for finished in found:
        known = rows[finished.row["sample_id"]]
        assert {key: value for key, value in finished.row.items() if key in known} == known
        assert finished.text == texts[finished.row["sample_id"]]
    # A bank that it made goes back, once, and its places are called as the user calls them.
    assert [Path(bank.path).parent.name for bank in reply.parcels] == ([] if own else ["banks"])
    assert node.plan(question, method, None).parcels == ()
    places = [
        called_here(str(plan.descr[key]), hello["folder"], asked, Path("mine")) for key in ("checkpoint", "suite")
    ]
    assert places == [str(memory), plan.descr["suite"]]
    assert called_here(f"look at {hello['folder']}/results/a", hello["folder"], asked, Path("mine")) == "look at mine/a"
    node.leave()
    assert not Path(hello["folder"]).exists()


def test_memories_of_names_that_are_no_folders_travel_too(bench, tmp_path, mine) -> None:
    asked = absolute(replace(bench.request(tmp_path, str(mine), "flashmem"), model="some/model of mine"))
    where = (asked.results_dir, asked.model, JOINT)
    places = [threshold_folder(*where) / "tau.json", checkpoint_folder(*where, "flashmem", 0) / "config.json"]
    for place in places:
        place.parent.mkdir(parents=True)
        place.write_text("{}")
    sent = parcels(asked, str(mine), get_method("flashmem"), frozenset(), False)
    assert [asked.results_dir / Path(parcel.path).relative_to("results") for parcel in sent] == places


def test_a_node_on_the_same_disk_is_sent_nothing(bench, tmp_path, node) -> None:
    results = bench.results(tmp_path / "results")
    memory = results / "checkpoints" / bench.model.name / "joint/flashmem/seed0"
    asked = absolute(bench.request(results, "hops", "flashmem", checkpoint=str(memory)))
    token = Token(results)
    hello = node.hello(str(token.path), token.text, named_paths(asked))
    assert hello["shared"] is True and hello["unseen"] == []
    assert parcels(asked, "hops", get_method("flashmem"), frozenset(), True) == []
    token.path.write_text("of another run")
    assert node.hello(str(token.path), token.text, [])["shared"] is False
    token.remove()
    assert not list(results.glob(".token*"))


def test_another_request_names_another_cell_of_the_same_method(bench, tmp_path) -> None:
    """As the values of an axis do: a worker that has answered one is handed the next without planning it."""
    base = bench.request(bench.results(tmp_path / "results"), "hops", "vanilla", limit=1)
    session = Session(base, bench.backbone, bench.suites)
    planner, servant = Servant(Session(base, bench.backbone, bench.suites)), Servant(session)
    cells = []
    for seed in (4, 6):
        request = replace(base, seed=seed)
        planner.session.request = session.request = request
        cell = cell_id(planner.plan("hops", "vanilla", None, print).identity)
        task = Task("hops", "vanilla", cell, None, [[0]], frozenset([0]))
        (finished,) = servant.answers(task, Stop(), print)
        cells.append((cell, finished.row["cell"]))
    assert all(asked == answered for asked, answered in cells) and cells[0] != cells[1]


def test_stopping_finishes_the_sample_under_way_and_begins_no_other(bench, tmp_path, node) -> None:
    results = bench.results(tmp_path / "results")
    question = Question(absolute(bench.request(results, "hops", "vanilla")), "hops")
    plan, _ = told(node.plan(question, "vanilla", None))
    cell = plan.at(Session(question.request, bench.backbone, bench.suites)).cell
    told(node.begin(question, Task("hops", "vanilla", cell, None, [[0], [1], [2]], frozenset([0, 1, 2]))))
    finished, _ = told(node.next(False))
    assert finished.row["index"] == 0
    assert told(node.next(True))[0] is None


def test_what_goes_wrong_on_a_node_is_a_sentence(bench, tmp_path, node) -> None:
    question = Question(absolute(bench.request(tmp_path / "empty", "hops", "flashmem")), "hops")
    reply = node.plan(question, "flashmem", None)
    assert reply.value is None and reply.exit_code == 1 and "flashmem-bench train" in (reply.trouble or "")
    missing = replace(question, request=replace(question.request, model=str(tmp_path / "none")))
    assert "no model folder" in (Answerer().plan(missing, "vanilla", None).trouble or "")
    told(node.plan(Question(absolute(bench.request(tmp_path / "r", "hops", "vanilla")), "hops"), "vanilla", None))
    other = Task("hops", "vanilla", "another cell", None, [[0]], frozenset([0]))
    reply = node.begin(Question(absolute(bench.request(tmp_path / "r", "hops", "vanilla")), "hops"), other)
    assert "other weights, another version" in (reply.trouble or "")


@given(st.text(max_size=30))
def test_no_file_that_is_sent_leaves_the_folder(tmp_path_factory, name: str) -> None:
    folder = tmp_path_factory.mktemp("node")
    place = folder / "inside/deep"
    try:
        unpack(place, [Parcel(name + ".json", b"{}"), Parcel(f"a/{name}/b.json", b"{}")])
    except (BenchError, OSError, ValueError):
        pass
    assert all(path.is_relative_to(folder / "inside/deep") or path.is_dir() for path in folder.rglob("*"))


@pytest.mark.parametrize("path", ["../a.json", "/etc/a.json", "a/../../b.json", "a.py", "a.pkl", "a"])
def test_a_file_of_another_place_or_kind_is_refused(tmp_path, path: str) -> None:
    with pytest.raises(BenchError, match="where none belongs"):
        unpack(tmp_path, [Parcel(path, b"")])


def test_options_that_belong_to_one_machine_are_refused(bench, tmp_path) -> None:
    for more in ({"workers": 2}, {"executor": "slurm"}):
        with pytest.raises(UsageError):
            bench.request(tmp_path, "hops", "vanilla", **{"executor": "ray", **more})
