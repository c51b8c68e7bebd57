"""A writer is killed fifty times, at seeded moments: nothing that it called durable is lost, nothing wrong is kept."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def check(root: Path, ticked: set[str]) -> tuple[int, int]:
    """How many announced rows are not on the disk, and how many rows there are not what they should be."""
    cells = ResultStore(root).cells()
    if not cells:
        return len(ticked), 0
    (cell,) = cells
    rows, texts = cell.rows(), cell.texts()
    started = {attempt["attempt"] for attempt in cell.manifest["attempts"]}
    return len(ticked - {row["sample_id"] for row in rows}), sum(not is_right(row, texts, started) for row in rows)


def is_right(row: dict[str, Any], texts: dict[str, Any], started: set[int]) -> bool:
    wanted, text = expected(row["index"])
    same = {key: row[key] for key in wanted} == wanted
    return same and texts[row["sample_id"]] == {**text, "sample_id": row["sample_id"]} and row["attempt"] in started


def test_fifty_kills_lose_nothing_and_keep_nothing_wrong(tmp_path: Path, tally: Callable[..., None]) -> None:
    draw = random.Random(8)
    ticked: set[str] = set()
    root, kills, folders, lost, wrong = tmp_path / "0", 0, 0, 0, 0
    while kills < KILLS:
        told, ended, complaint = killed_once(root, draw)
        assert not complaint, "the next process continues at once"
        assert not ticked & set(told), "a sample that was safe is not made again"
        ticked |= set(told)
        missing, false = check(root, ticked)
        lost, wrong = lost + missing, wrong + false
        kills += not ended
        if ended:
            assert len(ResultStore(root).cells()[0].done()) == TOTAL
            assert not list(file_problems(ResultStore(root).cells()[0]))
            folders += 1
            root, ticked = tmp_path / str(folders), set()
    assert folders >= 2, "the kills are spread over the whole of a run"
    tally("SIGKILL of runner and store, stub method", kills, lost, wrong)
