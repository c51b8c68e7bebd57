"""Whose curves the report shows: each training once, also where a results folder was copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

from flashmem_bench.report.training import training_records


def _trained(folder: Path) -> Path:
    folder.mkdir(parents=True)
    facts = {"suites": ["hops"], "method": "flashmem", "train_seed": 0, "best_step": 2}
    (folder / "config.json").write_text(json.dumps({"metadata": facts, "backbone": {"name": "tiny"}}))
    (folder / "curves.csv").write_text("step,loss\n1,2.0\n2,1.5\n")
    return folder


def _cell(checkpoint: Path) -> SimpleNamespace:
    return SimpleNamespace(manifest={"descr": {"checkpoint": str(checkpoint)}})


def test_a_copied_results_folder_shows_its_trainings_once(tmp_path: Path) -> None:
    first = tmp_path / "first"
    cell = _cell(_trained(first / "checkpoints" / "tiny" / "hops" / "flashmem" / "seed0"))
    shutil.copytree(first, tmp_path / "second")
    before, after = training_records([cell], first), training_records([cell], tmp_path / "second")
    assert [record["step"] for record in before] == [1, 2]
    assert after == before


def test_a_memory_from_elsewhere_is_shown_too(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    cell = _cell(_trained(tmp_path / "memories" / "hops" / "flashmem" / "seed0"))
    (first, second) = training_records([cell], tmp_path / "results")
    assert first["checkpoint"] == "memories/hops/flashmem/seed0" and second["loss"] == 1.5
