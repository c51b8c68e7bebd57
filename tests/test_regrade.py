"""regrade: grades of stored texts are made anew, everything else stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashmem_bench.cell_store import CellStore
from flashmem_bench.cli import run as run_command
from flashmem_bench.errors import StoreError
from flashmem_bench.rows import grade_columns, metric_columns
from flashmem_bench.schema import blank_sample
from flashmem_bench.store import ResultStore
from flashmem_bench.tasks import load_suite
from flashmem_bench.verification import verify
from flashmem_bench.voting import curve
from tests.test_suites import gsm8k_row, write_jsonl

COUNT = 6


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    folder = tmp_path / "data"
    write_jsonl(folder / "gsm8k/train.jsonl", [gsm8k_row(n) for n in range(100, 140)])
    write_jsonl(folder / "gsm8k/test.jsonl", [gsm8k_row(n) for n in range(500, 500 + COUNT)])
    return folder


def add_cell(results: Path, data: Path, method: str = "vanilla", *, candidates: bool = False, **descr) -> CellStore:
    """A finished cell of gsm8k as `run` leaves it: every second answer is right, the fourth sample failed."""
    suite = load_suite("gsm8k", data_dir=data)
    described = {"suite": "gsm8k", "method": method, "score_valid": True, **descr}
    cell = ResultStore(results).open_cell({"method": method, "split": "test"}, described)
    cell.begin_attempt({"cpu": "made up"})
    for index, sample in enumerate(suite.samples()):
        text = sample.target if index % 2 == 0 else "#### 1"
        failed = index == 3
        row = {**blank_sample(), "suite": "gsm8k", "method": method, "sample_id": sample.sample_id, "index": index,
               "error": "out of memory" if failed else None, "score_valid": False}  # fmt: skip
        drawn = [text, "#### 2"] if candidates else []
        if not failed:
            grade = suite.grade(sample, text)
            row |= grade_columns(grade, scored=described["score_valid"], valid=True)
            row |= metric_columns(curve(suite, sample, drawn))
            row |= {"output_tokens": 7, "triggers": 0, "trigger_rate": 0.0, "e2e_ms": 30.0 + index,
                    "grader": "numbers 0",
                    "beyond_trained_context": False}  # fmt: skip
        record = {"prompt": sample.prompt, "text": "" if failed else text, "target": sample.target,
                  "answer": sample.answer, "triggers": [], "candidates": drawn}  # fmt: skip
        cell.append(row, record)
    cell.finish({"status": "partial", "n": COUNT, "score": 0.6, "why_equal": "kept"})
    return cell


def regrade(data: Path, results: Path, capfd, *more: str) -> tuple[int, dict, str]:
    """Run the command; returns exit code, JSON document and stderr."""
    code = run_command(["regrade", "--data-dir", str(data), "--results-dir", str(results), "--json", *more])
    out, err = capfd.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out.strip() else {}, err


def spoil(cell: CellStore, **changes) -> None:
    """Write other grades into every graded row, as an earlier grader might have left them."""
    rows = [{**row, **changes} for row in cell.rows() if row["error"] is None]
    cell.revise(rows, {}, {})


def test_grades_that_are_right_already_stay_and_the_grader_is_named(data, tmp_path, capfd):
    results = tmp_path / "results"
    cell = add_cell(results, data)
    before, texts = cell.rows(), (cell.path / "texts.jsonl").read_bytes()
    code, document, _ = regrade(data, results, capfd)
    assert code == 0 and document["failed"] == 0
    (found,) = document["cells"]
    assert (found["graded"], found["changed"], found["left"]) == (5, 0, 0)
    assert cell.rows() == [row if row["error"] else {**row, "grader": "numbers 1"} for row in before]
    assert (cell.path / "texts.jsonl").read_bytes() == texts


def test_changed_grades_are_counted_and_nothing_else_changes(data, tmp_path, capfd):
    results = tmp_path / "results"
    cell = add_cell(results, data)
    good = cell.rows()
    spoil(cell, score=0.0, parse_status="no_answer", answer_extracted=None, **{"metric.old": 1.0})
    code, document, _ = regrade(data, results, capfd, "--suite", "gsm8k", "--method", "vanilla")
    (found,) = document["cells"]
    assert code == 0 and (found["graded"], found["changed"]) == (5, 5)
    assert (found["before"], found["after"]) == (0.0, pytest.approx(3 / 5))
    assert cell.rows() == [row if row["error"] else {**row, "grader": "numbers 1"} for row in good]
    manifest = cell.manifest
    assert manifest["summary"] == {"status": "partial", "n": COUNT, "score": pytest.approx(3 / 5), "why_equal": "kept"}
    assert len(manifest["attempts"]) == 1 and manifest["revisions"][-1]["changed"] == 5
    assert not verify(results)[1]


def test_a_vote_gets_its_curve_again(data, tmp_path, capfd):
    results = tmp_path / "results"
    cell = add_cell(results, data, "cot-sc", candidates=True)
    good = cell.rows()
    spoil(cell, **{"metric.sc_1": 0.5, "metric.sc_2": 0.5})
    _, document, _ = regrade(data, results, capfd)
    assert document["cells"][0]["changed"] == 5
    assert [row.get("metric.sc_1") for row in cell.rows()] == [row.get("metric.sc_1") for row in good]


def test_an_untrained_memory_keeps_its_null_scores(data, tmp_path, capfd):
    cell = add_cell(tmp_path / "results", data, "flashmem", score_valid=False)
    regrade(data, tmp_path / "results", capfd)
    assert all(row["score"] is None and row["score_valid"] is False for row in cell.rows())


def test_a_question_that_is_another_now_is_left_as_it_was(data, tmp_path, capfd):
    results = tmp_path / "results"
    cell = add_cell(results, data)
    spoil(cell, score=0.25)
    rows = [gsm8k_row(n) for n in range(500, 500 + COUNT)]
    write_jsonl(data / "gsm8k/test.jsonl", [gsm8k_row(7), *rows[1:]])
    _, document, _ = regrade(data, results, capfd)
    assert (document["cells"][0]["graded"], document["cells"][0]["left"]) == (4, 1)
    assert cell.rows()[0]["score"] == 0.25 and cell.rows()[2]["score"] == 1.0
    write_jsonl(data / "gsm8k/test.jsonl", [gsm8k_row(n) for n in range(900, 906)])
    before = cell.rows()
    _, document, _ = regrade(data, results, capfd)
    assert document["cells"][0]["why"] == "the suite's questions are others now" and cell.rows() == before


def test_a_suite_file_of_ones_own_is_named_by_its_path(data, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    lines = ["task: towns", "dataset_path: json", "dataset_kwargs: {data_files: towns.jsonl}",
        "test_split: train", "output_type: generate_until", 'doc_to_text: "{{q}}"', 'doc_to_target: "{{a}}"',
        "generation_kwargs: {until: [], max_gen_toks: 8}", "metric_list:", "  - metric: exact_match"]  # fmt: skip
    Path("towns.yaml").write_text("\n".join(lines) + "\n")
    write_jsonl(Path("towns.jsonl"), [{"q": "Town?", "a": "Ulm"}])
    suite = load_suite("towns.yaml")
    sample = suite.samples()[0]
    cell = ResultStore(results).open_cell({"split": "test"}, {"suite": suite.name, "method": "vanilla"})
    row = {**blank_sample(), "suite": suite.name, "method": "vanilla", "sample_id": sample.sample_id, "index": 0,
           "output_tokens": 1, "score": 0.0, "score_valid": True}  # fmt: skip
    cell.append(row, {"prompt": sample.prompt, "text": "Ulm", "answer": sample.answer, "triggers": []})
    cell.close()
    _, document, _ = regrade(data, results, capfd)
    assert "name it with --suite" in document["cells"][0]["why"]
    code, document, _ = regrade(data, results, capfd, "--suite", "towns.yaml")
    assert code == 0 and document["cells"][0]["after"] == 1.0
    assert cell.rows()[0]["grader"].startswith("lm-eval 0.")


def test_nothing_meant_and_nothing_there_are_sentences(data, tmp_path, capfd):
    assert regrade(data, tmp_path / "none", capfd)[0] == 1
    add_cell(tmp_path / "results", data)
    code, _, err = regrade(data, tmp_path / "results", capfd, "--cell", "zzz")
    assert code == 1 and "no cell" in err
    code, _, err = regrade(data, tmp_path / "results", capfd, "--suite", "nonsense")
    assert code == 2 and "no suite named" in err


def test_data_that_is_gone_fails_the_cell_and_says_so(data, tmp_path, capfd):
    results = tmp_path / "results"
    add_cell(results, data)
    (data / "gsm8k/test.jsonl").unlink()
    code, document, err = regrade(data, results, capfd)
    assert code == 1 and document["failed"] == 1 and "holds neither test.jsonl" in err


def test_the_table_is_for_people(data, tmp_path, capfd):
    results = tmp_path / "results"
    cell = add_cell(results, data)
    spoil(cell, score=0.0)
    assert run_command(["regrade", "--data-dir", str(data), "--results-dir", str(results)]) == 0
    out = capfd.readouterr().out
    assert "5 graded again, 3 changed; score 0.000 to 0.600" in out and "3 of 5 grades changed" in out


# The store


def test_revising_replaces_whole_rows_at_once(data, tmp_path):
    cell = add_cell(tmp_path / "results", data)
    rows = cell.rows()
    cell.revise([{**rows[2], "score": 0.5}], {"score": 0.1}, {"why": "test"})
    assert [row["sample_id"] for row in cell.rows()] == [row["sample_id"] for row in rows]
    assert cell.rows()[2]["score"] == 0.5 and cell.rows()[1] == rows[1]
    assert cell.manifest["revisions"][0]["why"] == "test" and cell.manifest["summary"]["score"] == 0.1
    with pytest.raises(KeyError, match="no sample"):
        cell.revise([{**rows[2], "sample_id": "stranger"}], {}, {})


def test_a_write_that_fails_leaves_the_old_rows(data, tmp_path, monkeypatch):
    cell = add_cell(tmp_path / "results", data)
    rows = cell.rows()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flashmem_bench.durable.os.fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        cell.revise([{**rows[2], "score": 0.5}], {}, {})
    monkeypatch.undo()
    assert cell.rows() == rows


def test_rows_without_the_new_column_are_read_as_null(data, tmp_path):
    from flashmem_bench.report.tables import build_tables

    cell = add_cell(tmp_path / "results", data)
    lines = [json.loads(line) for line in (cell.path / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("grader")
    write_jsonl(cell.path / "samples.jsonl", lines)
    assert build_tables(ResultStore(tmp_path / "results"))["samples"]["grader"].isna().all()
