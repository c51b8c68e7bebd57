"""The floor and the work against counts by hand, the protocol's schedule, the stop rule, and the machine's ceilings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flashmem import MemoryConfig, new_memory
from flashmem_bench.ceilings import Ceilings, measure_ceilings
from flashmem_bench.cli import run as command
from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.floor import Shape, decode_floor
from flashmem_bench.latency import interleave
from flashmem_bench.latency.arms import DRAWS, new_arm
from flashmem_bench.latency.campaign import Campaign, measure
from flashmem_bench.latency.files import BLOCKS, append, read_rows
from flashmem_bench.latency.interleave import Stop, by_importance, compared, entropy_thresholds
from flashmem_bench.latency.protocol import Protocol
from flashmem_bench.latency.selfcheck import SelfCheck, check_harness
from flashmem_bench.latency.shapes import SHAPES, random_backbone
from flashmem_bench.latency.timing import generate_once
from flashmem_bench.latency.work import model_pass, run_work
from flashmem_bench.registry import method_names
from flashmem_bench.schema import LATENCY_COLUMNS, column_names
from flashmem_bench.stats import Interval
from tests.flashmem.conftest import make_backbone

QWEN_1_5B = Shape(layers=28, width=1536, heads=12, kv_heads=2, head_width=128, ffn=8960, vocabulary=151936)
SMALL = Shape(layers=2, width=4, heads=2, kv_heads=1, head_width=2, ffn=3, vocabulary=5)
SHORT = Protocol(cycles=2, cycle_text=4)
MATCHED = ("flashmem-random-trigger", "flashmem-matched-fixed", "flashmem-matched-output")
FIVE = Stop(runs=5, most_runs=5)


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the medians never agree, and half a minute of warm-up a method is long for a test."""
    monkeypatch.setattr(interleave, "_WARM_SECONDS", 0.0)


def test_floor_of_a_real_shape_is_near_five_percent() -> None:
    """8 injections in 256 tokens: 3.1 % extra passes and 64 one-layer steps, below 1 % where weights dominate."""
    floor = decode_floor(QWEN_1_5B, context=4096, text_tokens=256, injections=8, length=8, depth=1)
    assert floor.passes == pytest.approx(8 / 256)
    assert 1 + 8 / 256 < floor.bytes_ratio < 1.045
    # Arithmetic counts each latent as a full position.
    assert 1.2 < floor.flops_ratio < 1.35


def test_floor_counts_by_hand() -> None:
    layer = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 3
    assert SMALL.layer_weights == layer
    assert SMALL.block_weights == layer - 2 * 4 * 2
    step = 2 * layer + 4 * 5 + 2 * (2 * 12 * 2)
    block = (layer - 16) + 2 * 12 * 2 + 16
    floor = decode_floor(SMALL, context=10, text_tokens=4, injections=1, length=3, depth=1)
    assert floor.bytes_ratio == pytest.approx(1 + (step + 3 * block + 32) / (4 * step))
    assert floor.plain_bytes == 4 * step


def test_no_injection_costs_nothing() -> None:
    floor = decode_floor(QWEN_1_5B, context=512, text_tokens=64, injections=0, length=8, depth=1)
    assert (floor.bytes_ratio, floor.flops_ratio) == (1.0, 1.0)


def test_work_of_a_pass_by_hand() -> None:
    weights, head, cache = 2 * SMALL.layer_weights, 4 * 5, 2 * (2 * 10 * 2)
    one = model_pass(SMALL, 1, 10, element_bytes=2)
    assert one.bytes == 2 * (weights + head + cache)
    assert one.flops == 2 * (weights + 2 * (2 * 2 * 2 * 10) + head)
    # Three positions that end at 10 see 8, 9 and 10 keys; only the last one has logits.
    three = model_pass(SMALL, 3, 10, element_bytes=2)
    assert three.bytes == one.bytes
    assert three.flops == 2 * (3 * weights + 2 * (2 * 2 * 2 * (8 + 9 + 10)) + head)


def test_work_agrees_with_the_floor_and_orders_the_methods() -> None:
    same = {"prompt": 4096, "text": 256, "length": 8}
    moments = list(range(0, 256, 32))
    prefill, plain = run_work(QWEN_1_5B, None, moments=[], **same)
    floor = decode_floor(QWEN_1_5B, context=4096, text_tokens=256, injections=8, length=8, depth=1)
    work = {kind: run_work(QWEN_1_5B, kind, moments=moments, **same) for kind in
            ("constant", "consolidator", "weaver", "separate-encoder", "weaver-recompute")}  # fmt: skip
    assert work["consolidator"][1].bytes / plain.bytes == pytest.approx(floor.bytes_ratio, rel=2e-3)
    assert work["consolidator"][1].flops / plain.flops == pytest.approx(floor.flops_ratio, rel=2e-2)
    done = [after.flops for _, after in work.values()]
    assert done == sorted(done) and done[-1] > 50 * done[0]
    assert work["weaver-recompute"][0].flops == 0, "it encodes the prompt with its first memory"
    assert work["consolidator"][0] == prefill


def test_every_method_is_timed_or_says_why_not() -> None:
    backbone = make_backbone()
    prompt = [5] * 12
    for name in method_names():
        if name in MATCHED:
            with pytest.raises(UsageError, match="time flashmem instead"):
                new_arm(name, backbone, SHORT)
            continue
        arm = new_arm(name, backbone, SHORT, settings={"eviction.budget": 8})
        run = generate_once(backbone, arm, SHORT, prompt)
        assert run.output_tokens == SHORT.text_tokens, name
        once = name in ("prompt-tuning", "flashmem-prompt-end")
        silent = arm.memory is None or name == "flashmem-watch"
        assert len(run.triggers) == (0 if silent else 1 if once else SHORT.cycles), name
        assert arm.rows == (DRAWS if name == "cot-sc" else 1)


def test_protocol_runs_its_schedule_and_keeps_its_rows(tmp_path: Path) -> None:
    backbone = make_backbone()
    trained = new_memory(MemoryConfig(), backbone).eval()
    campaign = Campaign(("vanilla", "flashmem"), SHORT, FIVE, trained, ceilings=Ceilings(1e12, 1e11, 1.0, "here"))
    (block,) = list(measure(backbone, campaign, [16]))
    (comparison,) = block.comparisons
    assert (comparison.a, comparison.b) == ("flashmem", "vanilla")
    assert block.record["order"][:4] == ["vanilla", "flashmem", "flashmem", "vanilla"]
    assert {(r["method"], r["triggers"], r["latent_tokens"]) for r in block.rows} == {
        ("vanilla", 0, 0), ("flashmem", 2, 16)}  # fmt: skip
    assert all(set(r) == set(column_names(LATENCY_COLUMNS)) for r in block.rows)
    assert comparison.decode_ratio.low <= comparison.decode_ratio.estimate <= comparison.decode_ratio.high
    path = append(tmp_path, block.rows)
    path.write_text(path.read_text() + '{"torn": ')
    assert read_rows(tmp_path) == block.rows
    append(tmp_path, block.rows[:1])
    assert read_rows(tmp_path) == [*block.rows, block.rows[0]], "a torn line swallows no other"


def test_gaps_and_phases_of_a_row_add_up() -> None:
    backbone = make_backbone()
    (block,) = list(measure(backbone, Campaign(("flashmem",), Protocol(cycles=3, cycle_text=8), FIVE), [16]))
    for row in block.rows:
        inside = row["prefill_ms"] + row["step_ms"] + row["sample_ms"] + row["consolidate_ms"] + row["inject_ms"]
        assert row["unaccounted_share"] == pytest.approx(1 - inside / row["e2e_ms"])
        assert row["tpot_ms"] == pytest.approx((row["e2e_ms"] - row["ttft_ms"]) / 23)
        # The memory at the prompt end lies before the first token, so in no gap.
        assert row["itl_trigger_ms_p50"] > row["itl_plain_ms_p50"] > 0
        assert row["itl_plain_ms_p99"] is None
        assert row["bandwidth_share"] is None and row["bytes_token"] > 0


def test_the_harness_checks_itself() -> None:
    backbone = make_backbone()
    arm = new_arm("flashmem", backbone, SHORT)
    check = check_harness(backbone, arm, SHORT, 16, repeats=3, runs=5)
    assert len(check.gaps) == 3 * 2 * 5 and len(check.ratios) == 3
    assert 0 < check.clock_share < 1
    assert check.covered <= 3 and all(ratio.low <= ratio.estimate <= ratio.high for ratio in check.ratios)
    assert json.loads(json.dumps(check.plain()))["covered"] == check.covered


def test_a_harness_that_is_off_says_so() -> None:
    fine, off = Interval(1.0, 0.9, 1.1), Interval(1.2, 1.1, 1.3)
    good = SelfCheck("vanilla", 512, [0.001] * 19 + [0.3], 0.001, Interval(1.01, 0.99, 1.03), [fine] * 17 + [off] * 3)
    bad = SelfCheck(
        "vanilla", 512, [0.001] * 18 + [0.3] * 2, 0.001, Interval(1.05, 1.04, 1.06), [fine] * 16 + [off] * 4
    )
    assert all(ok for _, ok in good.findings())
    assert not any(ok for _, ok in bad.findings())


def test_rivals_encode_what_the_formula_says_and_are_compared_with_flashmem() -> None:
    backbone = make_backbone()
    methods = ("vanilla", "flashmem", "flashmem-separate-encoder", "memgen", "memgen-cached")
    (block,) = list(measure(backbone, Campaign(methods, SHORT, FIVE), [16]))
    pairs = [(c.a, c.b) for c in block.comparisons]
    assert ("memgen", "flashmem") in pairs and ("memgen-cached", "vanilla") in pairs and len(pairs) == 4 + 3
    by = {row["method"]: row for row in block.rows}
    once = 16 + 7 + 16
    again = [16, 16 + 4 + 8]
    assert by["flashmem"]["positions_encoded"] == by["memgen-cached"]["positions_encoded"] == once
    assert by["memgen"]["positions_encoded"] == sum(again) + 16 + 7
    assert by["memgen"]["positions_woven"] == sum(again) + 16
    assert by["memgen-cached"]["positions_woven"] == again[-1] + 16


def test_an_engine_that_does_other_work_is_not_timed() -> None:
    backbone = make_backbone()
    campaign = Campaign(("flashmem",), SHORT, FIVE)
    plain = backbone.inject

    def twice(state, memory, rows=None) -> None:
        plain(state, memory, rows)
        state.encoded = [count + 1 for count in state.encoded]

    backbone.inject = twice  # type: ignore[method-assign]
    with pytest.raises(BenchError, match="the formula says"):
        list(measure(backbone, campaign, [16]))


def test_it_stops_when_ratios_are_known_or_the_time_is_up() -> None:
    backbone = make_backbone()
    wide = Campaign(("vanilla", "flashmem"), SHORT, Stop(5, 9, tolerance=1e9))
    (block,) = list(measure(backbone, wide, [16]))
    assert block.comparisons[0].runs == 5 and "every ratio is known" in block.record["stopped"]
    never = Campaign(("vanilla", "flashmem"), SHORT, Stop(5, 7, tolerance=0.0))
    (block,) = list(measure(backbone, never, [16]))
    assert block.comparisons[0].runs == 7 and block.record["stopped"] == "7 runs"
    late = Campaign(("vanilla",), SHORT, Stop(5, 7, deadline=0.0))
    assert list(measure(backbone, late, [16, 32])) == []


def test_a_short_budget_meets_the_claims_first() -> None:
    assert by_importance([4096, 65536, 512, 512], claimed=[65536]) == [65536, 512, 4096]
    assert compared(["flashmem", "memgen"]) == [("memgen", "flashmem")]


def test_the_free_protocol_lets_each_method_decide() -> None:
    backbone = make_backbone()
    free = Protocol("free", cycles=2, cycle_text=8)
    prompt = list(range(3, 40))
    thresholds = entropy_thresholds(backbone, prompt, free, {"attention-entropy": 50.0, "output-entropy": 50.0})
    arm = new_arm("flashmem", backbone, free, thresholds=thresholds, settings={"trigger.cooldown": 0})
    run = generate_once(backbone, arm, free, prompt)
    assert arm.trigger is not None and arm.trigger.threshold == thresholds["attention-entropy"]
    assert 0 < len(run.triggers) <= 8
    assert all(trigger.entropy > arm.trigger.threshold for trigger in run.triggers)


def test_random_weights_of_a_real_shape_are_named_so() -> None:
    backbone = random_backbone("smoke", "cpu", "float32")
    (block,) = list(measure(backbone, Campaign(("vanilla", "flashmem"), SHORT, FIVE), [24]))
    assert all(row["random_weights"] and row["model"] == "random-smoke" for row in block.rows)
    with pytest.raises(UsageError, match="llama-3"):
        random_backbone("gpt-5", "cpu", "float32")


@pytest.mark.parametrize(("name", "billions"), [("qwen2.5-1.5b", 1.54), ("qwen2.5-7b", 7.62), ("qwen3-4b", 4.02),
                                                ("llama-3.2-3b", 3.21), ("llama-3.1-8b", 8.03)])  # fmt: skip
def test_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family, values = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


def test_ceilings_are_those_of_a_machine() -> None:
    import torch

    found = measure_ceilings("cpu", torch.float32)
    assert found.flops > 1e8 and found.bytes_s > 1e8 and 0 < found.launch_us < 1e5


def test_bad_requests_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = make_backbone()
    with pytest.raises(UsageError, match="5 or more"):
        Stop(runs=2)
    with pytest.raises(UsageError, match="exceed the 512"):
        list(measure(backbone, Campaign(("flashmem",)), [480]))
    for line, said in (
        (["--protocol", "other"], "paper or free"),
        (["--set", "length=4"], "memory.length=4"),
        (["--model-shape", "gpt-5"], "smoke"),
        (["--method", "nothing"], "nothing"),
    ):
        assert command(["latency", "--contexts", "16", *line]) in (1, 2)
        assert said in capsys.readouterr().err


def test_the_command_keeps_rows_and_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["latency", "--model-shape", "smoke", "--contexts", "16", "--runs", "5", "--most-runs", "5"]
    assert command([*line, "--results-dir", str(tmp_path), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(entry["context"], entry["runs"]) for entry in found] == [(16, 5)]
    blocks = read_rows(tmp_path, BLOCKS)
    assert [block["context"] for block in blocks] == [16]
    assert {"before", "after", "stopped", "observer_ratio", "ceilings", "machine"} <= set(blocks[0])
    assert len(read_rows(tmp_path)) == 10


def test_it_needs_no_package_of_the_harness() -> None:
    """A bare machine with an accelerator has torch and transformers, and seldom more."""
    script = """
import sys
from flashmem_bench.cli import run
from flashmem_bench.latency import interleave
interleave._WARM_SECONDS = 0.0
assert run(["latency", "--model-shape", "smoke", "--contexts", "16", "--runs", "5", "--most-runs", "5", "--quiet",
            "--method", "vanilla", "--results-dir", sys.argv[1]]) == 0
bad = {"lm_eval", "datasets", "pandas", "pyarrow"} & set(sys.modules)
# transformers imports pydantic where it finds it; what counts is that nothing of ours does.
bad |= {name for name, module in list(sys.modules.items())
        if name.startswith("flashmem") and "BaseModel" in vars(module)}
assert not bad, bad
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
