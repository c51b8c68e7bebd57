"""What several copies of a cell give together: the same cell, whatever the order and however often."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmem_bench.merging import merge
from flashmem_bench.store import CellStore, ResultStore
from flashmem_bench.union import Copy, additions, attempt_key, conflicts

IDENTITY = {"suite": "stub", "method": "vanilla", "what": "answers"}


def row(index: int, attempt: int, error: str | None = None, started: str = "2026-01-01T00:00:00") -> dict[str, Any]:
    return {
        "sample_id": f"s{index}",
        "index": index,
        "attempt": attempt,
        "started_at": f"{started}.{index:03d}",
        "error": error,
        "score": None if error else float(index % 2),
        "score_valid": error is None,
        "prompt_sha": f"p{index}",
        "triggers": None if error else index % 3,
        "e2e_ms": None if error else 1.5 * index,
    }


def text(index: int, error: str | None = None, says: str = "") -> dict[str, Any]:
    record = {"sample_id": f"s{index}", "text": "", "tokens": [], "triggers": []}
    return record if error else {**record, "text": says or f"answer {index}", "tokens": [f"answer {index}"]}


@st.composite
def histories(draw) -> tuple[int, list[list[tuple[int, bool]]]]:
    """A number of samples and, for each of several folders, what it did: samples, each good or failed, in order.

    Every sample is good in at least one of them.
    """
    total = draw(st.integers(1, 12))
    folders = draw(st.lists(st.lists(st.tuples(st.integers(0, total - 1), st.booleans())), min_size=1, max_size=4))
    done = {index for folder in folders for index, good in folder if good}
    folders[-1] = [*folders[-1], *((index, True) for index in range(total) if index not in done)]
    return total, folders


def write_folder(root: Path, name: str, events: list[tuple[int, bool]], of: int) -> Path:
    """Write a shard as a worker does that was stopped now and then."""
    cell = ResultStore(root / name).open_cell(IDENTITY, {"limit": of})
    attempt, done = 0, set()
    for number, (index, good) in enumerate(events):
        if index in done:
            continue
        if number % 3 == 0:
            cell.close()
            attempt = cell.begin_attempt({"token": f"{name}-{number}", "command": name})
        error = None if good else f"failed in {name}"
        cell.append(row(index, attempt, error, f"2026-01-01T00:{number:02d}:{len(name):02d}"), text(index, error))
        done |= {index} if good else set()
    cell.finish({})
    return root / name


def content(results: Path) -> dict[str, Any]:
    """All of the cell that must not depend on the order: rows with the token of their attempt, and texts."""
    (cell,) = ResultStore(results).cells()
    tokens = {attempt["attempt"]: attempt["token"] for attempt in cell.manifest["attempts"]}
    assert len(tokens) == len(cell.manifest["attempts"]) == len(set(tokens.values()))
    rows = {entry["sample_id"]: {**entry, "attempt": tokens[entry["attempt"]]} for entry in cell.rows()}
    texts = cell.texts()
    summary = {key: cell.manifest["summary"][key] for key in ("n", "score", "errors")}
    return {
        "rows": rows,
        "texts": {name: texts[name] for name in rows},
        "tokens": sorted(tokens.values()),
        "summary": summary,
    }


def in_memory(name: str, events: list[tuple[int, bool]]) -> Copy:
    """What `write_folder` leaves of the same events."""
    attempts, rows, texts = [], {}, {}
    for number, (index, good) in enumerate(events):
        if rows.get(index, {"error": "missing"})["error"] is None:
            continue
        if number % 3 == 0 or not attempts:
            stamp = {"started_at": f"{number}", "token": f"{name}-{number}"}
            attempts.append({"attempt": len(attempts) + 1, **stamp})
        error = None if good else f"failed in {name}"
        rows[index] = row(index, len(attempts), error, f"2026-01-01T00:{number:02d}:{len(name):02d}")
        texts[f"s{index}"] = text(index, error)
    return Copy(name, attempts, list(rows.values()), texts)


def joined(into: Copy, copies: list[Copy]) -> Copy:
    assert not conflicts([into, *copies])
    found = additions(into, copies)
    rows = {entry["sample_id"]: entry for entry in into.rows} | {
        entry["sample_id"]: entry for entry, _ in found.samples
    }
    texts = {**into.texts, **{entry["sample_id"]: words for entry, words in found.samples}}
    return Copy(into.name, found.attempts, list(rows.values()), texts)


def meaning(copy: Copy) -> tuple[Any, ...]:
    tokens = {attempt["attempt"]: attempt["token"] for attempt in copy.attempts}
    rows = sorted(json.dumps({**entry, "attempt": tokens[entry["attempt"]]}) for entry in copy.rows)
    return rows, dict(copy.texts), sorted(tokens.values())


@given(histories(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_union_knows_no_order(history, chance) -> None:
    total, events = history
    copies = [in_memory(f"folder{'x' * n}", of) for n, of in enumerate(events)]
    once = joined(Copy("into"), copies)
    order = [copy for copy in copies for _ in range(2)]
    chance.shuffle(order)
    piecewise = Copy("into")
    for copy in order:
        piecewise = joined(piecewise, [copy])
    assert meaning(once) == meaning(piecewise)
    assert len(once.rows) == total and not any(entry["error"] for entry in once.rows)
    assert additions(once, copies).samples == []


@given(histories(), st.randoms(use_true_random=False))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_and_any_number_of_merges_gives_the_same_cell(tmp_path_factory, history, chance) -> None:
    total, events = history
    root = tmp_path_factory.mktemp("union")
    folders = [write_folder(root, f"folder{'x' * n}", of, total) for n, of in enumerate(events)]
    merge(root / "once", folders)
    order = [folder for folder in folders for _ in range(2)]
    chance.shuffle(order)
    for folder in order:
        merge(root / "piecewise", [folder])
    merge(root / "piecewise", list(reversed(folders)))
    once = content(root / "once")
    assert once == content(root / "piecewise")
    assert len(once["rows"]) == total and once["summary"]["errors"] == 0
    assert all(once["texts"][f"s{index}"]["text"] == f"answer {index}" for index in range(total))


def test_what_is_merged_already_is_not_written_again(tmp_path) -> None:
    folder = write_folder(tmp_path, "a", [(0, True), (1, False), (2, True)], 3)
    merge(tmp_path / "into", [folder])
    files = {path: path.read_bytes() for path in (tmp_path / "into/runs").rglob("*.json*")}
    again = merge(tmp_path / "into", [folder, folder])
    assert [cell.added for cell in again.cells] == [0]
    assert {path: path.read_bytes() for path in files} == files


def test_a_shard_that_goes_on_is_taken_piece_by_piece(tmp_path) -> None:
    cell = ResultStore(tmp_path / "a").open_cell(IDENTITY, {})
    attempt = cell.begin_attempt({"token": "t"})
    for index in range(4):
        cell.append(
            row(index, attempt, "failed" if index == 1 else None), text(index, "failed" if index == 1 else None)
        )
        (merged,) = merge(tmp_path / "into", [tmp_path / "a"]).cells
        assert (merged.samples, merged.added) == (index + 1, 1)
    cell.finish({})
    attempt = cell.begin_attempt({"token": "u"})
    cell.append(row(1, attempt), text(1))
    cell.close()
    (merged,) = merge(tmp_path / "into", [tmp_path / "a"]).cells
    assert (merged.samples, merged.added, merged.errors) == (4, 1, 0)
    (into,) = ResultStore(tmp_path / "into").cells()
    attempts = {entry["attempt"]: entry for entry in into.manifest["attempts"]}
    assert {entry["sample_id"]: attempts[entry["attempt"]]["token"] for entry in into.rows()}["s1"] == "u"
    # It ended after it was merged first.
    assert attempts[1]["finished_at"]


def test_a_different_answer_refuses_the_cell_and_names_sample_and_folders(tmp_path) -> None:
    first = write_folder(tmp_path, "a", [(0, True), (1, True)], 2)
    cell = ResultStore(tmp_path / "b").open_cell(IDENTITY, {})
    cell.append(row(1, cell.begin_attempt({"token": "other"})), text(1, says="something else"))
    cell.finish({})
    outcome = merge(tmp_path / "into", [first, tmp_path / "b"])
    assert outcome.exit_code == 1
    for word in ("s1", str(first), str(tmp_path / "b")):
        assert word in outcome.cells[0].problem
    assert not ResultStore(tmp_path / "into").cells()
    assert merge(tmp_path / "into", [first]).exit_code == 0
    before = content(tmp_path / "into")
    assert merge(tmp_path / "into", [tmp_path / "b"]).exit_code == 1
    assert content(tmp_path / "into") == before


def test_an_error_is_no_answer_and_gives_way(tmp_path) -> None:
    failed = write_folder(tmp_path, "a", [(0, False)], 1)
    good = write_folder(tmp_path, "bb", [(0, True)], 1)
    assert merge(tmp_path / "into", [failed]).exit_code == 3
    assert merge(tmp_path / "into", [good]).exit_code == 0
    assert merge(tmp_path / "into", [failed]).exit_code == 0


def test_a_folder_that_is_no_results_folder_or_is_broken_stops_only_itself(tmp_path) -> None:
    good = write_folder(tmp_path, "a", [(0, True)], 1)
    broken = write_folder(tmp_path, "b", [(1, True), (2, True)], 3)
    (samples,) = broken.rglob("samples.jsonl")
    lines = samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(b"\x00garbage\n" + lines[1])
    outcome = merge(tmp_path / "into", [good, tmp_path / "none"])
    assert outcome.exit_code == 1 and "no results folder" in outcome.problems[0]
    assert not (tmp_path / "none").exists()
    assert content(tmp_path / "into")["rows"].keys() == {"s0"}
    assert merge(tmp_path / "into", [broken]).exit_code == 1


def test_attempts_of_folders_keep_their_clocks_and_get_numbers_of_their_own(tmp_path) -> None:
    folders = [write_folder(tmp_path, name, [(index, True)], 3) for index, name in enumerate("abc")]
    merge(tmp_path / "into", [folders[2]])
    merge(tmp_path / "into", folders)
    (cell,) = ResultStore(tmp_path / "into").cells()
    attempts = cell.manifest["attempts"]
    assert [entry["attempt"] for entry in attempts] == [1, 2, 3]
    assert [entry["command"] for entry in attempts] == ["c", "a", "b"]
    originals = {
        entry["token"]: entry
        for folder in folders
        for cell in ResultStore(folder).cells()
        for entry in cell.manifest["attempts"]
    }
    for entry in attempts:
        assert {**entry, "attempt": 1} == originals[entry["token"]]


def test_a_lost_record_of_an_attempt_is_an_attempt_all_the_same() -> None:
    copies = [Copy(name, [], [row(index, 4)], {f"s{index}": text(index)}) for index, name in enumerate("ab")]
    found = additions(Copy("into"), copies)
    assert [entry["attempt"] for entry in found.attempts] == [1, 2]
    assert [entry["attempt"] for entry, _ in found.samples] == [1, 2]
    assert attempt_key(found.attempts[0]) != attempt_key(found.attempts[1])


def test_grades_and_times_are_not_answers() -> None:
    copies = [Copy(name, [], [{**row(0, 1), "score": score, "e2e_ms": 7.0}], {"s0": text(0)})
              for name, score in (("a", 0.0), ("b", 1.0))]  # fmt: skip
    assert conflicts(copies) == []
    other = Copy("c", [], [{**row(0, 1), "prompt_sha": "another"}], {"s0": text(0)})
    assert [conflict.second for conflict in conflicts([*copies, other])] == ["c"]


@pytest.mark.parametrize("stop", range(3))
def test_a_merge_that_is_killed_on_the_way_is_completed_by_the_next(tmp_path, monkeypatch, stop: int) -> None:
    """Killed before the attempts, before the rows, and before the summary."""
    folder = write_folder(tmp_path, "a", [(index, index != 2) for index in range(5)], 5)
    merge(tmp_path / "whole", [folder])
    steps = iter(range(9))

    def dying(name: str):
        real = getattr(CellStore, name)

        def call(self, *args, **more):
            if next(steps) == stop:
                raise KeyboardInterrupt
            return real(self, *args, **more)

        return call

    with monkeypatch.context() as patch:
        for name in ("amend", "append_many"):
            patch.setattr(CellStore, name, dying(name))
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "into", [folder])
    merge(tmp_path / "into", [folder])
    assert content(tmp_path / "into") == content(tmp_path / "whole")
