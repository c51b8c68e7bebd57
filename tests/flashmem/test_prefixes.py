"""Kept prefixes: the state that a prefill leaves, and a training that does not notice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashmem import Example, MemoryConfig, TrainConfig, new_memory, train_memory
from flashmem.memory import MemoryContext
from flashmem.prefixes import PrefixStore
from flashmem.training_loss import chained_loss, sequence_loss
from tests.flashmem.conftest import make_backbone, prompts_of

LENGTHS = (9, 5, 12)


@pytest.mark.parametrize("keep_inputs", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, (7, 7)])
def test_a_restored_state_is_the_prefilled_one(family: str, lengths, keep_inputs: bool) -> None:
    backbone, prompts = make_backbone(family), prompts_of(*lengths)
    store = PrefixStore(backbone, prompts, room=2**20)
    store.prefill(prompts[::-1])
    found, plain = store.prefill(prompts, keep_inputs=keep_inputs), backbone.prefill(prompts, keep_inputs=keep_inputs)
    assert (store.met, store.found) == (2 * len(prompts), len(prompts))
    for name in ("latents", "next_position"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    assert (found.encoded, found.lengths) == (plain.encoded, plain.lengths)
    for name in ("logits", "hidden"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=1e-4, atol=1e-4)
    assert (found.inputs is not None) == keep_inputs
    tokens = torch.tensor([3] * len(prompts))
    for state in (found, plain):
        backbone.step(state, tokens)
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["consolidator", "separate-encoder", "weaver"])
def test_losses_and_gradients_do_not_change(source: str) -> None:
    backbone, prompts = make_backbone(), prompts_of(*LENGTHS)
    targets = [[5, 6, 7], [8, 2], [9, 4, 3, 2]]
    torch.manual_seed(0)
    memory = new_memory(MemoryConfig(source=source, length=3), backbone)
    store = PrefixStore(backbone, prompts, room=2**20)
    store.prefill(prompts)
    found = []
    for prefill in (None, store.prefill):
        memory.zero_grad()
        loss, tokens = sequence_loss(backbone, memory, prompts, targets, keep=0.5, prefill=prefill)
        chained, more = chained_loss(backbone, memory, prompts, [[t[:1], t[1:]] for t in targets], prefill)
        (loss + chained).backward()
        gradient = torch.cat([p.grad.flatten() for p in memory.trained().values()])
        found.append((loss, chained, tokens, more, gradient))
    assert found[0][2:4] == found[1][2:4]
    for one, other in zip(found[0], found[1], strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_what_lies_behind_a_prompt_is_encoded_on_top_of_it(family: str) -> None:
    backbone, prompts = make_backbone(family), prompts_of(*LENGTHS)
    longer = [prompt + rest for prompt, rest in zip(prompts, ([], [5, 6, 7], [8]), strict=True)]
    store = PrefixStore(backbone, prompts, room=2**20)
    store.prefill(prompts)
    found, plain = store.prefill(longer), backbone.prefill(longer)
    assert store.found == 3 and found.encoded == plain.encoded == [9, 8, 13]
    assert torch.equal(found.next_position, plain.next_position)
    for state in (found, plain):
        torch.testing.assert_close(state.logits, plain.logits, rtol=1e-4, atol=1e-4)
        backbone.step(state, torch.tensor([3, 4, 5]))
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-4, atol=1e-4)
    store.prefill([prompts[1] + [5], [1, 2, 3]])
    assert store.found == 4, "a prefix that begins with no prompt stands for itself"


def test_a_full_store_goes_on_and_keeps_what_it_has() -> None:
    backbone, prompts = make_backbone(), prompts_of(*LENGTHS)
    whole = PrefixStore(backbone, prompts, room=2**20)
    whole.prefill(prompts)
    store = PrefixStore(backbone, prompts, room=(2**20 - whole.room) - 1)
    for _ in range(2):
        state = store.prefill(prompts)
        torch.testing.assert_close(state.logits, backbone.prefill(prompts).logits, rtol=1e-4, atol=1e-4)
    assert 0 < store.found < len(prompts) and store.room >= 0
    twice = store.prefill([prompts[0], prompts[0]])
    assert torch.equal(twice.logits[0], twice.logits[1]), "one prompt twice in a batch is encoded once"


@pytest.mark.parametrize("insertion", ["prompt-end", "mixed", "delimiters"])
def test_training_with_kept_prefixes_ends_where_it_ends_without(insertion: str) -> None:
    backbone = make_backbone()
    examples = [Example(prompt, [20, 21, 22, 2]) for prompt in prompts_of(*[6 + i % 5 for i in range(24)], seed=11)]
    config = TrainConfig(lr=3e-3, batch_size=8, max_steps=8, clip=1.0, insertion=insertion)
    ends = []
    for gib in (0.0, 1.0):
        torch.manual_seed(0)
        memory = new_memory(MemoryConfig(source="consolidator", length=4), backbone)
        report = train_memory(backbone, memory, examples, replace(config, prefix_gib=gib))
        state = backbone.prefill([examples[0].prompt_ids])
        with torch.no_grad():
            ends.append((torch.tensor(report.losses), memory(MemoryContext(backbone, state, [0]))))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-2, atol=1e-2)
