"""A writer is killed fifty times, at seeded moments: nothing that it called durable is lost, nothing wrong is kept."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from flashmem_bench.repair import file_problems
from flashmem_bench.store import ResultStore
from tests.store_victim import expected

KILLS = 50
TOTAL = 60


def victim(root: Path, kind: str, at: int) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "tests.store_victim", str(root), str(TOTAL), kind, str(at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def killed_once(root: Path, draw: random.Random) -> tuple[list[str], bool, str]:
    """Start a writer and let it die; returns what it called durable, whether it came to its end, and its complaint."""
    kind = draw.choice(["bytes", "bytes", "operation", "line"])
    at = {"bytes": draw.randrange(25_000), "operation": draw.randrange(40), "line": draw.randrange(1, 12)}[kind]
    process = victim(root, "never" if kind == "line" else kind, at)
    assert process.stdout is not None and process.stderr is not None
    seen = []
    if kind == "line":
        for _ in range(at):
            seen.append(process.stdout.readline())
        process.kill()
    rest, errors = process.communicate()
    told = [line for line in ("".join(seen) + rest).splitlines(keepends=True) if line.endswith("\n")]
    names = [line.strip() for line in told]
    return [name for name in names if name != "end"], "end" in names, errors


def check(root: Path, ticked: set[str]) -> None:
    """Whatever is on the disk is right, and everything that was announced is there."""
    cells = ResultStore(root).cells()
    if not cells:
        assert not ticked
        return
    (cell,) = cells
    rows, texts = cell.rows(), cell.texts()
    assert ticked <= {row["sample_id"] for row in rows}
    started = {attempt["attempt"] for attempt in cell.manifest["attempts"]}
    for row in rows:
        right, text = expected(row["index"])
        assert {key: row[key] for key in right} == right
        assert texts[row["sample_id"]] == {**text, "sample_id": row["sample_id"]}
        assert row["attempt"] in started


def test_fifty_kills_lose_nothing_and_keep_nothing_wrong(tmp_path: Path) -> None:
    draw = random.Random(8)
    ticked: set[str] = set()
    root, kills, folders = tmp_path / "0", 0, 0
    while kills < KILLS:
        told, ended, complaint = killed_once(root, draw)
        assert not complaint, "the next process continues at once"
        assert not ticked & set(told), "a sample that was safe is not made again"
        ticked |= set(told)
        check(root, ticked)
        kills += not ended
        if ended:
            assert len(ResultStore(root).cells()[0].done()) == TOTAL
            assert not list(file_problems(ResultStore(root).cells()[0]))
            folders += 1
            root, ticked = tmp_path / str(folders), set()
    assert folders >= 2, "the kills are spread over the whole of a run"
