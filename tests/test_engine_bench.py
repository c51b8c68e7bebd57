"""The bench of the engine: verdicts and turns by hand, gates that catch a wrong token, checks on small models."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmem.errors import ConfigError
from flashmem.generation import generate
from flashmem.memory import MemoryConfig, new_memory
from flashmem.trigger import TriggerConfig
from flashmem_bench.cli import run as command
from flashmem_bench.clock import HostClock
from flashmem_bench.engine import answering, checks, decoding, files, memory, prefill_process, profile, stepping
from flashmem_bench.engine.bounds import at_least, at_most
from flashmem_bench.engine.contestants import ours, ours_in_batches, their_decode_seconds, theirs
from flashmem_bench.engine.figures import Bound, Figure, Outcome
from flashmem_bench.engine.gates import full_pass, same_answers, together
from flashmem_bench.engine.setting import Setting, set_execution
from flashmem_bench.engine.turns import Ratio, take_turns
from flashmem_bench.engine.workload import fixed_length, mixed_prompts, random_prompt, until_eos
from flashmem_bench.errors import BenchError, UnknownNameError, UsageError
from flashmem_bench.latency.arms import new_arm
from flashmem_bench.latency.interleave import Stop
from flashmem_bench.latency.protocol import Protocol
from flashmem_bench.latency.shapes import random_backbone
from flashmem_bench.latency.timing import row_of, timed_run
from flashmem_bench.models import load_backbone

FIVE = Stop(runs=5, most_runs=5)
LATE = Stop(runs=5, most_runs=5, deadline=0.0)


@pytest.fixture(scope="module")
def smoke() -> Setting:
    """A random backbone; each test gets limits and contexts of its own."""
    return Setting(random_backbone("smoke", "cpu", "float32", 0), "flashmem-tiny", "smoke", FIVE, (24,), 0)


@pytest.fixture(scope="module")
def bundled() -> Setting:
    return Setting(load_backbone("flashmem-tiny", "cpu", "float32"), "flashmem-tiny", None, FIVE)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks as they are, with less to do."""
    for place, name, value in (
        (answering, "SINGLE", 3),
        (answering, "BATCHED", 9),
        (answering, "ROWS", 4),
        (answering, "SINGLE_FIXED", 4),
        (answering, "BATCHED_FIXED", 4),
        (answering, "LONG_TOKENS", 6),
        (decoding, "ROWS", 5),
        (decoding, "ROW_TOKENS", 6),
        (stepping, "STEPS", 2),
        (stepping, "_BLOCKS", 1),
    ):
        monkeypatch.setattr(place, name, value)
    short = lambda backbone: fixed_length(backbone, 7)
    monkeypatch.setattr(answering, "until_eos", short)
    monkeypatch.setattr("flashmem_bench.latency.protocol.Protocol", lambda: Protocol(cycles=2, cycle_text=4))


@pytest.mark.parametrize(
    ("bound", "low", "high", "verdict"),
    [
        (Bound("at most", 1.05), 1.01, 1.05, "met"),
        (Bound("at most", 1.05), 1.04, 1.06, "cannot tell"),
        (Bound("at most", 1.05), 1.06, 1.07, "missed"),
        (Bound("at least", 2.0), 2.0, 2.2, "met"),
        (Bound("at least", 2.0), 1.9, 2.1, "cannot tell"),
        (Bound("at least", 2.0), 1.0, 1.9, "missed"),
        (Bound("at least", 2.0), None, None, "cannot tell"),
        (None, 1.0, 1.1, "no bound"),
    ],
)
def test_verdicts_follow_the_interval(bound: Bound | None, low: float, high: float, verdict: str) -> None:
    assert Figure("ratio", 1.5, low, high, bound=bound).verdict == verdict


def test_a_count_needs_no_interval() -> None:
    assert Figure("bytes", 1.04, bound=Bound("at most", 1.05), counted=True).verdict == "met"
    assert Figure("bytes", 1.06, bound=Bound("at most", 1.05), counted=True).verdict == "missed"
    assert Figure("bytes", float("nan"), counted=True).plain()["estimate"] is None


def test_bounds_hold_where_they_are_stated(smoke: Setting, bundled: Setting) -> None:
    assert at_most(bundled, 1.0, "cpu") == Bound("at most", 1.0)
    assert at_most(bundled, 1.0, "cpu", usual=False) is None
    assert at_least(bundled, 1.0, "cuda") is None
    assert at_most(smoke, 1.0, "cpu") is None, "another model is limited by other things"


def test_contestants_take_turns_and_a_pass_is_a_pair() -> None:
    taken: list[str] = []

    def contestant(name: str, seconds: float) -> Any:
        def take(item: int) -> dict[str, float]:
            taken.append(f"{name}{item}")
            return {"seconds": seconds * item, "tokens": 4.0}

        return take

    both = {"A": contestant("A", 3.0), "B": contestant("B", 1.0)}
    rate = Ratio("B", "A", "tokens", "seconds")
    turns = take_turns(both, [rate], replace(FIVE, most_runs=8), items=[1, 2], warm=1)
    assert taken[4:12] == ["A1", "B1", "B2", "A2", "B1", "A1", "A2", "B2"]
    assert turns.order == ["A", "B", "B", "A"]
    assert turns.of("A", "seconds") == [9.0] * 5
    assert turns.ratio(Ratio("A", "B", "seconds")).estimate == pytest.approx(3.0)
    assert turns.ratio(rate).estimate == pytest.approx(3.0)
    assert "within 2.0% after 5 passes" in turns.stopped
    assert take_turns(both, [rate], LATE, items=[1], warm=0).stopped == "time was up after 1 passes"


def test_turns_end_at_the_most_runs_where_the_ratio_stays_unknown() -> None:
    values = iter(range(1, 1000))
    turns = take_turns({"A": lambda _: {"s": float(next(values))}, "B": lambda _: {"s": 1.0}},
                       [Ratio("A", "B", "s")], replace(FIVE, most_runs=7))  # fmt: skip
    assert (turns.pairs, turns.stopped) == (7, "7 passes")


def test_both_engines_give_the_same_answers_and_end_at_the_same_token(bundled: Setting) -> None:
    prompts = mixed_prompts(bundled.backbone, 6, 0)
    config = until_eos(bundled.backbone, 80)
    alone = ours(bundled.backbone, prompts, config, 1)
    for other in (
        theirs(bundled.clean, prompts, config, 1),
        theirs(bundled.clean, prompts, config, 4),
        ours(bundled.backbone, prompts, config, 4),
        ours_in_batches(bundled.backbone, prompts, config, 4),
    ):
        agreement = same_answers(bundled.clean, prompts, alone, other, "both")
        assert agreement.holds and agreement.equal == len(prompts), agreement
    eos = bundled.backbone.tokenizer.eos_token_id
    assert all(answer.count(eos) == 1 and answer[-1] == eos for answer in alone)
    assert len({len(answer) for answer in alone}) > 2, "answers of one length show no waiting rows"


def test_a_prompt_order_is_shuffled_and_comes_from_the_seed(bundled: Setting, smoke: Setting) -> None:
    for backbone in (bundled.backbone, smoke.backbone):
        prompts = mixed_prompts(backbone, 12, 3)
        lengths = [len(prompt) for prompt in prompts]
        assert len(prompts) == 12 and lengths != sorted(lengths)
        assert prompts == mixed_prompts(backbone, 12, 3) != mixed_prompts(backbone, 12, 4)


def test_the_gate_between_engines_tells_a_tie_from_an_error(bundled: Setting) -> None:
    prompts = mixed_prompts(bundled.backbone, 2, 0)
    answers = ours(bundled.backbone, prompts, until_eos(bundled.backbone, 40), 1)
    wrong = [[(answers[0][0] + 1) % 1000, *answers[0][1:]], answers[1]]
    found = same_answers(bundled.clean, prompts, answers, wrong, "ours")
    assert (found.equal, found.different, found.holds) == (1, [0], False)
    assert "1 of 2 answers equal, 1 differ (first: 0)" in str(found)
    cut = same_answers(bundled.clean, prompts, answers, [answers[0], answers[1][:-1]], "ours")
    assert not cut.holds, "an answer that ends too early is wrong"
    level = _Level(bundled.clean)
    assert same_answers(level, prompts, answers, wrong, "ours").ties == 1, "all logits alike: whoever wins is right"


class _Level:
    """A model to which every token is as good as every other."""

    def __init__(self, clean: Any):
        self.device, self.dtype, self._clean = clean.device, clean.dtype, clean

    def __call__(self, *args: Any, **more: Any) -> Any:
        found = self._clean(*args, **more)
        found.logits = torch.ones_like(found.logits)
        return found


def test_the_full_pass_sees_memories_and_catches_a_wrong_token(smoke: Setting) -> None:
    backbone, prompt = smoke.backbone, random_prompt(smoke.backbone, 20, 1)
    torch.manual_seed(0)
    arm = {"memory": new_memory(MemoryConfig(length=3), backbone).eval(),
           "trigger": TriggerConfig(kind="every", interval=4, cooldown=4, max_injections=2)}  # fmt: skip
    (answer,) = generate(backbone, [prompt], generation_config=fixed_length(backbone, 9), keep_memories=True, **arm)
    assert [trigger.text_index for trigger in answer.triggers] == [0, 4]
    held = full_pass(smoke.clean, prompt, answer, "flashmem")
    assert held.holds and held.equal + held.ties == 9, held
    moved = replace(answer, memories=answer.memories[::-1])
    assert not full_pass(smoke.clean, prompt, moved, "swapped memories").holds
    answer.token_ids[5] = (answer.token_ids[5] + 1) % 512
    assert full_pass(smoke.clean, prompt, answer, "flashmem").different[0] == 5
    assert "18 tokens" in str(together([held, held], "two rows"))


def test_the_untouched_model_has_the_weights_and_nothing_else_of_ours(smoke: Setting) -> None:
    assert smoke.clean is not smoke.backbone.model
    assert smoke.clean.config._attn_implementation == "sdpa"
    for ours_, theirs_ in zip(smoke.backbone.model.parameters(), smoke.clean.parameters(), strict=True):
        assert torch.equal(ours_, theirs_)


def test_decode_seconds_of_generate_begin_with_the_first_token(smoke: Setting) -> None:
    config = fixed_length(smoke.backbone, 5)
    found = their_decode_seconds(smoke.clean, smoke.backbone, [[3, 4, 5]], config)
    assert found["tokens"] == 4 and found["seconds"] > 0


def test_an_execution_that_is_not_there_is_refused(smoke: Setting) -> None:
    with pytest.raises(ConfigError, match="graph needs a CUDA device"):
        set_execution(smoke.backbone, "graph")
    with pytest.raises(UsageError, match="eager, compile, graph"):
        set_execution(smoke.backbone, "fast")
    assert smoke.backbone.execution == "eager"


@pytest.mark.parametrize(("execution", "column"), [(None, "eager"), ("compile", "compile")])
def test_a_latency_row_says_how_the_backbone_was_executed(execution: str | None, column: str) -> None:
    backbone, protocol = random_backbone("smoke", "cpu", "float32"), Protocol(cycles=1, cycle_text=2)
    arm = new_arm("vanilla", backbone, protocol)
    run = timed_run(backbone, arm, protocol, [5] * 8, HostClock())
    if execution is not None:
        backbone.execution = execution
    assert row_of(backbone, arm, protocol, 8, 0, run, None)["exec"] == column


REHEARSED = ["generate-batch1", "generate-batch16", "decode-4k", "monitored-row-8k", "decode-bandwidth",
             "generate-long", "overhead-64k", "batch32-4k", "memgen-64k", "profile"]  # fmt: skip


@pytest.mark.parametrize("name", REHEARSED)
def test_every_check_runs_on_a_small_model(smoke: Setting, name: str) -> None:
    (outcome,) = checks.run_checks(smoke, checks.chosen([name], "cpu"))
    assert outcome.correct and outcome.skipped is None and outcome.check == name
    assert outcome.figures and all(figure.estimate > 0 for figure in outcome.figures)
    assert all(figure.verdict == "no bound" for figure in outcome.figures)
    assert json.loads(json.dumps(outcome.plain(), allow_nan=False)) == outcome.plain()
    assert "equal" in outcome.gate or name in ("monitored-row-8k", "profile")


def test_wrong_answers_have_no_figure(smoke: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    right = answering.ours
    monkeypatch.setattr(answering, "ours", lambda *given: [[1, *answer[1:]] for answer in right(*given)])
    (outcome,) = checks.run_checks(smoke, checks.chosen(["generate-batch1"], "cpu"))
    assert not outcome.correct and not outcome.figures and "differ" in outcome.gate


def test_a_wrong_method_has_no_figure(smoke: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "full_pass", lambda *given: full_pass(given[0], given[1][::-1], *given[2:]))
    (outcome,) = checks.run_checks(smoke, checks.chosen(["decode-4k"], "cpu"))
    assert not outcome.correct and not outcome.figures


def test_peak_memory_is_held_against_one_chunk(bundled: Setting) -> None:
    backbone, own = bundled.backbone, (8192, 16384, 32768)
    cache = {context: memory.cache_bytes(backbone, context) for context in own}
    assert cache[8192] == 6 * 2 * 8192 * 2 * 32 * 4
    weights = memory.weight_bytes(backbone)
    chunk = 10_000_000
    grown = {8192: {"growth_bytes": cache[8192] + chunk}, 16384: {"growth_bytes": cache[16384] + chunk},
             32768: {"growth_bytes": cache[32768] + 4 * chunk}}  # fmt: skip
    found = memory._held_against_a_chunk(bundled, Outcome("prefill-memory"), grown, "cpu", own)
    assert [figure.verdict for figure in found.figures] == ["no bound", "met", "missed"]
    assert found.figures[2].estimate == pytest.approx(1 + 3 * chunk / (weights + cache[32768] + chunk))
    assert found.details["chunk_bytes"] == chunk


def test_a_prefill_in_a_process_of_its_own_grows_by_its_cache(bundled: Setting) -> None:
    asked = {"model": "flashmem-tiny", "shape": None, "dtype": "float32", "execution": "eager", "seed": 0}
    found = memory._in_a_process(bundled, 4096)
    assert found["growth_bytes"] > memory.cache_bytes(bundled.backbone, 4096) and found["risen"]
    assert prefill_process.measure({**asked, "context": 32})["before_bytes"] > 0
    with pytest.raises(BenchError, match="failed in its process"):
        memory._in_a_process(replace(bundled, model="/none"), 32)


def test_checks_of_another_device_say_so(smoke: Setting) -> None:
    (outcome,) = checks.run_checks(smoke, checks.chosen(["peak-memory"], "cpu"))
    assert outcome.skipped is not None and "--device cuda" in outcome.skipped
    (late,) = checks.run_checks(replace(smoke, stop=LATE), checks.chosen(["profile"], "cpu"))
    assert late.skipped is not None and "--budget-minutes" in late.skipped
    usual = checks.chosen([], "cpu")
    assert [check.name for check in usual][:2] == ["generate-batch1", "generate-batch16"]
    assert {one.check for one in checks.others(usual)} | {one.name for one in usual} == {c.name for c in checks.CHECKS}
    with pytest.raises(UnknownNameError, match="generate-batch1"):
        checks.chosen(["generate-batch"], "cpu")


def test_gaps_and_kernels_of_a_step_are_added_up() -> None:
    found = [("mm", 0.0, 4.0), ("cat", 3.0, 5.0), ("mm", 7.0, 8.0)]
    assert profile.covered(found) == 6.0
    assert profile.by_time(found, 1) == [{"name": "mm", "us": 5.0, "calls": 2}]


def test_a_check_that_fails_leaves_the_others(smoke: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(setting: Setting) -> Outcome:
        raise BenchError("the profiler saw no kernel")

    def fills(setting: Setting) -> Outcome:
        raise torch.OutOfMemoryError("too much")

    both = [checks.Check("one", "", ("cpu",), fails), checks.Check("two", "", ("cpu",), fills)]
    found = list(checks.run_checks(smoke, both))
    assert [outcome.skipped for outcome in found] == [
        "it failed: the profiler saw no kernel",
        "the device ran out of memory: choose smaller --contexts",
    ]


def test_the_command_writes_its_document_and_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"engine --model-shape smoke --device cpu --runs 5 --most-runs 5 --contexts 24 --results-dir {tmp_path}"
    assert command([*line.split(), "--check", "monitored-row-8k,decode-4k", "--json"]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert "CPU timing" in printed and "decode time, flashmem / vanilla" in printed
    assert files.read(tmp_path) == [document]
    assert document["exec"] == "eager" and document["before"] and document["after"]
    assert command([*line.split(), "--check", "peak-memory", "--quiet"]) == 3
    with (tmp_path / "engine" / "engine.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["check"] for row in rows] == ["monitored-row-8k", "decode-4k", "decode-4k", "peak-memory"]
    assert float(rows[1]["low"]) <= float(rows[1]["estimate"]) <= float(rows[1]["high"])
    assert rows[3]["skipped"] and not rows[3]["estimate"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--check generate-batch2", "did you mean generate-batch1"),
        ("--exec fast", "eager, compile, graph"),
        ("--runs 3", "--runs must be 5 or more"),
        ("--model-shape smoke --contexts 1000k --check decode-4k", "choose a smaller --contexts"),
    ],
)
def test_mistakes_get_one_sentence(
    options: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["engine", "--device", "cpu", "--results-dir", str(tmp_path), *options.split()]) == 2
    assert words in capsys.readouterr().err


def test_wrong_answers_end_the_command_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = checks.Check("profile", "", ("cpu",), lambda setting: Outcome("profile", gate="no", correct=False))
    monkeypatch.setattr(checks, "CHECKS", (wrong,))
    line = f"engine --model-shape smoke --device cpu --check profile --results-dir {tmp_path}"
    assert command(line.split()) == 1
