"""Sessions in the runner: the history is encoded once, the texts stay the same, and every position is in one row."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from flashmem_bench.cli import run as run_command
from flashmem_bench.errors import UsageError
from flashmem_bench.positions import encoded
from flashmem_bench.runner import run_grid
from flashmem_bench.samples import Sample
from flashmem_bench.selection import chosen
from flashmem_bench.session import Request, Session
from flashmem_bench.store import ResultStore
from flashmem_bench.verification import row_problems, session_problems, verify
from tests.long_rows import write_long_data

SUITES = ("babi-session", "qmsum-session", "locomo")
NEW = 8
# Random weights have entropies far above this.
TAU = {"trigger.threshold": 0.05}


@pytest.fixture(scope="module")
def suites(tmp_path_factory, bench):
    """The session suites over made-up rows, with short answers."""
    from flashmem_bench.tasks import load_suite

    data = write_long_data(tmp_path_factory.mktemp("long"))
    loaded = {name: load_suite(name, data_dir=data) for name in SUITES}
    for suite in loaded.values():
        suite.generation = dataclasses.replace(suite.generation, max_new_tokens=NEW)
    return loaded


@pytest.fixture
def run(bench, suites, tmp_path):
    """Run one suite and method into a results folder of the test."""

    def go(suite: str, method: str = "vanilla", results: Path | None = None, **more):
        results = results or tmp_path / "results"
        if not results.exists():
            bench.results(results)
        if method.startswith(("flashmem", "memgen")):
            memory = results / "checkpoints" / bench.model.name / "joint" / method.split("-")[0] / "seed0"
            more["checkpoint"] = str(memory)
        request = bench.request(results, suite, method, **more)
        (result, *_) = run_grid(request, session=Session(request, bench.backbone, suites))
        return result

    return go


def texts(results: Path, cell: str) -> dict[str, str]:
    (found,) = [entry for entry in ResultStore(results).cells() if entry.cell_id == cell]
    return {name: text["text"] for name, text in found.texts().items()}


def whole(row: dict) -> int:
    return row["prompt_tokens"] + row["output_tokens"] - 1 + row["latent_tokens"]


@pytest.mark.parametrize(
    ("suite", "method"),
    [
        ("babi-session", "flashmem"),
        ("qmsum-session", "vanilla"),
        ("qmsum-session", "flashmem-prompt-end"),
        ("locomo", "flashmem"),
        ("locomo", "memgen-cached"),
    ],
)
def test_texts_are_the_same_with_and_without_reuse(run, tmp_path, suite: str, method: str) -> None:
    settings = TAU if method == "flashmem" else {}
    kept = run(suite, method, settings=settings, limit=5)
    again = run(suite, method, settings=settings, limit=5, prefix_reuse=False)
    assert kept.status == again.status == "complete" and kept.cell != again.cell
    assert texts(tmp_path / "results", kept.cell) == texts(tmp_path / "results", again.cell)
    assert [row["score"] for row in kept.rows] == [row["score"] for row in again.rows]
    assert sum(row["positions_reused"] for row in kept.rows) > 0
    for row, plain in zip(kept.rows, again.rows, strict=True):
        assert row["positions_encoded"] + row["positions_reused"] == plain["positions_encoded"] == whole(row)
        assert row["positions_woven"] == plain["positions_woven"]
        assert row["triggers"] == plain["triggers"] and row["session_id"] == plain["session_id"]
        assert (plain["prefix_reused"], plain["positions_reused"]) == (False, 0)
    assert again.summary["why_not_reused"].startswith("--no-prefix-reuse")
    assert kept.summary["why_not_reused"] is None
    assert verify(tmp_path / "results", kept.cell)[1] == []


@pytest.mark.parametrize("suite", ["qmsum-session", "locomo"])
def test_a_fixed_history_is_paid_for_once(run, suite: str) -> None:
    result = run(suite)
    for session in {row["session_id"] for row in result.rows}:
        first, *rest = [row for row in result.rows if row["session_id"] == session]
        assert first["prefix_reused"] is False and first["positions_encoded"] == whole(first)
        assert rest
        for row in rest:
            assert row["prefix_reused"] is True
            # The history but for a few tokens at the border; the rest is the question, the template and the answer.
            assert 0 <= first["prefix_tokens"] - row["positions_reused"] <= 2
            assert row["positions_encoded"] < first["positions_encoded"] / 2


def test_the_table_of_runs_says_what_was_spared(run, tmp_path) -> None:
    from flashmem_bench.report.tables import build_tables

    kept, whole_prompts = run("qmsum-session"), run("qmsum-session", prefix_reuse=False)
    table = build_tables(ResultStore(tmp_path / "results"))["runs"].set_index("cell")
    reused, encoded_ = (sum(row[f"positions_{kind}"] for row in kept.rows) for kind in ("reused", "encoded"))
    assert table.loc[kept.cell, "reused_share"] == pytest.approx(reused / (reused + encoded_))
    assert table.loc[whole_prompts.cell, "reused_share"] == 0.0
    assert table.loc[kept.cell, "positions_encoded_mean"] == pytest.approx(encoded_ / len(kept.rows))
    # They are never laid side by side as if nothing but the method differed.
    assert "prefix_reuse=" in table.loc[kept.cell, "settings"]


def test_a_growing_history_is_encoded_once_in_all(run) -> None:
    rows = [row for row in run("babi-session", limit=5).rows if row["session_id"] == "qa1-0001"]
    assert len(rows) == 5 and [row["prefix_reused"] for row in rows] == [False, True, True, True, True]
    prefixes = [row["prefix_tokens"] for row in rows]
    assert prefixes == sorted(set(prefixes))
    assert [row["positions_reused"] for row in rows] == [0, *prefixes[:-1]]
    paid = sum(row["prefix_tokens"] - row["positions_reused"] for row in rows)
    assert paid == prefixes[-1]


def test_who_cannot_reuse_says_so_and_encodes_whole_prompts(run) -> None:
    for method, settings in (("memgen", {}), ("snapkv", {"eviction.budget": 64})):
        result = run("qmsum-session", method, settings=settings, limit=3)
        assert result.status == "complete"
        assert {row["prefix_reused"] for row in result.rows} == {False}
        assert "drops or evicts" in result.summary["why_not_reused"]
    result = run("qmsum-session", "vanilla", batch_size=2, limit=3)
    assert {row["prefix_reused"] for row in result.rows} == {False}
    assert "batch size 1" in result.summary["why_not_reused"]


def test_self_consistency_shares_the_history_among_questions_and_draws(run) -> None:
    settings = {"vote.draws": 3}
    kept = run("qmsum-session", "cot-sc", settings=settings, limit=3)
    again = run("qmsum-session", "cot-sc", settings=settings, limit=3, prefix_reuse=False)
    assert [row["answer_extracted"] for row in kept.rows] == [row["answer_extracted"] for row in again.rows]
    for row, plain in zip(kept.rows, again.rows, strict=True):
        assert row["positions_encoded"] + row["positions_reused"] == plain["positions_encoded"]
    assert [row["positions_reused"] > 0 for row in kept.rows] == [False, True, True]


def test_a_run_that_goes_on_inside_a_session_gives_the_same_rows(run, tmp_path) -> None:
    undisturbed = run("locomo", results=tmp_path / "whole")
    run("locomo", results=tmp_path / "parts", limit=2)
    continued = run("locomo", results=tmp_path / "parts")
    assert continued.new_samples == len(undisturbed.rows) - 2
    counts = ("sample_id", "positions_encoded", "positions_reused", "prefix_tokens", "prefix_reused", "prompt_sha")
    assert [[row[key] for key in counts] for row in continued.rows] == [
        [row[key] for key in counts] for row in undisturbed.rows
    ]
    assert {row["attempt"] for row in continued.rows} == {1, 2}


def test_a_prompt_that_does_not_begin_with_its_history_is_encoded_whole(bench, suites, tmp_path) -> None:
    suite = suites["locomo"]
    honest = suite.render

    def lying(doc, split, index, rng) -> Sample:
        return dataclasses.replace(honest(doc, split, index, rng), prefix="Something else altogether. " * 20)

    suite.render, suite._lists = lying, {}
    try:
        request = bench.request(bench.results(tmp_path / "results"), "locomo", "vanilla", limit=3)
        (result,) = run_grid(request, session=Session(request, bench.backbone, suites))
    finally:
        del suite.render
        suite._lists = {}
    assert result.status == "complete" and {row["prefix_reused"] for row in result.rows} == {False}
    assert {row["prefix_tokens"] for row in result.rows} == {None}
    assert result.summary["why_not_reused"] == "3 prompts do not begin with the tokens of their session's history"


@pytest.mark.parametrize(("truncate", "reused"), [("left", False), ("middle", True)])
def test_truncated_prompts_reuse_what_they_still_share(run, monkeypatch, truncate: str, reused: bool) -> None:
    from flashmem.backbone import Backbone

    # All three prompts are cut.
    monkeypatch.setattr(Backbone, "max_positions", property(lambda self: 224))
    kept = run("qmsum-session", truncate=truncate, limit=3)
    assert all(row["prompt_truncated"] for row in kept.rows)
    assert [row["prefix_reused"] for row in kept.rows] == [False, reused, reused]
    again = run("qmsum-session", truncate=truncate, limit=3, prefix_reuse=False)
    assert [row["score"] for row in kept.rows] == [row["score"] for row in again.rows]


def test_sessions_and_their_questions_are_counted() -> None:
    sessions = ["a", "a", "a", "b", "b", "c"]

    def indices(**more) -> list[int]:
        return chosen(Request(("s",), ("m",), **more), sessions, "s")

    assert indices() == [0, 1, 2, 3, 4, 5]
    assert indices(limit=4) == [0, 1, 2, 3]
    assert indices(limit_sessions=2) == [0, 1, 2, 3, 4]
    assert indices(questions_per_session=1) == [0, 3, 5]
    assert indices(limit_sessions=2, questions_per_session=2) == [0, 1, 3, 4]
    assert indices(limit_sessions=2, questions_per_session=2, limit=4) == [0, 1, 3]
    with pytest.raises(UsageError, match="s has no sessions"):
        chosen(Request(("s",), ("m",), limit_sessions=1), ["a", None], "s")
    with pytest.raises(UsageError, match="need --batch-size 1"):
        Request(("s",), ("m",), limit_sessions=1, batch_size=2)


def test_a_selection_of_sessions_is_part_of_the_same_cell(run) -> None:
    some = run("locomo", limit_sessions=2, questions_per_session=2)
    assert [row["index"] for row in some.rows] == [0, 1, 4, 5]
    every = run("locomo")
    assert every.cell == some.cell and every.new_samples == 4
    assert verify_rows(every.rows) == []


def verify_rows(rows: list[dict]) -> list:
    return [*session_problems(rows), *(problem for row in rows for problem in row_problems(row))]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"positions_encoded": 5}, "positions_encoded is 5, its formula gives"),
        ({"positions_reused": 9999}, "more than the"),
        ({"prefix_reused": False}, "prefix_reused is False and positions_reused"),
        ({"positions_reused": 300, "prefix_tokens": 400}, "had been encoded"),
    ],
)
def test_counts_that_do_not_add_up_are_found(run, change: dict, said: str) -> None:
    rows = run("qmsum-session", limit=3).rows
    assert verify_rows(rows) == []
    assert rows[1]["prefix_tokens"] > 300
    wrong = [rows[0] | {"prefix_tokens": 200}, rows[1] | change] if "prefix_tokens" in change else [rows[1] | change]
    assert any(said in str(problem) for problem in verify_rows(wrong))


def test_the_formula_of_positions_knows_what_was_reused() -> None:
    assert encoded(None, 100, 5, [], 8, reused=90) == (14, 0)
    assert encoded("consolidator", 100, 5, [0], 8, reused=90) == (22, 0)
    assert encoded("weaver", 100, 5, [0], 8, reused=90) == (22, 108)


def test_the_command_line(bench, tmp_path, capfd) -> None:
    data = write_long_data(tmp_path / "data")
    arguments = [
        "run",
        "--suite",
        "locomo",
        "--method",
        "vanilla",
        "--model",
        str(bench.model),
        "--data-dir",
        str(data),
    ]
    more = [
        "--results-dir",
        str(tmp_path / "results"),
        "--limit-sessions",
        "1",
        "--questions-per-session",
        "2",
        "--json",
    ]
    assert run_command([*arguments, *more]) == 0
    assert run_command([*arguments, *more, "--no-prefix-reuse", "--set", "suite.history_words=30"]) == 0
    cells = [json.loads(line)["cells"][0] for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert [cell["samples"] for cell in cells] == [2, 2] and len({cell["cell"] for cell in cells}) == 2
    assert run_command([*arguments, "--limit-sessions", "0"]) == 2
    assert run_command([*arguments, *more, "--set", "suite.words=3"]) == 2
    assert "its data settings are history_words" in capfd.readouterr().err
