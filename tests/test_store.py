"""The results folder survives kills, torn lines, foreign schemas and hostile names."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmem_bench.cell_store import CellStore
from flashmem_bench.errors import StoreError
from flashmem_bench.schema import (
    SAMPLE_COLUMNS,
    SCHEMA_VERSION,
    TABLES,
    arrow_schema,
    blank_sample,
    column_names,
)
from flashmem_bench.store import ResultStore, cell_id, safe_name

IDENTITY = {"suite": "wordmath", "method": "vanilla", "seed": 0, "settings": {"trigger.kind": "never"}}
DESCR = {"suite": "wordmath", "method": "vanilla", "model": "flashmem-tiny"}

WRITER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from flashmem_bench.store import ResultStore

    root, total, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    cell = ResultStore(root).open_cell({"suite": "s", "method": "m"}, {"suite": "s", "method": "m"})
    cell.begin_attempt({})
    done = cell.done()
    for index in range(total):
        name = f"s-{index:03d}"
        if name in done:
            continue
        cell.append({"sample_id": name, "index": index, "score": float(index % 2)}, {"text": "x" * 5000})
        print(index, flush=True)
        time.sleep(pause)
    cell.finish({"n": total})
    """
)


def open_cell(root: Path) -> CellStore:
    return ResultStore(root).open_cell(IDENTITY, DESCR)


def add(cell: CellStore, *indices: int) -> None:
    for index in indices:
        cell.append({"sample_id": f"id-{index}", "index": index, "score": 1.0}, {"text": f"text {index}"})


def writer(root: Path, total: int, pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(root), str(total), str(pause)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def the_cell(root: Path) -> CellStore:
    (cell,) = ResultStore(root).cells()
    return cell


def test_rows_and_texts_come_back_as_written(tmp_path: Path) -> None:
    cell = open_cell(tmp_path)
    row = {"sample_id": "a", "index": 0, "score": 0.5, "error": None, "truncated": True, "stratum": "k=1"}
    cell.append(row, {"text": "line\nbreak \u2028 \u00e9", "tokens": ["a", " b"], "entropies": [0.5, 1.5]})
    again = the_cell(tmp_path)
    assert again.rows() == [row]
    assert again.texts()["a"] == {
        "sample_id": "a",
        "text": "line\nbreak \u2028 \u00e9",
        "tokens": ["a", " b"],
        "entropies": [0.5, 1.5],
    }
    assert again.done() == {"a"}


@pytest.mark.parametrize("kill_after", [5, 11])
def test_killed_writer_continues_to_the_same_table(tmp_path: Path, kill_after: int) -> None:
    process = writer(tmp_path / "killed", 16, pause=0.02)
    assert process.stdout is not None
    for _ in range(kill_after):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    survived = len(the_cell(tmp_path / "killed").rows())
    assert kill_after <= survived < 16
    assert writer(tmp_path / "killed", 16).wait() == 0
    assert writer(tmp_path / "calm", 16).wait() == 0
    killed, calm = the_cell(tmp_path / "killed"), the_cell(tmp_path / "calm")
    assert killed.rows() == calm.rows()
    assert killed.texts() == calm.texts()
    assert len((killed.path / "samples.jsonl").read_text().splitlines()) == 16
    assert [attempt["attempt"] for attempt in killed.manifest["attempts"]] == [1, 2]
    assert "finished_at" not in killed.manifest["attempts"][0]


@pytest.mark.parametrize("name", ["samples.jsonl", "texts.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "no newline", "zeros"])
def test_torn_last_line_is_dropped_and_redone(tmp_path: Path, name: str, damage: str) -> None:
    cell = open_cell(tmp_path)
    add(cell, 0, 1, 2)
    cell.close()
    path = cell.path / name
    data = path.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    path.write_bytes(
        {
            "cut": data[:-9],
            "no newline": data[:-1],
            "zeros": data[:start] + bytes(len(data) - start - 1) + b"\n",
        }[damage]
    )
    again = the_cell(tmp_path)
    assert again.done() == {"id-0", "id-1"}
    assert path.read_bytes() != data, "reading alone must not repair a file that another process may be writing"
    add(again, 2, 3)
    rows = the_cell(tmp_path).rows()
    assert [row["sample_id"] for row in rows] == ["id-0", "id-1", "id-2", "id-3"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_text_without_its_row_is_not_done(tmp_path: Path) -> None:
    cell = open_cell(tmp_path)
    add(cell, 0)
    with (cell.path / "texts.jsonl").open("a") as handle:
        handle.write('{"sample_id": "id-1", "text": "old"}\n')
    assert cell.done() == {"id-0"}
    add(cell, 1)
    assert cell.texts()["id-1"]["text"] == "text 1"


def test_repeated_sample_counts_once_with_its_last_row(tmp_path: Path) -> None:
    cell = open_cell(tmp_path)
    add(cell, 0, 1)
    cell.append({"sample_id": "id-0", "index": 0, "score": 0.0}, {"text": "again"})
    assert [(row["sample_id"], row["score"]) for row in cell.rows()] == [("id-0", 0.0), ("id-1", 1.0)]


def test_broken_line_in_the_middle_is_reported_with_its_number(tmp_path: Path) -> None:
    cell = open_cell(tmp_path)
    add(cell, 0, 1, 2)
    lines = (cell.path / "samples.jsonl").read_text().splitlines(keepends=True)
    (cell.path / "samples.jsonl").write_text(lines[0] + "{oops\n" + lines[2])
    with pytest.raises(StoreError, match=r"line 2 of .*samples\.jsonl is broken"):
        cell.rows()


def test_same_identity_same_cell_whatever_the_key_order(tmp_path: Path) -> None:
    first = open_cell(tmp_path)
    second = ResultStore(tmp_path).open_cell(dict(reversed(IDENTITY.items())), DESCR)
    other = ResultStore(tmp_path).open_cell({**IDENTITY, "seed": 1}, DESCR)
    assert first.cell_id == second.cell_id == cell_id(IDENTITY)
    assert other.cell_id != first.cell_id
    assert len(first.cell_id) == 16


def test_ablation_marks_are_joined_and_a_direct_run_is_remembered(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    mark = {"axis": "cooldown", "value": 8, "reference": False}
    cell = store.open_cell(IDENTITY, {**DESCR, "ablation": [mark]})
    assert cell.manifest["direct"] is False
    store.open_cell(IDENTITY, {**DESCR, "ablation": [mark, {**mark, "axis": "sinks"}]})
    assert [entry["axis"] for entry in cell.manifest["descr"]["ablation"]] == ["cooldown", "sinks"]
    store.open_cell(IDENTITY, DESCR)
    assert cell.manifest["direct"] is True
    assert len(cell.manifest["descr"]["ablation"]) == 2


def test_attempts_and_summary_are_kept(tmp_path: Path) -> None:
    cell = open_cell(tmp_path)
    assert cell.begin_attempt({"cpu": "x"}) == 1
    cell.finish({"why_equal": "no trigger"})
    assert cell.begin_attempt({}) == 2
    manifest = the_cell(tmp_path).manifest
    assert manifest["summary"] == {"why_equal": "no trigger"}
    assert manifest["attempts"][0]["cpu"] == "x"
    assert "finished_at" in manifest["attempts"][0]
    assert "finished_at" not in manifest["attempts"][1]
    assert not list(cell.path.glob("*.tmp"))


def test_find_by_description_and_identity(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    cell = open_cell(tmp_path)
    assert [found.cell_id for found in store.find(suite="wordmath", seed=0)] == [cell.cell_id]
    assert store.find(suite="wordmath", seed=1) == []


def test_foreign_schema_is_refused_in_one_sentence(tmp_path: Path) -> None:
    ResultStore(tmp_path)
    (tmp_path / "SCHEMA.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(StoreError, match=f"has schema version {SCHEMA_VERSION + 1}"):
        ResultStore(tmp_path)
    (tmp_path / "SCHEMA.json").write_text("not json")
    with pytest.raises(StoreError, match=r"SCHEMA\.json"):
        ResultStore(tmp_path)


@pytest.mark.parametrize("where", ["file", "below a file", "proc"])
def test_folder_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    root = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "r",
        "proc": Path("/proc/results"),
    }[where]
    with pytest.raises(StoreError, match="cannot write to the results folder") as caught:
        ResultStore(root)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot write to the results folder"):
        ResultStore(tmp_path)


def test_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        from flashmem_bench.errors import StoreError
        from flashmem_bench.store import ResultStore

        cell = ResultStore(Path(sys.argv[1])).open_cell({"suite": "s", "method": "m"}, {})
        cell.append({"sample_id": "a"}, {"text": "short"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        try:
            cell.append({"sample_id": "b"}, {"text": "x" * 1000})
        except StoreError as error:
            print(error)
        print(sorted(cell.done()))
        """
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=env, check=True
    )
    assert "cannot write" in result.stdout
    assert "['a']" in result.stdout
    assert (the_cell(tmp_path).path / "texts.jsonl").read_text().endswith("}\n")


def test_two_processes_cannot_write_one_cell(tmp_path: Path) -> None:
    process = writer(tmp_path, 4, pause=5.0)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        cell = the_cell(tmp_path)
        with pytest.raises(StoreError, match="another process is writing"):
            cell.begin_attempt({})
        assert len(cell.rows()) == 1
    finally:
        process.kill()
        process.wait()
    assert cell.begin_attempt({}) == 2


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "../../etc",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "lm-eval/arc",
        "x\x00y",
        ".hidden",
        "\u00e9" * 300,
    ],
)
def test_no_name_leaves_the_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "results"
    cell = ResultStore(root).open_cell({"suite": name, "method": name}, {"suite": name, "method": name})
    add(cell, 0)
    assert cell.path.resolve().parent.parent.parent == (root / "runs").resolve()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]
    assert ResultStore(root).find(suite=name)[0].done() == {"id-0"}


@given(st.text(), st.text())
def test_safe_names_are_one_component_and_distinct(first: str, second: str) -> None:
    for name in (first, second):
        safe = safe_name(name)
        assert safe not in ("", ".", "..")
        assert not set(safe) & set("/\\\x00")
        assert len(safe) < 100
    assert first == second or safe_name(first) != safe_name(second)


def test_missing_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="names of its suite and its method"):
        ResultStore(tmp_path).open_cell({"seed": 0}, {"method": "vanilla"})


def test_only_plain_values_reach_json(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    cell = open_cell(tmp_path)
    with pytest.raises(TypeError, match="triggers holds a int64"):
        cell.append({"sample_id": "a", "triggers": numpy.int64(3)}, {})
    with pytest.raises(TypeError):
        cell.append({"sample_id": "a"}, {"entropies": [numpy.float32(1.0)]})
    assert cell.rows() == []
    cell.append({"sample_id": "a", "tpot_ms": math.nan}, {"entropies": [math.inf], "text": "\ud800"})
    assert cell.rows() == [{"sample_id": "a", "tpot_ms": None}]
    assert cell.texts()["a"]["entropies"] == [None]


def test_store_and_schema_import_no_heavy_module() -> None:
    code = (
        "import sys, flashmem_bench.store, flashmem_bench.schema\n"
        "print([m for m in ('torch', 'pandas', 'numpy', 'pyarrow', 'transformers') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert result.stdout.strip() == "[]"


def test_appending_is_fast_enough(tmp_path: Path) -> None:
    cell = open_cell(tmp_path)
    began = time.perf_counter()
    add(cell, *range(50))
    assert (time.perf_counter() - began) / 50 < 0.05


def test_schema_is_consistent() -> None:
    for name, columns in TABLES.items():
        names = column_names(columns)
        assert len(names) == len(set(names)), name
        assert all(column.description.endswith(".") for column in columns), name
        assert arrow_schema(columns).names == names
    assert list(blank_sample()) == column_names(SAMPLE_COLUMNS)
    for column in SAMPLE_COLUMNS:
        for suffix, unit in (("_ms", "ms"), ("_bytes", "bytes"), ("_rate", "share")):
            assert not column.name.endswith(suffix) or column.unit == unit, column.name
