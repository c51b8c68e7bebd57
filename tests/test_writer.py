"""Rows are announced when the disk has them, in the thread that puts them in, and never when it has not."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from flashmem_bench.cell_store import CellStore
from flashmem_bench.errors import StoreError
from flashmem_bench.store import ResultStore
from flashmem_bench.writer import ROOM, RowWriter

Row = dict[str, Any]


class SlowCell:
    """A cell whose disk answers when the test lets it."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.go, self.error = threading.Semaphore(0), None

    def append_many(self, samples: list[tuple[Row, Row]]) -> None:
        self.go.acquire()
        if self.error is not None:
            raise self.error
        self.groups.append([row["sample_id"] for row, _ in samples])


def put(writer: RowWriter, *numbers: int) -> None:
    for number in numbers:
        writer.put({"sample_id": str(number)}, {})


def test_nothing_is_announced_before_the_disk_has_it_and_all_of_it_in_order(tmp_path: Path) -> None:
    cell = ResultStore(tmp_path).open_cell({"suite": "s", "method": "m"}, {})
    told: list[str] = []
    main = threading.current_thread()

    def durable(row: Row) -> None:
        assert threading.current_thread() is main
        assert row["sample_id"] in cell.done()
        told.append(row["sample_id"])

    with RowWriter(cell, durable) as writer:
        put(writer, *range(40))
        assert len(told) >= 40 - 2 * ROOM - 1, "announced while rows are put in, not only at the end"
        writer.wait()
        assert told == [str(number) for number in range(40)]
        put(writer, 40)
    assert told[-1] == "40" and writer.write_ms > 0
    cell.close()


def test_rows_that_gather_while_the_disk_is_slow_are_written_together() -> None:
    cell, told = SlowCell(), []
    with RowWriter(cell, lambda row: told.append(row["sample_id"])) as writer:  # type: ignore[arg-type]
        put(writer, 0)
        while cell.go._value or writer._waiting.qsize():
            pass
        put(writer, 1, 2, 3)
        assert told == []
        cell.go.release(2)
        writer.wait()
        assert cell.groups == [["0"], ["1", "2", "3"]] and told == ["0", "1", "2", "3"]


def test_a_failed_write_stops_the_run_and_announces_nothing() -> None:
    cell, told = SlowCell(), []
    cell.error = StoreError("cannot write: full")
    cell.go.release(9)
    writer = RowWriter(cell, lambda row: told.append(row["sample_id"]))  # type: ignore[arg-type]
    put(writer, 0)
    for action in (writer.wait, lambda: put(writer, 1), lambda: writer.__exit__(None, None, None)):
        with pytest.raises(StoreError, match="full"):
            action()
    assert told == [] and cell.groups == []


def test_an_error_on_its_way_out_is_not_hidden_and_the_rows_before_it_are_kept() -> None:
    cell, told = SlowCell(), []
    cell.go.release(9)
    with (
        pytest.raises(KeyboardInterrupt),
        RowWriter(cell, lambda row: told.append(row["sample_id"])) as writer,  # type: ignore[arg-type]
    ):
        put(writer, 0, 1)
        raise KeyboardInterrupt
    assert told == ["0", "1"] == [name for group in cell.groups for name in group]
    with pytest.raises(ZeroDivisionError), RowWriter(cell) as writer:  # type: ignore[arg-type]
        cell.error = StoreError("full")
        put(writer, 2)
        raise ZeroDivisionError


def test_a_group_that_cannot_be_written_is_missing_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = ResultStore(tmp_path).open_cell({"suite": "s", "method": "m"}, {"suite": "s", "method": "m"})
    cell.append({"sample_id": "before"}, {})
    contents = {path.name: path.read_bytes() for path in cell.path.glob("*.jsonl")}
    fsync = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StoreError, match=r"1 samples of s x m are safe in .*; make room and run the same command again"
    ):
        cell.append_many([({"sample_id": name}, {}) for name in "ab"])
    monkeypatch.setattr(os, "fsync", fsync)
    assert {path.name: path.read_bytes() for path in cell.path.glob("*.jsonl")} == contents
    cell.append({"sample_id": "after"}, {})
    assert cell.done() == {"before", "after"}
    cell.close()


def test_a_row_of_a_type_that_cannot_be_stored_stops_the_run(tmp_path: Path) -> None:
    cell = ResultStore(tmp_path).open_cell({"suite": "s", "method": "m"}, {})
    with pytest.raises(TypeError, match="score holds a complex"), RowWriter(cell) as writer:
        writer.put({"sample_id": "a", "score": 1j}, {})
    assert isinstance(cell, CellStore) and cell.done() == set()
    cell.close()
