"""KV eviction: scores against full attention matrices, what is kept, what is left alone."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from flashmem import ConfigError, generate
from flashmem.eviction import POLICIES, EvictionConfig, prefill_and_evict
from tests.flashmem.conftest import make_backbone, prompts_of, reference_model

FULL = ("qwen2", "qwen3", "llama")
T, BUDGET = 30, 12


def _expected(policy: str, weights: torch.Tensor, groups: int) -> torch.Tensor:
    """Kept positions `[G, budget]` from one layer's whole attention matrix `[H, T, T]`, by the papers' definitions."""
    heads = weights.shape[0]
    if policy == "streaming-llm":
        return torch.tensor([*range(4), *range(T - BUDGET + 4, T)]).expand(groups, -1)
    if policy == "tova":
        votes = weights[:, -1].mean(0).expand(groups, -1).clone()
        votes[:, -1] = 9.0
    elif policy == "h2o":
        votes = weights.sum(1).view(groups, heads // groups, T).mean(1)
        votes[:, T - BUDGET // 2 :] = 9e9
    else:
        window = BUDGET // 2
        old = weights[:, -window:, : T - window].mean(1)
        padded = torch.nn.functional.pad(old, (2, 2))
        smooth = torch.stack([padded[:, i : i + 5].sum(1) / 5 for i in range(T - window)], 1)
        votes = smooth.view(groups, heads // groups, -1).mean(1)
        votes = torch.cat([votes, torch.full((groups, window), 9.0)], 1)
    return votes.topk(BUDGET).indices.sort().values


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FULL)
def test_what_is_kept_is_what_the_definition_keeps(policy: str, family: str) -> None:
    backbone, prompt = make_backbone(family), prompts_of(T)
    state = prefill_and_evict(backbone, prompt, EvictionConfig(policy, BUDGET))
    model = reference_model(family, "eager")
    output = model(torch.tensor(prompt), output_attentions=True, use_cache=True)
    torch.testing.assert_close(state.logits[0], output.logits[0, -1], rtol=1e-4, atol=1e-4)
    slim = DynamicCache()
    for layer, weights in enumerate(output.attentions):
        entry = output.past_key_values.layers[layer]
        kept = _expected(policy, weights[0], entry.keys.shape[1])[None, ..., None].expand(-1, -1, -1, 8)
        keys, values = entry.keys.gather(2, kept), entry.values.gather(2, kept)
        torch.testing.assert_close(state.keys_values(layer)[0], keys, rtol=1e-4, atol=1e-4)
        slim.update(keys, values, layer)
    assert state.evicted == [T - BUDGET] and state.encoded == [T]
    backbone.step(state, torch.tensor([40]))
    place = torch.tensor([[T]])
    mask = torch.ones(1, 1, 1, BUDGET + 1, dtype=torch.bool)
    later = model.model(torch.tensor([[40]]), past_key_values=slim, position_ids=place, attention_mask=mask)
    torch.testing.assert_close(state.hidden, later.last_hidden_state[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_within_the_budget_is_untouched(policy: str, backbone) -> None:
    config = GenerationConfig(max_new_tokens=8, eos_token_id=99999)
    plain = generate(backbone, prompts_of(T), generation_config=config)
    runs = {}
    for budget in (T, T - 1):
        eviction = EvictionConfig(policy, budget)
        (runs[budget],) = generate(
            backbone,
            prompts_of(T),
            generation_config=config,
            prefill=lambda prompts, eviction=eviction: prefill_and_evict(backbone, prompts, eviction),
        )
    assert runs[T].token_ids == plain[0].token_ids and runs[T].positions_evicted == 0
    assert runs[T - 1].positions_evicted == 1
    assert runs[T - 1].positions_encoded == plain[0].positions_encoded


def test_chunks_of_queries_do_not_change_what_is_kept(monkeypatch) -> None:
    backbone = make_backbone("llama")
    whole = prefill_and_evict(backbone, prompts_of(T), EvictionConfig("h2o", BUDGET))
    monkeypatch.setattr("flashmem.eviction._CHUNK", 7)
    chunked = prefill_and_evict(backbone, prompts_of(T), EvictionConfig("h2o", BUDGET))
    torch.testing.assert_close(whole.keys_values(1)[0], chunked.keys_values(1)[0])


def test_what_cannot_be_evicted_is_refused(backbone) -> None:
    with pytest.raises(ConfigError, match="full attention in every layer"):
        prefill_and_evict(make_backbone("mistral"), prompts_of(T), EvictionConfig("tova", BUDGET))
    with pytest.raises(ConfigError, match="one length"):
        prefill_and_evict(backbone, prompts_of(T, 9), EvictionConfig("tova", BUDGET))
    with pytest.raises(ConfigError, match="sinks"):
        EvictionConfig("streaming-llm", 4)
    with pytest.raises(ConfigError, match="use one of"):
        EvictionConfig("lru", 40)


def test_a_shared_prefill_continues_as_separate_ones_do(backbone) -> None:
    config = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=1.5, eos_token_id=99999)

    def shared(prompts):
        state = backbone.prefill(prompts[:1])
        state.repeat(3)
        return state

    together = generate(backbone, prompts_of(11) * 3, generation_config=config, seed=4, prefill=shared)
    apart = generate(backbone, prompts_of(11) * 3, generation_config=config, seed=4)
    assert [run.token_ids for run in together] == [run.token_ids for run in apart]
    assert len({tuple(run.token_ids) for run in together}) == 3
    assert [run.positions_encoded for run in together] == [11 + 7, 7, 7]
