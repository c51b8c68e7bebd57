"""Right answers graded as if a model had written them: all of them where rows are sound, the broken one named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashmem_bench.cli import run as command

SUITE = """
task: my_sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 16}
metadata:
  version: 1.0
  flashmem: {grader: numbers, extractor: marked-number}
"""


def _suite(folder: Path, golds: list[str]) -> Path:
    rows = [{"question": f"{n} + 1?", "answer": f"So\n#### {n + 1}", "gold": gold} for n, gold in enumerate(golds)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(SUITE)
    return folder / "sums.yaml"


def test_sound_rows_are_all_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["doctor", "--gold", str(_suite(tmp_path, ["1", "2", "3"])), "--gold", "hops", "--limit", "5"]) == 0
    printed = capsys.readouterr().out
    assert "sums: 3 of 3 right answers" in printed and "hops: 20 of 20 right answers" in printed


def test_a_broken_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["doctor", "--gold", str(_suite(tmp_path, ["1", "5", "3"])), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["right"], found["samples"]) == (2, 3)
    assert len(found["refused"]) == 1 and "00001" in found["refused"][0]


def test_programs_are_not_run_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["doctor", "--gold", "humaneval"]) == 2
    assert "--allow-code-execution" in capsys.readouterr().err
