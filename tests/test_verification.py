"""`verify` finds what was changed after it was measured, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from flashmem_bench.cli import run as command
from flashmem_bench.lines import encode
from flashmem_bench.report import build_report
from flashmem_bench.store import ResultStore
from flashmem_bench.verification import row_problems, verify
from tests.synthetic_results import make_results


@pytest.fixture
def results(tmp_path: Path) -> Path:
    make_results(tmp_path, suites=["hops"], methods=["vanilla", "flashmem"], n=12)
    build_report(tmp_path)
    return tmp_path


def change(cell, where: int, **values) -> None:
    path = cell.path / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[where].update(values)
    path.write_bytes(b"".join(encode(row) for row in rows))


def cell_of(results: Path, method: str):
    return next(cell for cell in ResultStore(results).cells() if cell.get("method") == method)


def test_a_folder_as_it_was_written_has_no_problem(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared, problems = verify(results)
    assert not problems and compared > 1000
    assert command(["verify", "--results-dir", str(results)]) == 0
    assert "0 wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"trigger_rate": 0.9}, "trigger_rate is 0.9, its formula gives"),
        ({"decode_ms": 1.0}, "decode_ms is 1.0, its formula gives"),
        ({"tpot_ms": 9.0}, "tpot_ms is 9.0"),
        ({"overhead_share": 0.99}, "overhead_share"),
        ({"score": -1.0}, "score is -1.0"),
        ({"triggers": 99}, "the text has"),
        ({"truncated": True, "finish_reason": "eos"}, "truncated is True"),
        ({"method": "vanilla"}, "in the manifest"),
    ],
)
def test_a_changed_row_is_found(results: Path, values: dict, said: str) -> None:
    change(cell_of(results, "flashmem"), 3, **values)
    _, problems = verify(results, cell_of(results, "flashmem").cell_id[:6])
    assert any(said in problem.what for problem in problems), problems


def test_a_changed_score_is_seen_in_every_table_that_it_is_in(results: Path) -> None:
    cell = cell_of(results, "flashmem")
    change(cell, 5, score=1.0 - cell.rows()[5]["score"])
    tables = {problem.where for problem in verify(results)[1]}
    assert {"tables/samples", "tables/runs", "tables/comparisons", "tables/strata"} <= tables


def test_a_changed_table_is_found(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = results / "tables/runs.parquet"
    table = pd.read_parquet(path, dtype_backend="numpy_nullable")
    table.loc[0, "score"] += 0.05
    table.to_parquet(path)
    assert command(["verify", "--results-dir", str(results)]) == 1
    assert "score differs in 1 rows" in capsys.readouterr().out


def test_a_cell_that_is_not_what_its_id_says_is_found(results: Path) -> None:
    path = cell_of(results, "vanilla").path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(manifest))
    assert any("hashes to" in problem.what for problem in verify(results)[1])


def test_a_missing_text_and_an_unknown_cell(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cell_of(results, "vanilla").path / "texts.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    said = [problem.what for problem in verify(results)[1]]
    assert any("text is missing" in sentence for sentence in said) or any("rows on disk" in s for s in said)
    assert command(["verify", "ffffffff", "--results-dir", str(results)]) == 1
    assert "list runs" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 16])
def test_the_formula_of_a_token_holds_in_a_batch_too(size: int) -> None:
    row = {"batch_size": size, "e2e_ms": 40.0, "ttft_ms": 10.0, "output_tokens": 4, "tpot_ms": 10.0}
    assert not list(row_problems(row))
    assert "tpot_ms is 2.0" in next(row_problems({**row, "tpot_ms": 2.0}))
    assert not list(row_problems({**row, "tpot_ms": 2.0, "drawn_tokens": 32})), "the times of a vote are those of all"


def test_rows_of_a_failed_sample_break_no_formula() -> None:
    assert not list(row_problems({"sample_id": "a", "error": "boom", "triggers": None, "e2e_ms": None}))
