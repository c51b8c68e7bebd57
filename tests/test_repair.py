"""What a disk broke is named, left out of a report with a warning, put aside by `verify --repair`, and made anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmem_bench.cli import run as command
from flashmem_bench.errors import StoreError
from flashmem_bench.lines import encode, scan
from flashmem_bench.quarantine import QUARANTINE
from flashmem_bench.report.cells import load_cells
from flashmem_bench.store import ResultStore
from flashmem_bench.verification import verify
from tests.synthetic_results import make_results


@pytest.fixture
def results(tmp_path: Path) -> Path:
    make_results(tmp_path, suites=["hops"], methods=["vanilla", "flashmem"], n=10)
    return tmp_path


def folder_of(results: Path, method: str) -> Path:
    (path,) = results.glob(f"runs/hops/{method}/*")
    return path


def flip(path: Path, line: int) -> bytes:
    """Flip one bit inside a text of a line, which stays JSON; returns the line as it is now."""
    lines = path.read_bytes().splitlines(keepends=True)
    place = lines[line - 1].index(b"hops") + 2
    lines[line - 1] = lines[line - 1][:place] + bytes([lines[line - 1][place] ^ 1]) + lines[line - 1][place + 1 :]
    json.loads(lines[line - 1])
    path.write_bytes(b"".join(lines))
    return lines[line - 1].rstrip(b"\n")


@pytest.mark.parametrize("name", ["samples.jsonl", "texts.jsonl"])
def test_a_flipped_bit_is_named_put_aside_and_its_sample_made_anew(
    results: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(results, "flashmem")
    damaged = flip(folder / name, 4)
    assert command(["verify", "--results-dir", str(results)]) == 1
    assert f"{name}: line 4 is broken; flashmem-bench verify --repair puts it aside" in capsys.readouterr().out
    assert command(["verify", "--repair", "--results-dir", str(results)]) == 0
    out = capsys.readouterr().out
    assert f"{name}: 1 broken lines put aside" in out and "run the commands that made these cells again" in out
    (kept,) = [json.loads(line) for line in (folder / QUARANTINE).read_text().splitlines()]
    assert (kept["file"], kept["line"], kept["latin1"].encode("latin-1")) == (name, 4, damaged)
    (cell,) = [cell for cell in ResultStore(results).cells() if cell.get("method") == "flashmem"]
    assert len(cell.rows()) == 9 and "hops-test-00003" not in cell.done()
    assert command(["verify", "--repair", "--results-dir", str(results)]) == 0
    assert "put aside" not in capsys.readouterr().out, "there is nothing left to do"


def test_a_writer_puts_a_damaged_last_line_aside_too(results: Path) -> None:
    folder = folder_of(results, "flashmem")
    damaged = flip(folder / "samples.jsonl", 10)
    (cell,) = [cell for cell in ResultStore(results).cells() if cell.get("method") == "flashmem"]
    assert len(cell.rows()) == 9
    assert any("ends in 1 broken lines" in problem.what for problem in verify(results)[1])
    cell.append({"sample_id": "hops-test-00009", "index": 9}, {})
    cell.close()
    assert json.loads((folder / QUARANTINE).read_text())["latin1"].encode("latin-1") == damaged
    assert len(cell.rows()) == 10 and not scan(folder / "samples.jsonl").broken


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00" * 40, '{"a": 1'])
def test_a_broken_manifest_costs_its_cell_and_no_other(
    results: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(results, "flashmem")
    identity = json.loads((folder / "manifest.json").read_text())["identity"]
    (folder / "manifest.json").write_text(content)
    warnings: list[str] = []
    assert len(load_cells(ResultStore(results), problems=warnings)) == 1
    assert str(folder / "manifest.json") in warnings[0] and "verify --repair" in warnings[0]
    assert command(["list", "runs", "--results-dir", str(results)]) == 0
    assert "broken, see flashmem-bench verify" in capsys.readouterr().out
    with pytest.raises(StoreError, match=r"manifest\.json.*put it aside with flashmem-bench verify --repair, then run"):
        ResultStore(results).open_cell(identity, {"suite": "hops", "method": "flashmem"})
    assert command(["verify", "--repair", "--results-dir", str(results)]) == 1
    out = capsys.readouterr().out
    assert "put aside as manifest.broken-1" in out and "manifest.json is missing; the command that made" in out
    assert (folder / "manifest.broken-1").read_text() == content
    cell = ResultStore(results).open_cell(identity, {"suite": "hops", "method": "flashmem"})
    assert len(cell.rows()) == 10, "its rows go on"
    assert cell.begin_attempt({}) == 2, "and their attempt keeps its number"
    cell.finish({})
    assert len(load_cells(ResultStore(results))) == 2


def test_a_report_is_made_of_the_others_and_says_what_it_lacks(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder_of(results, "flashmem") / "manifest.json"
    path.write_text("{")
    assert command(["report", "--results-dir", str(results)]) == 0
    assert f"a cell is left out: cannot read {path}" in capsys.readouterr().err.replace("\n", " ")
    assert "a cell is left out" in (results / "report.html").read_text()


def test_only_broken_cells_still_say_what_to_do(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("vanilla", "flashmem"):
        flip(folder_of(results, method) / "samples.jsonl", 1)
    assert command(["report", "--results-dir", str(results)]) == 1
    err = capsys.readouterr().err
    assert "line 1 of" in err and "verify --repair" in err and len(err.strip().splitlines()) == 1


def test_repair_of_one_cell_leaves_the_others(results: Path) -> None:
    for method in ("vanilla", "flashmem"):
        flip(folder_of(results, method) / "samples.jsonl", 2)
    folder = folder_of(results, "vanilla")
    command(["verify", folder.name[:8], "--repair", "--results-dir", str(results)])
    assert (folder / QUARANTINE).exists() and not (folder_of(results, "flashmem") / QUARANTINE).exists()


def test_a_cell_that_is_being_written_is_not_repaired(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.test_lease import end, holder

    folder = folder_of(results, "vanilla")
    flip(folder / "samples.jsonl", 2)
    writer = holder(folder)
    assert command(["verify", "--repair", "--results-dir", str(results)]) == 1
    assert "another process is writing hops x vanilla" in capsys.readouterr().err
    end(writer)


def test_a_row_that_was_changed_by_hand_is_noticed(results: Path) -> None:
    path = folder_of(results, "vanilla") / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    first: dict[str, Any] = json.loads(lines[0])
    lines[0] = lines[0].replace(f'"score": {first["score"]}', f'"score": {1 - first["score"]}')
    path.write_text("".join(lines))
    assert any("line 1 is broken" in problem.what for problem in verify(results)[1])
    assert encode(first) != lines[0].encode()
