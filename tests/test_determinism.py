"""Token agreement: counted right, and perfect for a float32 CPU backbone that is asked twice."""

from __future__ import annotations

import json

import pytest

from flashmem_bench.cli import run as command
from flashmem_bench.determinism import compare


def test_answers_are_compared_token_for_token() -> None:
    found = compare("x", [[1, 2, 3], [4, 5], [6]], [[1, 2, 3], [4, 9], [6, 7]])
    assert (found.same, found.answers, found.first_difference) == (1, 3, 1)
    assert compare("x", [[1]], [[1]]).first_difference is None


def test_the_bundled_backbone_repeats_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["doctor", "--determinism", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [entry["what"].partition(":")[0] for entry in found] == ["plain", "plain", "with memory", "with memory"]
    assert all(entry["same"] == entry["answers"] == 16 for entry in found if "twice" in entry["what"])
    assert command(["doctor", "--determinism", "--device", "cpu"]) == 0
    assert "of 16 answers are equal token for token" in capsys.readouterr().out
