"""Training fits the source and nothing else; calibration pools what it says."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GenerationConfig

from flashmem import (
    CheckpointError,
    ConfigError,
    Example,
    MemoryConfig,
    Threshold,
    TrainConfig,
    TriggerConfig,
    calibrate,
    generate,
    new_memory,
    train_memory,
)
from flashmem.memory import MemoryContext
from flashmem.training import sequence_loss
from flashmem.training_data import Lessons, Placed, batches, high_place, in_pieces, place, split
from flashmem.training_loss import chained_loss, step_entropies
from tests.flashmem.conftest import make_backbone, prompts_of

FAST = TrainConfig(lr=3e-3, batch_size=8, max_steps=25, clip=1.0)


def _examples(n: int = 32) -> list[Example]:
    """A toy task: whatever the prompt, answer 20 21 22 and stop."""
    prompts = prompts_of(*[6 + i % 5 for i in range(n)], seed=11)
    return [Example(prompt, [20, 21, 22, 2], lesson=i % 3) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("source", ["consolidator", "separate-encoder", "constant"])
@pytest.mark.parametrize("insertion", ["prompt-end", "mixed"])
def test_only_the_source_learns_and_the_loss_falls(source: str, insertion: str, backbone) -> None:
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    torch.manual_seed(0)
    memory = new_memory(MemoryConfig(source=source, length=4), backbone)
    start = {n: p.detach().clone() for n, p in memory.trained().items()}
    config = TrainConfig(lr=2e-2, batch_size=8, max_steps=60, clip=1.0, insertion=insertion)
    report = train_memory(backbone, memory, _examples(), config)
    assert all(p.grad is None for p in backbone.model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in backbone.model.named_parameters())
    still = [n for n, p in memory.trained().items() if torch.equal(p, start[n])]
    assert not still
    assert np.mean(report.losses[-5:]) < 0.85 * np.mean(report.losses[:5])


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi3"])
def test_every_block_parameter_gets_a_gradient(family: str) -> None:
    backbone = make_backbone(family)
    memory = new_memory(MemoryConfig(length=2, depth=2), backbone)
    with torch.no_grad():
        memory.consolidator.seed.outer.weight.normal_(std=0.1)
    loss, tokens = sequence_loss(backbone, memory, prompts_of(9, 6), [[20, 21], [22, 2]])
    (loss / tokens).backward()
    without = [n for n, p in memory.trained().items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    assert tokens == 4


def test_loss_is_the_plain_loss_over_one_sequence(backbone) -> None:
    """The cached, padded, batched loss equals one uncached pass over [x, M, y] row by row."""
    memory = new_memory(MemoryConfig(length=3), backbone)
    prompts, targets = prompts_of(10, 7), [[20, 21, 22], [23, 2]]
    with torch.no_grad():
        loss, tokens = sequence_loss(backbone, memory, prompts, targets)
        expected = 0.0
        for prompt, target in zip(prompts, targets, strict=True):
            state = backbone.prefill([prompt])
            latents = memory(MemoryContext(backbone, state, [0]))
            text = backbone.embed(torch.tensor([prompt]))
            tail = backbone.embed(torch.tensor([target]))
            logits = backbone.model(inputs_embeds=torch.cat([text, latents, tail], 1)).logits[0]
            first = len(prompt) + 3 - 1
            expected += torch.nn.functional.cross_entropy(
                logits[first : first + len(target)], torch.tensor(target), reduction="sum"
            )
    assert tokens == 5
    torch.testing.assert_close(loss, torch.as_tensor(expected), rtol=1e-4, atol=1e-4)


def test_keep_adds_the_divergence_where_the_plain_backbone_is_right(backbone) -> None:
    memory = new_memory(MemoryConfig(length=3), backbone)
    prompts, targets = prompts_of(9, 6), prompts_of(4, 2)
    logits = {}
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        with torch.no_grad():
            ids = torch.tensor([prompt + target])
            logits[row] = backbone.model(ids).logits[0, len(prompt) - 1 : -1].float()
        # The first token of each target is what the plain backbone would say.
        targets[row][0] = int(logits[row][0].argmax())
    expected = torch.zeros(())
    for prompt, target in zip(prompts, targets, strict=True):
        state = backbone.prefill([prompt])
        latents = memory(MemoryContext(backbone, state, [0]))
        whole = torch.cat([backbone.embed(torch.tensor([prompt])), latents, backbone.embed(torch.tensor([target]))], 1)
        after = backbone.model(inputs_embeds=whole).logits[0, len(prompt) + 2 : -1].log_softmax(-1)
        before = backbone.model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        right = before.argmax(-1) == torch.tensor(target)
        expected = expected + (before.exp() * (before - after)).sum(-1)[right].sum()
    bare, _ = sequence_loss(backbone, memory, prompts, targets)
    kept, _ = sequence_loss(backbone, memory, prompts, targets, keep=2.0)
    assert float(expected.detach()) > 0
    torch.testing.assert_close(kept - bare, 2 * expected, rtol=1e-3, atol=1e-3)
    again, _ = sequence_loss(backbone, memory, prompts, targets, keep=2.0, recompute=True)
    torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-5)


def test_teacher_forced_entropies_equal_decoding(backbone) -> None:
    config = GenerationConfig(max_new_tokens=6, eos_token_id=-1)
    prompts = prompts_of(12, 8)
    runs = generate(backbone, prompts, generation_config=config, trace=True)
    forced = step_entropies(backbone, prompts, [r.token_ids for r in runs])
    for run, attention, output in zip(runs, forced["attention"], forced["output"], strict=True):
        assert attention == pytest.approx(run.entropies, abs=1e-5)
        assert output == pytest.approx(run.output_entropies, abs=1e-4)


def test_mixed_memories_stand_where_the_triggers_fire(backbone) -> None:
    entropies = [float(i) for i in range(20)]
    assert {high_place(entropies, draw / 10) for draw in range(10)} == {17, 18, 19}
    assert high_place([0.2, 0.1], 0.99) == 0
    prompts, targets = prompts_of(9, 6), prompts_of(8, 5)
    examples = [Example(p, t) for p, t in zip(prompts, targets, strict=True)]
    drawn = [row for step in range(60) for row in place(examples, "mixed", f"0|{step}")]
    assert 40 < sum(row.cut == 0 for row in drawn) < 85
    assert {row.signal for row in drawn if row.cut is None} == {"attention", "output"}
    chosen = [Placed(e, None, signal, 0.0) for e in examples for signal in ("attention", "output")]
    prefixes, rest = split(backbone, chosen)
    found = step_entropies(backbone, prompts, targets)
    for row, prefix, target in zip(chosen, prefixes, rest, strict=True):
        assert prefix + target == row.example.prompt_ids + row.example.target_ids and target
        values = found[row.signal][examples.index(row.example)]
        assert values[len(prefix) - len(row.example.prompt_ids)] == pytest.approx(max(values), abs=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("source", ["consolidator", "separate-encoder"])
def test_a_bfloat16_backbone_trains_a_float32_memory(family: str, source: str) -> None:
    backbone = make_backbone(family)
    backbone.model.to(torch.bfloat16)
    torch.manual_seed(0)
    memory = new_memory(MemoryConfig(source=source, length=3), backbone)
    seen = set()
    config = TrainConfig(lr=1e-5, batch_size=8, max_steps=3, insertion="mixed")
    start = {n: p.detach().float().clone() for n, p in memory.trained().items()}
    moved = {}

    def note(step) -> None:
        seen.update(p.dtype for p in memory.trained().values())
        moved.update({n: float((p.detach() - start[n]).abs().max()) for n, p in memory.trained().items()})

    report = train_memory(backbone, memory, _examples(), config, on_step=note)
    assert seen == {torch.float32} and all(np.isfinite(report.losses))
    assert all(0 < step < 1e-3 for step in moved.values()), "a step of this size would vanish in bfloat16"
    assert {p.dtype for p in memory.trained().values()} == {torch.bfloat16}
    assert backbone.dtype == torch.bfloat16
    run = generate(
        backbone,
        prompts_of(9),
        memory=memory,
        trigger=TriggerConfig(kind="prompt-end"),
        generation_config=GenerationConfig(max_new_tokens=4),
    )
    assert run[0].latent_tokens == 3


def test_firing_memories_stand_in_the_answer_and_a_horizon_ends_what_counts(backbone) -> None:
    example = Example(prompts_of(9)[0], [20, 21, 22, 23, 24, 2])
    rows = place([example] * 800, "firing", "key")
    shares = {name: sum(row.cut is None and row.signal == name for row in rows) for name in ("attention", "output")}
    assert 60 < shares["attention"] < 140 and 440 < shares["output"] < 560
    assert 60 < sum(row.cut == 0 for row in rows) < 150
    whole, near = (split(backbone, rows[:40], horizon) for horizon in (None, 2))
    assert near[0] == whole[0]
    assert near[1] == [target[:2] for target in whole[1]]
    assert max(len(target) for target in whole[1]) > 2


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def _fit(config: TrainConfig, *, family: str = "qwen2", stop_at: int | None = None, length: int = 3, **more):
    """Train a fresh memory on a fresh backbone; returns its parameters and the report (None when it was killed)."""
    backbone = make_backbone(family)
    torch.manual_seed(0)
    memory = new_memory(MemoryConfig(length=length, depth=2), backbone)

    def stop(step) -> None:
        if step.step == stop_at:
            raise Killed

    try:
        report = train_memory(backbone, memory, _examples(), config, on_step=stop, **more)
    except Killed:
        report = None
    return {n: p.detach().clone() for n, p in memory.trained().items()}, report


def _assert_same(a: dict, b: dict, **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("insertion", ["prompt-end", "mixed"])
@pytest.mark.parametrize("micro", [1, 3])
def test_accumulated_micro_batches_are_one_big_batch(insertion: str, micro: int) -> None:
    """The mean runs over all target tokens of the step: rows of unequal length would tell a mean of means."""
    config = TrainConfig(lr=1e-3, batch_size=8, max_steps=1, insertion=insertion)
    _, whole = _fit(config)
    _, parts = _fit(replace(config, micro_batch_size=micro))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert parts.curve[0].grad_norm == pytest.approx(whole.curve[0].grad_norm, rel=1e-4)
    assert parts.target_tokens == whole.target_tokens


@pytest.mark.parametrize("latent_attention", ["none", "earlier"])
def test_checkpointed_gradients_are_the_plain_ones(family: str, latent_attention: str) -> None:
    backbone = make_backbone(family)
    torch.manual_seed(0)
    memory = new_memory(MemoryConfig(length=2, depth=1, latent_attention=latent_attention), backbone)
    prompts, targets = prompts_of(15, 9), [[20, 21, 22, 23], [24, 2]]
    found = []
    for recompute in (False, True):
        memory.zero_grad(set_to_none=True)
        loss, _ = sequence_loss(backbone, memory, prompts, targets, recompute=recompute)
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in memory.trained().items() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert len(found[0][1]) > 4
    _assert_same(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
    assert not any("forward" in layer.__dict__ for layer in backbone.decoder.layers)


def test_checkpointing_keeps_less(backbone) -> None:
    """What the layers leave for the backward pass, in elements, counted by autograd's own hooks."""
    memory = new_memory(MemoryConfig(length=2), backbone)
    kept = {}
    for recompute in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            sequence_loss(backbone, memory, prompts_of(30), [[20] * 40], recompute=recompute)
        kept[recompute] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.parametrize(("insertion", "lessons"), [("prompt-end", ()), ("mixed", (0.3, 0.6))])
def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch, insertion: str, lessons) -> None:
    monkeypatch.setattr("flashmem.training._SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("flashmem.training._SAVE_SHARE", 1e9)
    held_out = _examples()[:6]
    config = TrainConfig(
        lr=3e-3,
        batch_size=8,
        max_steps=9,
        insertion=insertion,
        horizon=2 if lessons else None,
        validate_every=2,
        patience=9,
        micro_batch_size=4,
        lessons=lessons,
    )
    plain, whole = _fit(config, validation=held_out, curves=tmp_path / "whole.csv")
    where = dict(state_dir=tmp_path / "state", validation=held_out, curves=tmp_path / "curves.csv")
    for killed_at in (3, 6):
        _, report = _fit(config, stop_at=killed_at, **where)
        assert report is None
    resumed, report = _fit(config, **where)
    _assert_same(plain, resumed, rtol=0, atol=0)
    assert report.losses == whole.losses and report.best_step == whole.best_step
    tables = [pd.read_csv(tmp_path / name) for name in ("whole.csv", "curves.csv")]
    assert list(tables[1]["step"]) == list(range(1, 10))
    pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in tables))
    assert tables[1]["validation_loss_nats_token"].notna().tolist() == [False, True] * 4 + [True]
    assert (tables[1]["seconds"].diff().dropna() > 0).all()


def test_each_step_takes_from_the_lesson_that_is_on_and_a_resumed_run_from_the_same_place() -> None:
    progress = [step / 20 for step in range(20)]
    whole = Lessons(_examples(30), (0.25, 0.5), 4, seed=1)
    batches = [whole.next(p) for p in progress]
    expected = [0] * 5 + [1] * 5 + [2] * 10
    assert [{e.lesson for e in batch} for batch in batches] == [{lesson} for lesson in expected]
    for taken in (3, 7, 16):
        resumed = Lessons(_examples(30), (0.25, 0.5), 4, seed=1, seen=progress[:taken])
        assert [resumed.next(p) for p in progress[taken:]] == batches[taken:]
    mixed = Lessons(_examples(30), (), 30, seed=1)
    assert {e.lesson for e in mixed.next(0.0) + mixed.next(0.0)} == {0, 1, 2}


def test_who_shares_a_batch_does_not_depend_on_length() -> None:
    # Two kinds of question that length tells apart: batches by length would each be of one kind.
    long_ones = [Example([7] * (9 if i % 2 else 6), [i, 2]) for i in range(320)]
    stream = batches(long_ones, 32, seed=3)
    epoch = [next(stream) for _ in range(10)]
    assert sorted(e.target_ids[0] for batch in epoch for e in batch) == list(range(320)), "each once an epoch"
    shares = [sum(len(e.prompt_ids) == 9 for e in batch) / 32 for batch in epoch]
    assert 0.2 < min(shares) < max(shares) < 0.8
    for batch in epoch:
        lengths = [len(e.prompt_ids) for e in batch]
        assert lengths == sorted(lengths), "so that micro batches need little padding"
    stream = batches(long_ones, 32, seed=3, batching="length")
    epoch = [next(stream) for _ in range(10)]
    assert sorted(e.target_ids[0] for batch in epoch for e in batch) == list(range(320))
    assert all(len({len(e.prompt_ids) for e in batch}) == 1 for batch in epoch)


def test_lessons_that_cannot_be_given_are_refused() -> None:
    with pytest.raises(ConfigError, match="Lesson 2 has no examples"):
        Lessons([e for e in _examples(30) if e.lesson < 2], (0.2, 0.4), 4, seed=0)
    for starts in ((0.5, 0.2), (0.0,), (1.0,)):
        with pytest.raises(ConfigError, match="lessons"):
            TrainConfig(lessons=starts)


def test_another_training_is_not_resumed(tmp_path) -> None:
    config = TrainConfig(lr=3e-3, batch_size=8, max_steps=2)
    _fit(config, state_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"lr 0\.003 there and 0\.001 here"):
        _fit(replace(config, lr=1e-3), state_dir=tmp_path)
    with pytest.raises(ConfigError, match="memory"):
        _fit(config, length=4, state_dir=tmp_path)
    _, report = _fit(replace(config, micro_batch_size=2, activation_checkpointing=True), state_dir=tmp_path)
    assert report.steps == 2
    (tmp_path / "training.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="cannot be read"):
        _fit(config, state_dir=tmp_path)


def test_early_stopping_returns_the_best_parameters() -> None:
    """The training set teaches the opposite of what is held out: the loss there rises as soon as it works."""
    torch.manual_seed(0)
    backbone = make_backbone()
    memory = new_memory(MemoryConfig(length=3), backbone)
    held_out = [Example(p, [60, 61, 62, 2]) for p in prompts_of(7, 8, 9, seed=3)]
    seen: dict[int, dict] = {}

    def note(step) -> None:
        seen[step.step] = {n: p.detach().clone() for n, p in memory.trained().items()}

    config = TrainConfig(lr=2e-2, batch_size=8, max_steps=60, clip=1.0, validate_every=2, patience=3)
    report = train_memory(backbone, memory, _examples(), config, validation=held_out, on_step=note)
    measured = {s.step: s.validation_loss for s in report.curve if s.validation_loss is not None}
    best = min(measured, key=measured.__getitem__)
    assert report.stopped_early and report.steps < 60 and report.steps == best + 2 * 3
    assert report.best_step == best and report.best_validation_loss == pytest.approx(measured[best])
    _assert_same(seen[best], {n: p.detach() for n, p in memory.trained().items()}, rtol=0, atol=0)
    with torch.no_grad():
        loss, tokens = sequence_loss(
            backbone, memory, [e.prompt_ids for e in held_out], [e.target_ids for e in held_out]
        )
    assert float(loss) / tokens == pytest.approx(report.best_validation_loss, rel=1e-4)


def _one_of_two(rank: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    from flashmem.placement import processes

    together = processes()
    parameters, report = _fit(PARALLEL, processes=together, **_parallel_files(folder))
    torch.save((parameters, report.curve), f"{folder}/rank{rank}.pt")
    torch.save(together.merge([2 * item for item in together.mine(range(5))]), f"{folder}/merged{rank}.pt")


# The last batch of an epoch has one row: one of the processes has nothing to do there.
PARALLEL = TrainConfig(lr=1e-3, batch_size=31, max_steps=3, insertion="mixed", micro_batch_size=6, validate_every=2)


def _parallel_files(folder) -> dict:
    return dict(state_dir=f"{folder}/state", curves=f"{folder}/curves.csv", validation=_examples()[:5])


def test_a_dispatched_backbone_trains_like_a_plain_one() -> None:
    """accelerate's hooks of a placement over devices stay on the backbone and off the copies that learn."""
    from accelerate import dispatch_model

    losses = []
    for spread_out in (False, True):
        backbone = make_backbone()
        if spread_out:
            parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
            layers = {f"model.layers.{i}": "cpu" for i in range(backbone.num_layers)}
            dispatch_model(backbone.model, parts | layers, main_device="cpu", force_hooks=True)
            assert hasattr(backbone.decoder.layers[0], "_hf_hook")
        torch.manual_seed(0)
        memory = new_memory(MemoryConfig(length=3, depth=2), backbone)
        assert not any(hasattr(part, "_hf_hook") for part in memory.modules())
        config = TrainConfig(lr=1e-3, batch_size=8, max_steps=2, activation_checkpointing=True)
        losses.append(train_memory(backbone, memory, _examples(), config).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_two_processes_make_the_step_of_one(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    both = [context.Process(target=_one_of_two, args=(rank, port, str(tmp_path))) for rank in (0, 1)]
    for process in both:
        process.start()
    _, whole = _fit(PARALLEL, validation=_examples()[:5])
    for process in both:
        process.join()
        assert process.exitcode == 0
    for rank in (0, 1):
        parameters, curve = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert curve[0].loss == pytest.approx(whole.losses[0], rel=1e-5)
        assert curve[0].grad_norm == pytest.approx(whole.curve[0].grad_norm, rel=1e-4)
        assert [step.target_tokens for step in curve] == [step.target_tokens for step in whole.curve]
        # Where a gradient is near zero, AdamW's first steps are its sign: rounding shows from the second step on.
        assert [step.loss for step in curve] == pytest.approx(whole.losses, rel=2e-3)
        assert curve[-1].validation_loss == pytest.approx(whole.curve[-1].validation_loss, rel=2e-3)
        others = torch.load(tmp_path / "rank0.pt", weights_only=False)[0]
        _assert_same(others, parameters, rtol=0, atol=0)
        assert torch.load(tmp_path / f"merged{rank}.pt") == [0, 2, 4, 6, 8]
    assert len(pd.read_csv(tmp_path / "curves.csv")) == 3


def test_bad_training_calls_are_named(backbone) -> None:
    memory = new_memory(MemoryConfig(), backbone)
    with pytest.raises(ConfigError, match="empty"):
        train_memory(backbone, memory, [], FAST)
    with pytest.raises(ConfigError, match="insertion"):
        TrainConfig(insertion="middle")
    with pytest.raises(ConfigError, match="micro_batch_size is 0"):
        TrainConfig(micro_batch_size=0)
    with pytest.raises(ConfigError, match="validate_every"):
        TrainConfig(patience=2)
    with pytest.raises(ConfigError, match="held-out"):
        train_memory(backbone, memory, _examples(), TrainConfig(validate_every=2))


def test_threshold_is_the_percentile_of_all_steps(backbone) -> None:
    config = GenerationConfig(max_new_tokens=5, eos_token_id=-1)
    prompts = prompts_of(*range(8, 20))
    runs = [generate(backbone, [p], generation_config=config, trace=True)[0] for p in prompts]
    pooled = [h for r in runs for h in r.entropies]
    found = calibrate(backbone, prompts, generation_config=config, percentile=85)
    assert found.n_steps == len(pooled) == 12 * 5
    assert found.value == pytest.approx(np.percentile(pooled, 85), rel=1e-6)
    assert found.low <= found.value <= found.high
    assert found.at(85) == pytest.approx(found.value, rel=1e-6)
    assert found.at(50.5) == pytest.approx((found.at(50) + found.at(51)) / 2)
    assert found.provenance["monitor"]["layer"] == 2
    assert Threshold.from_json(found.to_json()) == found
    with pytest.raises(CheckpointError, match="calibrate again"):
        Threshold.from_json("{}")


def test_output_entropy_threshold(backbone) -> None:
    config = GenerationConfig(max_new_tokens=3, eos_token_id=-1)
    (prompt,) = prompts_of(9)
    found = calibrate(backbone, [prompt], generation_config=config, kind="output-entropy", percentile=100)
    with torch.no_grad():
        logits = backbone.prefill([prompt]).logits
    first = torch.distributions.Categorical(logits=logits).entropy()
    assert found.value >= float(first) - 1e-5
    with pytest.raises(ConfigError, match="empty"):
        calibrate(backbone, [], generation_config=config)


def test_a_chain_of_memories_is_the_loss_of_each_piece_in_turn(backbone) -> None:
    """One row at a time, one piece after the other, everything encoded by hand."""
    torch.manual_seed(0)
    memory = new_memory(MemoryConfig(source="weaver", length=3, encoder_rank=2), backbone).eval()
    prompts, pieces = prompts_of(9, 6), [[[20, 21, 3], [22, 2]], [[23, 24, 25, 26, 2]]]
    loss, tokens = chained_loss(backbone, memory, prompts, pieces)
    assert tokens == 10
    expected = 0.0
    for prompt, row in zip(prompts, pieces, strict=True):
        state = backbone.prefill([prompt], keep_inputs=True)
        for index, piece in enumerate(row):
            backbone.inject(state, memory(MemoryContext(backbone, state, [index])))
            for token in piece:
                expected -= float(state.logits.log_softmax(-1)[0, token].detach())
                backbone.step(state, torch.tensor([token]))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    silent = [name for name, parameter in memory.trained().items() if parameter.grad is None]
    assert not silent, "both banks and every map learn"


def test_answers_are_cut_behind_their_first_delimiters(backbone) -> None:
    assert in_pieces(backbone, [20, 3, 21, 22, 3, 2]) == [[20, 3], [21, 22, 3], [2]]
    assert in_pieces(backbone, [20, 21, 3]) == [[20, 21, 3]]
    assert len(in_pieces(backbone, [3] * 20)) == 6


def test_delimiters_train_every_place_and_refuse_what_needs_one_memory(backbone) -> None:
    torch.manual_seed(0)
    memory = new_memory(MemoryConfig(source="weaver", length=2, encoder_rank=2), backbone)
    examples = [Example(prompts_of(6)[0], [30, 3, 31, 3, 2])] * 8
    config = TrainConfig(lr=1e-2, batch_size=8, max_steps=30, clip=1.0, insertion="delimiters")
    report = train_memory(backbone, memory, examples, config)
    assert report.losses[-1] < 0.5 * report.losses[0]
    with pytest.raises(ConfigError, match="one memory an answer"):
        TrainConfig(insertion="delimiters", keep=1.0)
