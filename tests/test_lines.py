"""Lines survive a cut at any byte, any order and repetition, and no flipped bit goes unnoticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmem_bench.cell_store import SAMPLES, TEXTS, CellStore
from flashmem_bench.errors import StoreError
from flashmem_bench.lines import by_sample, decode, encode, scan

ANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
VALUE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
RECORD = st.dictionaries(st.text(), VALUE, max_size=4).filter(lambda record: "crc" not in record)


def record(number: int, **more: Any) -> dict[str, Any]:
    return {"sample_id": f"id-{number}", "index": number, "text": "x\u00e9\u2028" * (number % 5), **more}


def file_of(folder: Path, content: bytes) -> Path:
    path = folder / "samples.jsonl"
    path.write_bytes(content)
    return path


@given(RECORD)
def test_a_record_comes_back_as_it_was(more: dict[str, Any]) -> None:
    try:
        line = encode({**more, "sample_id": "a"})
    except UnicodeEncodeError:  # A lone surrogate, which `scalar` replaces before.
        return
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert decode(line[:-1]) == {**more, "sample_id": "a"}
    assert list(json.loads(line))[-1] == "crc", "any program can still read it"


@ANY
@given(st.data())
def test_a_cut_at_any_byte_keeps_every_whole_line_and_nothing_else(tmp_path: Path, data: st.DataObject) -> None:
    lines = [encode(record(number)) for number in range(6)]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    ends = [sum(map(len, lines[: number + 1])) for number in range(6)]
    found = by_sample(file_of(tmp_path, whole[:cut]))
    assert list(found.values()) == [record(number) for number in range(6) if ends[number] <= cut]


@ANY
@given(st.data())
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, data: st.DataObject) -> None:
    right = {f"id-{number}": record(number) for number in range(4)}
    content = bytearray(b"".join(encode(entry) for entry in right.values()))
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    found = scan(file_of(tmp_path, bytes(content)))
    kept = {entry["sample_id"]: entry for entry in found.records if entry is not None}
    assert len(kept) < 4 and all(right[name] == entry for name, entry in kept.items())


def test_every_single_flipped_bit_of_a_line_is_noticed(tally: Callable[..., None]) -> None:
    line = encode(record(3, score=0.5))[:-1]
    unnoticed = 0
    for bit in range(8 * len(line)):
        damaged = bytearray(line)
        damaged[bit // 8] ^= 1 << bit % 8
        unnoticed += any(decode(part) is not None for part in bytes(damaged).split(b"\n"))
    tally("a flipped bit in a row", 8 * len(line), wrong=unnoticed)


@ANY
@given(st.data())
def test_the_order_of_lines_and_repeated_lines_mean_nothing(tmp_path: Path, data: st.DataObject) -> None:
    numbers = list(range(5))
    for name, make in ((SAMPLES, record), (TEXTS, lambda number: {"sample_id": f"id-{number}", "text": str(number)})):
        order = data.draw(st.permutations(numbers + data.draw(st.lists(st.sampled_from(numbers), max_size=5))))
        (tmp_path / name).write_bytes(b"".join(encode(make(number)) for number in order))
    cell = CellStore(tmp_path, "c")
    assert sorted(cell.rows(), key=lambda row: row["index"]) == [record(number) for number in numbers]
    assert cell.texts()["id-4"]["text"] == "4"


def test_of_several_lines_of_a_sample_the_last_whole_one_counts(tmp_path: Path) -> None:
    again = encode(record(0, score=1.0))
    content = encode(record(0, score=0.0)) + encode(record(1)) + again + encode(record(0, score=2.0))[:-9]
    assert by_sample(file_of(tmp_path, content))["id-0"]["score"] == 1.0


def test_lines_without_a_checksum_are_accepted(tmp_path: Path) -> None:
    lines = [json.dumps(record(number)).encode() + b"\n" for number in range(2)]
    assert len(by_sample(file_of(tmp_path, b"".join(lines) + encode(record(2))))) == 3


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"[]", b"null", b'{"index": 1}', b'{"sample_id": 1}', b"\0" * 40, b"\xff\xfe", b"[" * 100_000],
)
def test_what_is_no_record_is_broken(line: bytes, tmp_path: Path) -> None:
    assert decode(line) is None
    path = file_of(tmp_path, encode(record(0)) + line + b"\n" + encode(record(1)))
    with pytest.raises(StoreError, match=r"line 2 of .*samples\.jsonl is broken; put it aside with .* --repair"):
        by_sample(path)


def test_many_broken_lines_are_counted_not_listed(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"lines 1, 2, 3, 4, 5 and 4 more of .* are broken; put them aside"):
        by_sample(file_of(tmp_path, b"?\n" * 9 + encode(record(0))))


@pytest.mark.parametrize("end", [b"\0" * 64, b"\0" * 64 + b"\n", b"half a li\nne", b"?\n?\n?\n", b'{"sample_id": "a"}'])
def test_whatever_a_kill_leaves_at_the_end_is_passed_over(tmp_path: Path, end: bytes) -> None:
    whole = encode(record(0)) + encode(record(1))
    found = scan(file_of(tmp_path, whole + end))
    assert not found.broken and found.kept == 2 and found.whole_bytes == len(whole)


@given(st.binary(max_size=300))
def test_any_bytes_can_be_read(content: bytes) -> None:
    for line in content.split(b"\n"):
        found = decode(line)
        assert found is None or isinstance(found["sample_id"], str)
