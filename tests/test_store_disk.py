"""A disk that is full or may not be written: the run stops in one sentence, and what was safe stays so."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashmem_bench import durable
from flashmem_bench.cell_store import CellStore
from flashmem_bench.errors import StoreError
from flashmem_bench.store import ResultStore

NAMES = {"suite": "s", "method": "m"}


def add(cell: CellStore, *numbers: int, size: int = 300) -> None:
    for number in numbers:
        cell.append({"sample_id": f"id-{number}", "index": number}, {"text": str(number % 10) * size})


def limited(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """From now on the disk takes so many bytes; the line that does not fit is taken in part."""
    write = durable.append

    class Handle:
        def __init__(self, handle: Any):
            self.handle, self.fileno = handle, handle.fileno

        def write(self, content: bytes) -> int:
            nonlocal room
            taken = content[:room]
            room -= len(taken)
            if not taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.handle.write(taken))

    monkeypatch.setattr("flashmem_bench.cell_store.append", lambda handle, content: write(Handle(handle), content))


@pytest.mark.parametrize("room", [0, 1, 200, 390, 420, 700])
def test_a_full_disk_loses_nothing_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, tally: Callable[..., None]
) -> None:
    cell = ResultStore(tmp_path).open_cell(NAMES, NAMES)
    add(cell, 0, 1)
    with monkeypatch.context() as full:
        limited(full, room)
        said = f"No space left on device.*; [23] samples of s x m are safe in {cell.path}; make room and run the same"
        with pytest.raises(StoreError, match=said) as caught:
            add(cell, 2, 3)
        assert "\n" not in str(caught.value)
    assert all(
        line.endswith(b"}\n") for path in cell.path.glob("*.jsonl") for line in path.read_bytes().splitlines(True)
    )
    safe = cell.done()
    add(cell, 2, 3, 4)
    tally("disk full after some bytes", 1, lost=len({"id-0", "id-1"} - safe) + 5 - len(cell.done()))
    cell.close()


def test_what_another_process_appended_is_never_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before\n")

    class Handle:
        """Takes half of what it is given, and then somebody else appends."""

        def __init__(self) -> None:
            self.handle = path.open("ab", buffering=0)
            self.fileno = self.handle.fileno

        def write(self, content: bytes) -> int:
            half = self.handle.write(content[: len(content) // 2])
            with path.open("ab") as other:
                other.write(b"of another\n")
            return int(half)

    with pytest.raises(OSError, match="No space"):
        durable.append(Handle(), b"0123456789\n")  # type: ignore[arg-type]
    assert path.read_bytes() == b"before\n01234of another\n"


def test_a_manifest_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = ResultStore(tmp_path).open_cell(NAMES, NAMES)
    add(cell, 0)
    cell.begin_attempt({})
    before = (cell.path / "manifest.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="1 samples of s x m are safe"):
        cell.finish({"score": 1.0})
    assert (cell.path / "manifest.json").read_bytes() == before
    assert not list(cell.path.glob(".*.tmp")), "a full disk keeps no half file"
    cell.close()


def test_new_files_are_flushed_with_the_folders_that_name_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to know which file a number is")
    monkeypatch.setattr(os, "fsync", noted)
    cell = ResultStore(tmp_path / "new" / "results").open_cell(NAMES, NAMES)
    for folder in (tmp_path / "new" / "results", cell.path.parent.parent, cell.path.parent, cell.path):
        assert str(folder.parent) in flushed
    flushed.clear()
    add(cell, 0)
    assert flushed == [str(cell.path), str(cell.path / "texts.jsonl"), str(cell.path / "samples.jsonl")]
    flushed.clear()
    cell.append_many([({"sample_id": str(number)}, {}) for number in range(9)])
    assert len(flushed) == 2, "a group shares its flushes"
    cell.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(small_disk: Path, tally: Callable[..., None]) -> None:
    cell = ResultStore(small_disk / "results").open_cell(NAMES, NAMES)
    cell.begin_attempt({})
    count = 0
    with pytest.raises(StoreError, match=r"No space left.*samples of s x m are safe in .*; make room"):
        while True:
            add(cell, count, size=4000)
            count += 1
    assert count > 100 and len(cell.done()) == count
    # With not a byte left, the end of the attempt cannot be written either, and nothing is lost by trying.
    with pytest.raises(StoreError, match=f"{count} samples of s x m are safe"):
        cell.finish({"n": count})
    cell.close()
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    again = ResultStore(small_disk / "results").cells()[0]
    assert again.begin_attempt({}) == 2
    add(again, count, size=4000)
    again.finish({"n": count + 1})
    assert not list(again.path.glob(".*.tmp"))
    tally("disk full (tmpfs of 1 MB)", 1, lost=count + 1 - len(again.done()))


@pytest.mark.slow
def test_a_folder_that_became_read_only(small_disk: Path, tally: Callable[..., None]) -> None:
    cell = ResultStore(small_disk / "results").open_cell(NAMES, NAMES)
    add(cell, 0)
    cell.close()
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    if subprocess.run(remount, capture_output=True).returncode:
        pytest.skip("the file system cannot be made read-only here")
    with pytest.raises(
        StoreError, match=r"Read-only file system.*1 samples of s x m are safe.*; mend that and run the same"
    ):
        cell.begin_attempt({})
    with pytest.raises(StoreError, match="cannot write to the results folder"):
        ResultStore(small_disk / "results")
    tally("folder becomes read-only", 1, lost=len({"id-0"} - cell.done()))
