"""Times of a cell come from one attempt, scores from all of its samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashmem_bench.report.cells import Cell, load_cells, timed_pairs, timed_rows
from flashmem_bench.report.compare import comparison_warnings
from flashmem_bench.report.paired import compare_arms, find_pair
from flashmem_bench.report.tables import build_tables
from flashmem_bench.store import ResultStore
from tests.synthetic_results import add_cell


def row(number: int, attempt: int = 1, valid: bool | None = True, e2e: float | None = 1.0) -> dict:
    return {"sample_id": str(number), "attempt": attempt, "timing_valid": valid, "e2e_ms": e2e}


@pytest.mark.parametrize(
    ("rows", "attempt", "count"),
    [
        ([], None, 0),
        ([row(0, valid=False), row(1, e2e=None)], None, 0),
        ([row(0), row(1), row(2, 2)], 1, 2),
        ([row(0), row(1, 2)], 2, 1),
        ([row(0, 3), row(1, 2), row(2, 2, valid=False)], 3, 1),
        ([row(0), row(1), row(2), row(3, 2), row(4, 2, valid=False)], 1, 3),
        ([row(0, valid=None), row(1, valid=None)], 1, 2),
        ([{"sample_id": "a", "e2e_ms": 2.0}], None, 1),
    ],
)
def test_the_attempt_with_the_most_times_counts_and_the_later_of_two(
    rows: list, attempt: int | None, count: int
) -> None:
    found = timed_rows(rows)
    assert len(found) == count
    assert {entry.get("attempt") for entry in found} <= {attempt}


def attempts(store: ResultStore, method: str, second: range, factor: float = 100.0, void: range = range(0)) -> Cell:
    """A cell of ten samples; those of the second attempt took far longer, and some times are void."""
    cell = add_cell(store, "hops", method, 10)
    new = []
    for entry in cell.rows():
        if entry["index"] in second:
            entry |= {"attempt": 2, "e2e_ms": entry["e2e_ms"] * factor, "decode_ms": entry["decode_ms"] * factor}
        if entry["index"] in void:
            entry["timing_valid"] = False
        new.append(entry)
    cell.revise(new, {}, {})
    cell.begin_attempt({"cpu": "another"})
    cell.finish({})
    (found,) = [loaded for loaded in load_cells(store) if loaded.cell_id == cell.cell_id]
    return found


def test_times_of_two_attempts_are_never_pooled(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    calm = add_cell(ResultStore(tmp_path / "calm"), "hops", "flashmem", 10)
    cell = attempts(store, "flashmem", range(6, 10))
    assert cell.timed_attempt == 1 and [entry["index"] for entry in cell.timed_rows] == list(range(6))
    run = build_tables(store)["runs"].iloc[0]
    assert (run["attempts"], run["timed_attempt"], run["timed_samples"], run["n"]) == (2, 1, 6, 10)
    right = [entry["e2e_ms"] for entry in calm.rows()][:6]
    assert run["e2e_ms_median"] == pytest.approx((sorted(right)[2] + sorted(right)[3]) / 2)
    assert run["e2e_ms_p95"] <= max(right) and run["decode_ms_per_token"] < 50
    scores = [entry["score"] for entry in calm.rows()]
    assert run["score"] == pytest.approx(sum(scores) / 10), "scores use all rows"


def test_void_times_are_nowhere(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    attempts(store, "flashmem", range(0), void=range(10))
    run = build_tables(store)["runs"].iloc[0]
    assert run["timed_samples"] == 0 and run[["timed_attempt", "e2e_ms_median", "ms_per_token"]].isna().all()
    assert run[["overhead_share", "harness_share", "ttft_ms_median", "tpot_ms_median", "e2e_ms_p95"]].isna().all()
    assert run["n_scored"] == 10


def test_pairs_use_what_is_timed_in_both_and_say_how_many(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    ours = attempts(store, "flashmem", range(6, 10), void=range(0, 1))
    theirs = attempts(store, "vanilla", range(0, 3))
    pairs = timed_pairs(ours, theirs)
    assert [a["index"] for a, _ in pairs] == [3, 4, 5] == [b["index"] for _, b in pairs]
    (record,) = build_tables(store)["comparisons"].to_dict("records")
    assert record["n"] == 10 and record["n_timed"] == 3
    assert record["time_ratio"] == pytest.approx(ratio([(a["e2e_ms"], b["e2e_ms"]) for a, b in pairs]))
    document = compare_arms(*find_pair(load_cells(store), "hops", "flashmem", "vanilla"))
    assert document["timed_pairs"] == 3 and document["pairs"] == 10
    assert document["time_ratio"][0] == pytest.approx(record["time_ratio"])


def ratio(pairs: list[tuple[float, float]]) -> float:
    product = 1.0
    for ours, theirs in pairs:
        product *= ours / theirs
    return product ** (1 / len(pairs))


def test_the_reader_is_told_what_times_rest_on(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    attempts(store, "flashmem", range(6, 10))
    said = " ".join(comparison_warnings(load_cells(store)))
    assert "times come from 6 of 10 samples, those of attempt 1 of 2; scores from all." in said
    assert "pooled" not in said


def test_void_times_of_one_attempt_are_told_too(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    attempts(store, "flashmem", range(0), void=range(7))
    assert any("times come from 3 of 10 samples;" in said for said in comparison_warnings(load_cells(store)))


def test_the_machine_that_is_shown_is_the_one_that_the_times_come_from(tmp_path: Path) -> None:
    from flashmem_bench.report.html import _provenance

    cell = attempts(ResultStore(tmp_path), "flashmem", range(6, 10))
    assert "cpu synthetic" in _provenance(cell)["info"] and "another" not in _provenance(cell)["info"]


def test_an_attempt_records_what_is_known_at_its_end(tmp_path: Path) -> None:
    cell = ResultStore(tmp_path).open_cell({"suite": "s", "method": "m"}, {})
    cell.begin_attempt({"cpu": "x"})
    cell.finish({"n": 0}, {"write_ms": 1.5, "workers": 1})
    (attempt,) = cell.manifest["attempts"]
    assert (attempt["write_ms"], attempt["workers"], attempt["cpu"]) == (1.5, 1, "x") and "finished_at" in attempt
