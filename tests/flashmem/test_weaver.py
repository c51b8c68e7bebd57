"""MemGen's memory: what it computes, what its two programs share, and what each encodes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig

from flashmem import Backbone, ConfigError, MemoryConfig, TriggerConfig, generate, new_memory
from flashmem.memory import MemoryContext
from tests.flashmem.conftest import make_backbone, prompts_of, reference_model

K = 3
EVERY = TriggerConfig(kind="every", interval=4, cooldown=0, max_injections=3)


def _weaver(backbone: Backbone, init: str = "inherited"):
    torch.manual_seed(3)
    memory = new_memory(MemoryConfig(source="weaver", length=K, encoder_rank=2, init=init), backbone)
    with torch.no_grad():
        # LoRA starts at zero and would hide a mistake.
        for name, parameter in memory.named_parameters():
            if name.endswith("up"):
                parameter.normal_(0, 0.1)
    return memory.eval()


def _run(backbone: Backbone, memory, lengths=(9,), trigger=EVERY, tokens: int = 14):
    config = GenerationConfig(max_new_tokens=tokens, eos_token_id=99999)
    return generate(backbone, prompts_of(*lengths), memory=memory, trigger=trigger, generation_config=config)


def test_latents_are_the_last_states_at_the_queries_of_one_causal_pass(family: str) -> None:
    backbone = make_backbone(family)
    memory = _weaver(backbone, init="random")
    state = backbone.prefill(prompts_of(11), keep_inputs=True)
    found = memory(MemoryContext(backbone, state, [1]))
    reference = copy.deepcopy(memory.weaver[0].model)
    reference.set_attn_implementation("eager")
    history = memory.inward(backbone.embed(torch.tensor(prompts_of(11))))
    queries = memory.in_answer.norm(memory.in_answer.queries) * memory.in_answer.scale
    whole = torch.cat([history, queries[None]], 1)
    hidden = reference.model(inputs_embeds=whole, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, memory.outward(hidden[:, -K:]), rtol=1e-3, atol=1e-3)
    first = memory(MemoryContext(backbone, state, [0]))
    assert not torch.allclose(first, found), "the prompt end has a bank of its own"


def test_adapters_start_as_the_backbone(family: str) -> None:
    backbone = make_backbone(family)
    torch.manual_seed(0)
    memory = new_memory(MemoryConfig(source="weaver", length=K, encoder_rank=2), backbone)
    tokens = torch.tensor(prompts_of(8))
    plain = reference_model(family, "eager").model(input_ids=tokens).last_hidden_state
    fresh = memory.weaver[0].empty_state(1)
    torch.testing.assert_close(memory.weaver[0].extend(fresh, backbone.embed(tokens)), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(9,), (9, 5, 12)])
@pytest.mark.parametrize("tail_cache", [True, False])
def test_kept_caches_change_the_cost_and_nothing_else(family: str, lengths, tail_cache: bool) -> None:
    backbone = make_backbone(family)
    released, cached = _weaver(backbone), _weaver(backbone)
    released.drops_cache, released.tail_cache = True, tail_cache
    cached.cached = True
    slow, fast = _run(backbone, released, lengths), _run(backbone, cached, lengths)
    assert [run.token_ids for run in slow] == [run.token_ids for run in fast]
    assert [len(run.triggers) for run in slow] == [3] * len(lengths)
    assert all(a.positions_encoded > b.positions_encoded for a, b in zip(slow, fast, strict=True))


@pytest.mark.parametrize("tail_cache", [True, False])
def test_encoded_positions_are_those_of_the_formula(tail_cache: bool) -> None:
    backbone, prompt, tokens = make_backbone(), 9, 14
    memory = _weaver(backbone)
    memory.drops_cache, memory.tail_cache = True, tail_cache
    (run,) = _run(backbone, memory)
    at = [trigger.text_index for trigger in run.triggers]
    assert at == [0, 4, 8]
    whole = [prompt + t + K * (i + 1) for i, t in enumerate(at)]
    assert run.positions_woven == sum(whole)
    # Each memory encodes all; the other tokens, the last one unfed, are one step each, or all again behind the cap.
    last = at[-1]
    tail = [prompt + t + 1 + 3 * K for t in range(last, tokens - 1)]
    assert run.positions_encoded == sum(whole) + last + (len(tail) if tail_cache else sum(tail))
    cached = _weaver(backbone)
    cached.cached = True
    (run,) = _run(backbone, cached)
    assert run.positions_encoded == prompt + tokens - 1 + 3 * K
    # Queries are encoded and cropped; the latents come after them as inputs.
    assert run.positions_woven == prompt + last + 2 * K + 3 * K


def test_rows_that_do_not_trigger_are_left_as_they_are() -> None:
    backbone = make_backbone()
    trigger = TriggerConfig(kind="random", rate=0.4, cooldown=0, max_injections=3, seed=5)
    runs = {}
    for name in ("drops_cache", "cached"):
        memory = _weaver(backbone)
        setattr(memory, name, True)
        runs[name] = _run(backbone, memory, (9, 5, 12), trigger)
    moments = [[t.text_index for t in run.triggers] for run in runs["cached"]]
    assert len({tuple(m) for m in moments}) > 1, "the rows trigger apart"
    assert [r.token_ids for r in runs["drops_cache"]] == [r.token_ids for r in runs["cached"]]
    for row, length in enumerate((9, 5, 12)):
        memory = _weaver(backbone)
        memory.cached = True
        config = TriggerConfig(kind="schedule", positions=tuple(moments[row]), cooldown=0, max_injections=None)
        prompts = [prompts_of(9, 5, 12)[row]]
        generation = GenerationConfig(max_new_tokens=14, eos_token_id=99999)
        (alone,) = generate(backbone, prompts, memory=memory, trigger=config, generation_config=generation)
        assert alone.token_ids == runs["cached"][row].token_ids, f"row {row} of {length} tokens"


def test_a_weaver_without_the_history_is_refused() -> None:
    backbone = make_backbone()
    state = backbone.prefill(prompts_of(5))
    with pytest.raises(ConfigError, match="keep_inputs"):
        _weaver(backbone)(MemoryContext(backbone, state, [0]))
