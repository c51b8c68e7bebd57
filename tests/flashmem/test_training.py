"""Training fits the source and nothing else; calibration pools what it says."""

from __future__ import annotations

import numpy as np
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
from flashmem.training import sequence_loss, target_entropies
from tests.flashmem.conftest import make_backbone, prompts_of

FAST = TrainConfig(lr=3e-3, batch_size=8, max_steps=25, clip=1.0)


def _examples(n: int = 32) -> list[Example]:
    """A toy task: whatever the prompt, answer 20 21 22 and stop."""
    return [Example(p, [20, 21, 22, 2]) for p in prompts_of(*[6 + i % 5 for i in range(n)], seed=11)]


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
            from flashmem.memory import MemoryContext

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


def test_teacher_forced_entropies_equal_decoding(backbone) -> None:
    config = GenerationConfig(max_new_tokens=6, eos_token_id=-1)
    prompts = prompts_of(12, 8)
    runs = generate(backbone, prompts, generation_config=config, trace=True)
    forced = target_entropies(backbone, prompts, [r.token_ids for r in runs])
    for run, row in zip(runs, forced, strict=True):
        assert row == pytest.approx(run.entropies, abs=1e-5)


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


def test_resume_continues_where_it_stopped(tmp_path) -> None:
    class Stop(Exception):
        pass

    def fit(state_dir, stop_at: int | None) -> list[float]:
        torch.manual_seed(0)
        backbone = make_backbone()
        memory = new_memory(MemoryConfig(length=3), backbone)
        config = TrainConfig(lr=3e-3, batch_size=8, max_steps=stop_at or 12)
        return train_memory(backbone, memory, _examples(), config, state_dir=state_dir).losses

    whole = fit(None, None)
    torch.manual_seed(0)
    backbone = make_backbone()
    memory = new_memory(MemoryConfig(length=3), backbone)
    config = TrainConfig(lr=3e-3, batch_size=8, max_steps=12)

    def stop(step) -> None:
        if step.step == 5:
            raise Stop

    from flashmem.training import _Trainer

    trainer = _Trainer(backbone, memory, _examples(), config, tmp_path, stop)
    with pytest.raises(Stop):
        trainer.run()
    trainer._save()
    assert fit(tmp_path, None) == pytest.approx(whole, rel=1e-5)


def test_bad_training_calls_are_named(backbone) -> None:
    memory = new_memory(MemoryConfig(), backbone)
    with pytest.raises(ConfigError, match="empty"):
        train_memory(backbone, memory, [], FAST)
    with pytest.raises(ConfigError, match="insertion"):
        TrainConfig(insertion="middle")


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
