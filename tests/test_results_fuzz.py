"""Whatever lies in a results folder, reading it ends in results or in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flashmem.errors import FlashMemError
from flashmem_bench.cli import run as command
from flashmem_bench.report.tables import build_tables
from flashmem_bench.store import ResultStore
from flashmem_bench.verification import verify
from tests.synthetic_results import make_results

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("SCHEMA.json", "manifest.json", "samples.jsonl", "texts.jsonl")
KEYS = st.sampled_from(
    "identity descr summary attempts suite method direct schema_version ablation index score e2e_ms attempt "
    "timing_valid sample_id text triggers tokens entropies device metric.exact".split()
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    make_results(root, suites=["hops"], methods=["vanilla", "flashmem"], n=3)
    return root


def file_of(results: Path, name: str) -> Path:
    return results / name if name == "SCHEMA.json" else next(results.glob(f"runs/hops/flashmem/*/{name}"))


def read_everything(results: Path) -> None:
    """Read as report, verify and list do; anything but an error of ours fails the test."""
    for action in (lambda: build_tables(ResultStore(results)), lambda: verify(results)):
        try:
            action()
        except FlashMemError as error:
            assert str(error) and error.exit_code in (1, 2)


def with_content(results: Path, name: str, content: bytes) -> None:
    path = file_of(results, name)
    before = path.read_bytes()
    try:
        path.write_bytes(content)
        read_everything(results)
    finally:
        path.write_bytes(before)


FUZZ = settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))


@FUZZ
@given(st.sampled_from(NAMES), st.binary(max_size=60))
@example("manifest.json", b"[" * 100_000)
@example("samples.jsonl", b"\n\n\n")
def test_any_bytes_in_any_file(results: Path, name: str, content: bytes) -> None:
    with_content(results, name, content)


@FUZZ
@given(st.sampled_from(NAMES), JSON)
def test_any_document_in_any_file(results: Path, name: str, value: object) -> None:
    with_content(results, name, json.dumps(value).encode())


@FUZZ
@given(st.sampled_from(NAMES), KEYS, JSON, st.integers(0, 2))
@example("manifest.json", "descr", 5, 0)
@example("manifest.json", "ablation", [{}], 0)
@example("samples.jsonl", "metric.exact", "x", 2)
@example("samples.jsonl", "metric.exact", None, 2)
@example("samples.jsonl", "score", 10**400, 0)
@example("samples.jsonl", "attempt", 2**63, 0)
@example("samples.jsonl", "index", "x", 1)
@example("samples.jsonl", "sample_id", [], 1)
def test_any_value_in_the_place_of_any_other(results: Path, name: str, key: str, value: object, line: int) -> None:
    content = file_of(results, name).read_text()
    documents = [json.loads(part) for part in (content.splitlines() if name.endswith("l") else [content])]
    changed = documents[line % len(documents)]
    for place in (changed, changed.get("descr")):
        if isinstance(place, dict) and (key in place or place is changed):
            place[key] = value
    for document in documents:
        document.pop("crc", None)
    with_content(results, name, "".join(json.dumps(document) + "\n" for document in documents).encode())


def test_the_commands_say_it_in_one_line(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of(results, "SCHEMA.json")
    before = path.read_bytes()
    path.write_bytes(b"\xff\xfe")
    try:
        for name in (["report"], ["verify"], ["list", "runs"], ["compare", "flashmem", "vanilla", "--suite", "hops"]):
            assert command([*name, "--results-dir", str(results)]) == 1
            err = capsys.readouterr().err
            assert err.startswith("error: cannot read") and len(err.strip().splitlines()) == 1
    finally:
        path.write_bytes(before)
