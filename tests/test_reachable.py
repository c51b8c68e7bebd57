"""`list suites`: rows, licences, sources and what is reachable, read from files alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from flashmem_bench.cli import run as command
from flashmem_bench.errors import DataError
from flashmem_bench.reachable import reach
from flashmem_bench.suites import find_suite, list_suites
from tests.test_suites import gsm8k_row, write_jsonl

COLUMNS = ["suite", "kind", "rows", "licence", "source", "reachable", "what"]


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data folder, and a cache of our own."""
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


def listed(capsys, *options: str) -> dict[str, dict]:
    assert command(["list", "suites", "--json", *options]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(list(row) == COLUMNS for row in rows)
    return {row["suite"]: row for row in rows}


def cached(tmp_path, config: str, rows: int) -> None:
    """Leave the notes that `datasets` leaves in its cache."""
    folder = tmp_path / "home/datasets/openai___gsm8k" / config / "0.0.0/abc"
    folder.mkdir(parents=True)
    notes = {"splits": {"test": {"name": "test", "num_examples": rows}}}
    (folder / "dataset_info.json").write_text(json.dumps(notes))


def test_every_suite_says_where_its_rows_are(capsys, tmp_path):
    found = listed(capsys)
    assert list(found) == [info.name for info in list_suites()]
    assert found["hops"]["rows"] == 2000 and found["hops"]["reachable"] == "yes: generated here"
    for row in found.values():
        assert row["licence"] and row["source"] and row["reachable"].startswith(("yes: ", "no: "))
    assert found["gsm8k"]["reachable"] == (
        "no: put gsm8k/test.jsonl[.gz] into a folder and name it with --data-dir, or use the hub"
    )
    # Its copy on the hub is a script, which nothing runs any more.
    assert found["babi"]["reachable"].endswith("--data-dir")


def test_rows_of_a_data_folder_are_counted_packed_or_not(capsys, tmp_path):
    data = tmp_path / "data"
    write_jsonl(data / "gsm8k/test.jsonl", [gsm8k_row(1), "", gsm8k_row(2)])
    write_jsonl(data / "babi/en_test.jsonl.gz", [{}] * 5)
    found = listed(capsys, "--data-dir", str(data))
    assert (found["gsm8k"]["rows"], found["gsm8k"]["reachable"]) == (2, "yes: data folder")
    assert (found["babi"]["rows"], found["babi"]["source"]) == (5, "facebook/babi_qa")
    (data / "babi/en_test.jsonl.gz").write_bytes(b"damaged")
    assert listed(capsys, "--data-dir", str(data))["babi"]["rows"] is None


def test_the_cache_of_datasets_counts_and_a_folder_without_the_file_stands_before_it(tmp_path):
    info = find_suite("gsm8k")
    cached(tmp_path, "socratic", 9)
    assert reach(info).rows is None
    cached(tmp_path, "main", 7)
    assert (reach(info).rows, reach(info).reachable) == (7, "yes: datasets cache")
    (tmp_path / "data/gsm8k").mkdir(parents=True)
    assert reach(info, tmp_path / "data").reachable.startswith("no: put gsm8k/test")


def test_a_data_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    with pytest.raises(DataError, match="does not exist; check --data-dir"):
        reach(find_suite("gsm8k"), tmp_path / "none")
    assert command(["list", "suites", "--data-dir", str(tmp_path / "none")]) == 1


def test_the_table_needs_no_heavy_import():
    code = (
        "import sys; from flashmem_bench.cli import run; code = run(['list', 'suites']);"
        "print(code, {'torch', 'lm_eval', 'datasets', 'pandas', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 set()" and "reachable" in done.stdout
