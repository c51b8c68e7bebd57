"""LoRA as a rival: merged and applied are one, the backbone stays, the parameters match."""

from __future__ import annotations

import pytest
import torch

from flashmem import ConfigError, Example, MemoryConfig, TrainConfig, new_memory, train_memory
from flashmem.lora import LoRA, consolidator_parameters
from flashmem.memory import MemoryContext
from flashmem.training_loss import adapted_loss
from tests.flashmem.conftest import make_backbone, prompts_of


def _lora(backbone, rank: int | None = None) -> LoRA:
    torch.manual_seed(1)
    adapters = new_memory(MemoryConfig(source="lora", encoder_rank=rank), backbone)
    assert isinstance(adapters, LoRA)
    return adapters


def _moved(adapters: LoRA) -> LoRA:
    with torch.no_grad():
        for up in adapters.up:
            up.normal_(0, 0.1)
    return adapters


def test_merged_weights_are_the_applied_changes_and_the_backbone_stays(family: str) -> None:
    backbone = make_backbone(family)
    adapters = _moved(_lora(backbone, rank=2))
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    plain = backbone.prefill(prompts_of(9)).logits
    with adapters.applied(backbone):
        applied = backbone.prefill(prompts_of(9)).logits
    changed = adapters.merged(backbone)
    torch.testing.assert_close(changed.prefill(prompts_of(9)).logits, applied, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(applied, plain, atol=1e-2)
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.model.state_dict().items())
    torch.testing.assert_close(backbone.prefill(prompts_of(9)).logits, plain)
    table = backbone.model.get_input_embeddings().weight
    assert changed.model.get_input_embeddings().weight is table, "what is not changed is shared"


def test_untrained_it_is_the_backbone_and_its_loss_the_plain_one(backbone) -> None:
    adapters = _lora(backbone, rank=2)
    prompts, targets = prompts_of(9, 6), [[20, 21, 22], [23, 2]]
    loss, tokens = adapted_loss(backbone, adapters, prompts, targets)
    assert tokens == 5
    expected = 0.0
    for prompt, target in zip(prompts, targets, strict=True):
        logits = backbone.model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        expected -= sum(float(logits[len(prompt) - 1 + i, t]) for i, t in enumerate(target))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_it_has_the_parameters_of_the_consolidator(family: str) -> None:
    backbone = make_backbone(family)
    adapters = _lora(backbone)
    mine = sum(p.numel() for p in adapters.trained().values())
    wanted = consolidator_parameters(MemoryConfig(), backbone)
    a_rank = mine / adapters.config.encoder_rank
    assert abs(mine - wanted) <= a_rank / 2 or adapters.config.encoder_rank == 1


def test_training_lowers_the_loss_and_leaves_the_backbone(backbone) -> None:
    adapters = _lora(backbone, rank=4)
    weights = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    examples = [Example(prompts_of(5 + i % 3)[0], [30 + i % 2, 2]) for i in range(16)]
    report = train_memory(backbone, adapters, examples, TrainConfig(lr=2e-2, batch_size=8, max_steps=40, clip=1.0))
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert all(torch.equal(weight, weights[name]) for name, weight in backbone.model.state_dict().items())


def test_what_lora_cannot_do_is_refused(backbone) -> None:
    adapters = _lora(backbone, rank=2)
    with pytest.raises(ConfigError, match="no memory"):
        adapters(MemoryContext(backbone, backbone.prefill(prompts_of(5)), [0]))
    with pytest.raises(ConfigError, match="no memories"):
        train_memory(backbone, adapters, [Example([5, 6], [2])], TrainConfig(max_steps=1, insertion="mixed"))
