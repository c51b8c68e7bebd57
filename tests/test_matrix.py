"""The full matrix on the bundled backbone: every method on every suite that it knows, three samples each."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashmem_bench.cli import run as run_command
from flashmem_bench.registry import method_names
from flashmem_bench.store import ResultStore
from tests.bench_fixtures import SUITES, write_data

SAMPLES = 3


@pytest.mark.slow
def test_every_method_runs_on_every_suite(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # flashmem-plus has a bundled memory for hops alone, where it was chosen.
    suites, methods = list(SUITES), [m for m in method_names() if m != "flashmem-plus"]
    data = write_data(tmp_path / "data")
    arguments = ["run", "--suite", ",".join(suites), "--method", ",".join(methods), "--limit", str(SAMPLES)]
    where = ["--data-dir", str(data), "--results-dir", str(tmp_path / "results"), "--quiet"]
    assert run_command([*arguments, *where]) == 0, capfd.readouterr().err
    cells = {
        (c.manifest["descr"]["suite"], c.manifest["descr"]["method"]): c
        for c in ResultStore(tmp_path / "results").cells()
    }
    assert set(cells) == {(suite, method) for suite in suites for method in methods}
    for (suite, method), cell in cells.items():
        rows, texts = cell.rows(), cell.texts()
        assert len(rows) == SAMPLES and not any(row["error"] for row in rows), (suite, method)
        once = [row["prompt_tokens"] + row["output_tokens"] - 1 + row["latent_tokens"] for row in rows]
        more = method in ("memgen", "cot-sc")
        assert all(row["positions_encoded"] >= n for row, n in zip(rows, once, strict=True))
        assert more or all(row["positions_encoded"] == n for row, n in zip(rows, once, strict=True))
        plain = cells[suite, "vanilla"].texts()
        same = all(texts[row["sample_id"]]["text"] == plain[row["sample_id"]]["text"] for row in rows)
        if same and method != "vanilla":
            assert cell.manifest["summary"]["why_equal"], (suite, method)
