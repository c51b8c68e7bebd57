"""The floor against a count by hand, and the protocol's schedule on a tiny backbone."""

from __future__ import annotations

import pytest

from flashmem import MemoryConfig, new_memory
from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.floor import Shape, decode_floor
from flashmem_bench.latency import SOURCES, append_rows, measure, new_sources, read_rows
from flashmem_bench.schema import LATENCY_COLUMNS, column_names
from tests.flashmem.conftest import make_backbone

QWEN_1_5B = Shape(layers=28, width=1536, heads=12, kv_heads=2, head_width=128, ffn=8960, vocabulary=151936)


def test_floor_of_a_real_shape_is_near_five_percent() -> None:
    """8 injections in 256 tokens: 3.1 % extra passes and 64 one-layer steps, below 1 % where weights dominate."""
    floor = decode_floor(QWEN_1_5B, context=4096, text_tokens=256, injections=8, length=8, depth=1)
    assert floor.passes == pytest.approx(8 / 256)
    assert 1 + 8 / 256 < floor.bytes_ratio < 1.045
    # Arithmetic counts each latent as a full position.
    assert 1.2 < floor.flops_ratio < 1.35


def test_floor_counts_by_hand() -> None:
    shape = Shape(layers=2, width=4, heads=2, kv_heads=1, head_width=2, ffn=3, vocabulary=5)
    layer = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 3
    assert shape.layer_weights == layer
    assert shape.block_weights == layer - 2 * 4 * 2
    step = 2 * layer + 4 * 5 + 2 * (2 * 12 * 2)
    block = (layer - 16) + 2 * 12 * 2 + 16
    floor = decode_floor(shape, context=10, text_tokens=4, injections=1, length=3, depth=1)
    assert floor.bytes_ratio == pytest.approx(1 + (step + 3 * block + 32) / (4 * step))
    assert floor.plain_bytes == 4 * step


def test_no_injection_costs_nothing() -> None:
    floor = decode_floor(QWEN_1_5B, context=512, text_tokens=64, injections=0, length=8, depth=1)
    assert (floor.bytes_ratio, floor.flops_ratio) == (1.0, 1.0)


def test_protocol_runs_its_schedule_and_keeps_its_rows(tmp_path) -> None:
    backbone = make_backbone()
    memory = new_memory(MemoryConfig(), backbone).eval()
    sources = {"vanilla": None, "flashmem": memory}
    ((rows, (comparison,)),) = list(measure(backbone, sources, [16], runs=5))
    assert (comparison.a, comparison.b) == ("flashmem", "vanilla")
    assert [r["method"] for r in rows[:4]] == ["vanilla", "flashmem", "flashmem", "vanilla"]
    assert {(r["method"], r["triggers"], r["latent_tokens"]) for r in rows} == {("vanilla", 0, 0), ("flashmem", 8, 64)}
    assert all(set(r) == set(column_names(LATENCY_COLUMNS)) for r in rows)
    assert comparison.decode_ratio.low <= comparison.decode_ratio.estimate <= comparison.decode_ratio.high
    path = append_rows(tmp_path, rows)
    path.write_text(path.read_text() + '{"torn": ')
    assert read_rows(tmp_path) == rows


def test_bad_requests_are_named() -> None:
    backbone = make_backbone()
    memory = new_memory(MemoryConfig(), backbone)
    with pytest.raises(UsageError, match="5 or more"):
        list(measure(backbone, {"flashmem": memory}, [16], runs=2))
    with pytest.raises(UsageError, match="exceed 512"):
        list(measure(backbone, {"flashmem": memory}, [480], runs=5))
    with pytest.raises(UsageError, match="cot-sc is none of these"):
        new_sources(backbone, ["cot-sc"])


def test_rivals_encode_what_the_formula_says_and_are_compared_with_flashmem() -> None:
    backbone, methods = make_backbone(), list(SOURCES)
    ((rows, comparisons),) = list(measure(backbone, new_sources(backbone, methods), [16], runs=5))
    pairs = [(c.a, c.b) for c in comparisons]
    assert ("memgen", "flashmem") in pairs and ("memgen-cached", "vanilla") in pairs and len(pairs) == 4 + 3
    by = {row["method"]: row for row in rows}
    once = 16 + 255 + 64
    again = [16 + 32 * i + 8 * i for i in range(8)]
    assert by["flashmem"]["positions_encoded"] == by["memgen-cached"]["positions_encoded"] == once
    assert by["memgen"]["positions_encoded"] == sum(again) + 64 + 255
    assert by["memgen"]["positions_woven"] == sum(again) + 64
    assert by["memgen-cached"]["positions_woven"] == again[-1] + 64
    assert by["flashmem-separate-encoder"]["positions_woven"] == sum(again)


def test_a_run_that_did_other_work_is_no_measurement(monkeypatch) -> None:
    backbone = make_backbone()
    monkeypatch.setattr("flashmem_bench.latency.encoded", lambda *_: (1, 1))
    with pytest.raises(BenchError, match="the formula says"):
        list(measure(backbone, {"vanilla": None}, [16], runs=5))
