"""Results of version 2 go on as version 3: same cells, same rows, whatever interrupts the change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashmem_bench import migrations
from flashmem_bench.errors import StoreError
from flashmem_bench.lines import encode
from flashmem_bench.repair import file_problems
from flashmem_bench.report.tables import build_tables
from flashmem_bench.schema import ANSWER_VERSION, SCHEMA_VERSION
from flashmem_bench.store import ResultStore
from tests.synthetic_results import make_results

NEW = ("timing_valid", "workers", "worker", "crc")


def downgrade(root: Path) -> None:
    """Make results look as version 2 wrote them."""
    for path in root.glob("runs/*/*/*/*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        old = [{key: value for key, value in row.items() if key not in NEW} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in old))
    for path in [*root.glob("runs/*/*/*/manifest.json"), root / "SCHEMA.json"]:
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}, indent=2))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    make_results(tmp_path, suites=["hops"], methods=["vanilla", "flashmem", "flashmem-literal"], n=8)
    downgrade(tmp_path)
    return tmp_path


def content(root: Path) -> dict[str, Any]:
    return {cell.cell_id: (cell.rows(), cell.texts()) for cell in ResultStore(root).cells()}


def check(root: Path) -> None:
    cells = ResultStore(root).cells()
    assert len(cells) == 3
    for cell in cells:
        assert cell.manifest["schema_version"] == SCHEMA_VERSION
        assert len(cell.rows()) == len(cell.texts()) == 8 and not list(file_problems(cell))
        assert all(row["timing_valid"] and row["workers"] == 1 and row["worker"] is None for row in cell.rows())
        lines = (cell.path / "samples.jsonl").read_bytes().splitlines()
        assert all(b'"crc"' in line for line in lines)
    assert json.loads((root / "SCHEMA.json").read_text())["schema_version"] == SCHEMA_VERSION


def test_old_results_are_brought_to_this_version_and_keep_their_cells(old: Path) -> None:
    before = {path.parent.name for path in old.glob("runs/*/*/*/manifest.json")}
    check(old)
    assert {cell.cell_id for cell in ResultStore(old).cells()} == before
    assert build_tables(ResultStore(old))["runs"]["timed_samples"].tolist() == [8, 8, 8]


def test_a_second_look_changes_nothing(old: Path) -> None:
    check(old)
    files = {path: path.read_bytes() for path in old.rglob("*.json*") if path.is_file()}
    check(old)
    assert files == {path: path.read_bytes() for path in old.rglob("*.json*") if path.is_file()}


def test_a_kill_before_any_step_leaves_a_folder_that_goes_on(
    old: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from flashmem_bench.store import ResultStore
left = int(sys.argv[2])
def counted(original):
    def call(*arguments, **more):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **more)
    return call
os.fsync, os.rename, os.replace = counted(os.fsync), counted(os.rename), counted(os.replace)
ResultStore(Path(sys.argv[1]))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for step in range(0, 40, 3):
        root = tmp_path_factory.mktemp("old") / "results"
        shutil.copytree(old, root)
        done = subprocess.run([sys.executable, "-c", script, str(root), str(step)], env=env, capture_output=True)
        check(root)
        if done.returncode == 0:
            break
    assert step > 15 and done.returncode == 0, "every step was tried"


def test_rows_that_came_between_two_tries_are_kept(old: Path) -> None:
    """An old process that was still running adds a line without a checksum to a cell that was migrated already."""
    cell = ResultStore(old).cells()[0]
    with (cell.path / "texts.jsonl").open("a") as texts, (cell.path / "samples.jsonl").open("a") as samples:
        texts.write('{"text": "late", "sample_id": "late"}\n')
        samples.write('{"sample_id": "late", "index": 99, "score": 1.0}\n')
    assert "late" in ResultStore(old).cells()[0].done()


def test_broken_and_torn_lines_are_left_for_verify_to_name(old: Path) -> None:
    path = next(old.glob("runs/*/vanilla/*/samples.jsonl"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"{broken\n", *lines[3:]]) + b'{"sample_id": "to')
    cell = next(cell for cell in ResultStore(old).cells() if cell.get("method") == "vanilla")
    said = [problem.what for problem in file_problems(cell)]
    assert len(said) == 2 and "line 4 is broken" in said[0] and "ends in 1 broken lines" in said[1]


def test_a_cell_whose_manifest_is_broken_is_migrated_all_the_same(old: Path) -> None:
    path = next(old.glob("runs/*/vanilla/*/manifest.json"))
    path.write_text("{")
    ResultStore(old)
    assert b'"timing_valid": true' in (path.parent / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("version", [1, 0, -1, SCHEMA_VERSION + 1, 99, "2", None, 2.5, [2], True])
def test_a_version_without_a_way_to_this_one_is_refused(old: Path, version: object) -> None:
    (old / "SCHEMA.json").write_text(json.dumps({"schema_version": version}))
    before = {path: path.read_bytes() for path in old.rglob("*.jsonl")}
    with pytest.raises(StoreError, match=r"has schema version .*, this program writes 3; choose another"):
        ResultStore(old)
    assert before == {path: path.read_bytes() for path in old.rglob("*.jsonl")}


def test_while_an_earlier_version_writes_nothing_is_changed(old: Path) -> None:
    lock = next(old.glob("runs/*/vanilla/*")) / ".lock"
    script = (
        "import fcntl, sys; handle = open(sys.argv[1], 'ab'); fcntl.lockf(handle, fcntl.LOCK_EX); print(flush=True); "
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        with pytest.raises(StoreError, match="an earlier version of flashmem-bench is writing"):
            ResultStore(old)
        writer.communicate()
    check(old)
    assert not lock.exists()


def test_two_processes_do_not_migrate_at_once(old: Path) -> None:
    from tests.test_lease import end, holder

    first = holder(old)
    with pytest.raises(StoreError, match=r"another process is bringing .* to the version of this program"):
        ResultStore(old)
    end(first)
    check(old)


def test_a_full_disk_half_way_leaves_a_folder_that_goes_on(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, left = migrations.replace, 2

    def full(path: Path, new: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        replace(path, new)

    monkeypatch.setattr(migrations, "replace", full)
    with pytest.raises(StoreError, match=r"No space left on device.*make room and run the same command again"):
        ResultStore(old)
    monkeypatch.undo()
    check(old)


def test_a_step_is_the_same_once_and_twice() -> None:
    row = {"sample_id": "a", "timing_valid": False, "workers": 4, "worker": 2}
    step = migrations.STEPS[2]
    assert step(row) == row and step(step({"sample_id": "a"})) == step({"sample_id": "a"})
    assert encode(step({"sample_id": "a"}))
    assert set(migrations.STEPS) == set(range(2, SCHEMA_VERSION))


def test_the_same_command_goes_on_with_cells_of_the_earlier_version(bench: Any, tmp_path: Path) -> None:
    root = bench.results(tmp_path / "results")
    (first,) = bench.run(root, "wordmath", "vanilla", limit=2)
    assert ResultStore(root).cells()[0].manifest["identity"]["schema"] == ANSWER_VERSION == 2
    downgrade(root)
    (again,) = bench.run(root, "wordmath", "vanilla", limit=3)
    assert again.cell == first.cell and again.new_samples == 1 and len(again.rows) == 3
