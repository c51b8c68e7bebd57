"""An installed wheel works from an empty folder: suites, weights, memories and thresholds are inside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation nothing is fetched: the build backend is one of the development requirements.
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
        text=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_what_a_run_needs(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "flashmem_bench/_suites/wordmath.yaml",
        "flashmem_bench/_recipes/qwen2.5-1.5b-gsm8k.yaml",
        "flashmem_bench/report/templates/report.html.j2",
    ):
        assert needed in names
    weights = [n for n in names if n.endswith("model.safetensors")]
    assert any("weights/flashmem-tiny/" in n for n in weights)
    assert any("checkpoints/joint/flashmem/" in n for n in weights)
    assert not any(n.startswith(("tests/", "results/")) for n in names)
    assert wheel.stat().st_size < 13_000_000


def test_installed_wheel_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Unpacked outside of the checkout, with the packages of this environment around it."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    empty = tmp_path / "empty"
    empty.mkdir()
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from flashmem_bench.cli import main; main()"
    command = "run --suite hops --method vanilla,flashmem --limit 2 --quiet".split()
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(site), *command],
        cwd=empty,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((empty / "results" / "runs" / "hops").glob("*/*/samples.jsonl"))) == 2


@pytest.mark.slow
def test_wheel_in_a_new_environment(wheel: Path, tmp_path: Path) -> None:
    """A stranger's `pip install`: everything that it needs comes along."""
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    pins = (ROOT / "constraints.txt").read_text()
    (torch,) = [line for line in pins.splitlines() if line.startswith("torch==")]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    done = subprocess.run(
        [str(python.parent / "flashmem-bench"), *"run --suite wordmath --method flashmem --limit 2 --json".split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
