"""Log-likelihoods behind a prompt against full passes of transformers, and what they cost in positions."""

from __future__ import annotations

import pytest
import torch

from flashmem import ConfigError, MemoryConfig, PromptTooLongError, TriggerConfig, new_memory, score
from flashmem.backbone import Backbone
from flashmem.eviction import EvictionConfig, prefill_and_evict
from tests.flashmem.conftest import make_backbone, prompts_of, reference_model

AT_END = TriggerConfig(kind="prompt-end")


def _full_pass(family: str, backbone: Backbone, prompt: list[int], latents: torch.Tensor | None, rest: list[int]):
    """Sum of the log-probabilities of `rest`, and whether it is greedy, from one pass of transformers."""
    model = reference_model(family, "eager" if family == "gemma2" else "sdpa")
    with torch.inference_mode():
        parts = [backbone.embed(torch.tensor([prompt]))]
        parts += [latents[None].to(backbone.dtype)] if latents is not None else []
        parts += [backbone.embed(torch.tensor([rest]))]
        logits = model(inputs_embeds=torch.cat(parts, 1)).logits[0, -len(rest) - 1 : -1]
    log_p = logits.float().log_softmax(-1)
    wanted = torch.tensor(rest)
    return float(log_p.gather(-1, wanted[:, None]).sum()), bool((log_p.argmax(-1) == wanted).all())


def _memory(backbone: Backbone, source: str = "consolidator", **more):
    torch.manual_seed(0)
    return new_memory(MemoryConfig(source=source, length=3, **more), backbone)


def _keeping(memory):
    """Collect what a memory writes."""
    written = []
    memory.register_forward_hook(lambda module, inputs, output: written.append(output[0].detach().clone()))
    return written


def test_plain_sums_equal_a_full_pass_of_transformers(family: str) -> None:
    backbone = make_backbone(family)
    # Longer than the window of the sliding families; of one token, of several, of equal and different lengths.
    (prompt,), choices = prompts_of(21), prompts_of(1, 5, 2, 5, 1, seed=5)
    found = score(backbone, prompt, choices)
    wanted = [_full_pass(family, backbone, prompt, None, tokens) for tokens in choices]
    assert found.log_likelihoods == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert found.greedy == [hit for _, hit in wanted]
    # The prompt once, and of each continuation all but its last token.
    assert found.generation.positions_encoded == 21 + 4 + 1 + 4
    assert found.generation.finish_reason == "scored" and found.generation.output_tokens == 0


def test_sums_behind_a_memory_equal_a_full_pass_over_its_latents(family: str) -> None:
    backbone = make_backbone(family)
    memory = _memory(backbone)
    written = _keeping(memory)
    (prompt,), choices = prompts_of(17), prompts_of(4, 1, 3, seed=9)
    found = score(backbone, prompt, choices, memory=memory, trigger=AT_END)
    # One memory, shared by all.
    (latents,) = written
    wanted = [_full_pass(family, backbone, prompt, latents, tokens)[0] for tokens in choices]
    assert found.log_likelihoods == pytest.approx(wanted, abs=1e-4)
    assert score(backbone, prompt, choices).log_likelihoods != pytest.approx(wanted, abs=1e-2)
    (trigger,) = found.generation.triggers
    assert (trigger.text_index, trigger.position, trigger.latents) == (0, 17, 3)
    assert found.generation.positions_encoded == 17 + 3 + 3 + 2


@pytest.mark.parametrize("copied", [1, 60, 10_000])
def test_taking_turns_on_one_cache_gives_what_copies_give(copied: int, family: str, monkeypatch) -> None:
    backbone = make_backbone(family)
    memory, (prompt,), choices = _memory(backbone), prompts_of(20), prompts_of(6, 2, 4, 1, 3, seed=2)
    apart = [score(backbone, prompt, [tokens], memory=memory, trigger=AT_END) for tokens in choices]
    monkeypatch.setattr("flashmem.scoring._COPIED_POSITIONS", copied)
    together = score(backbone, prompt, choices, memory=memory, trigger=AT_END)
    assert together.log_likelihoods == pytest.approx([one.log_likelihoods[0] for one in apart], abs=1e-4)
    assert together.greedy == [one.greedy[0] for one in apart]
    assert together.generation.positions_encoded == 20 + 3 + 5 + 1 + 3 + 2


@pytest.mark.parametrize("trigger", [None, AT_END])
def test_the_tail_of_a_prompt_counts_and_the_memory_stays_behind_it(trigger, family: str) -> None:
    backbone = make_backbone(family)
    memory = _memory(backbone)
    written = _keeping(memory)
    (prompt,), choices = prompts_of(15), prompts_of(2, 3, seed=4)
    given = {"memory": memory, "trigger": trigger} if trigger else {}
    found = score(backbone, prompt, choices, tail=2, **given)
    lead = _full_pass(family, backbone, prompt[:-2], None, prompt[-2:])[0]
    latents = written[0] if trigger else None
    wanted = [lead + _full_pass(family, backbone, prompt, latents, tokens)[0] for tokens in choices]
    assert found.log_likelihoods == pytest.approx(wanted, abs=1e-4)
    assert found.generation.positions_encoded == 15 + (3 if trigger else 0) + 1 + 2


def test_greedy_is_what_decoding_would_write(backbone) -> None:
    from transformers import GenerationConfig

    from flashmem import generate

    memory, (prompt,) = _memory(backbone), prompts_of(12)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    (written,) = generate(backbone, [prompt], memory=memory, trigger=AT_END, generation_config=config)
    other = [*written.token_ids[:-1], (written.token_ids[-1] + 1) % 90 + 4]
    found = score(backbone, prompt, [written.token_ids, other], memory=memory, trigger=AT_END)
    assert found.greedy == [True, False]


def test_an_entropy_trigger_decides_once_at_the_prompt_end(backbone) -> None:
    memory, (prompt,), choices = _memory(backbone), prompts_of(14), prompts_of(3, 3, seed=1)
    plain = score(backbone, prompt, choices)
    watched = score(backbone, prompt, choices, memory=memory, trigger=TriggerConfig(threshold=1e9))
    assert watched.log_likelihoods == pytest.approx(plain.log_likelihoods, abs=1e-5)
    assert watched.generation.triggers == [] and watched.generation.above_threshold == 0
    (entropy,) = watched.generation.entropies
    fired = score(backbone, prompt, choices, memory=memory, trigger=TriggerConfig(threshold=entropy / 2))
    certain = score(backbone, prompt, choices, memory=memory, trigger=AT_END)
    assert fired.log_likelihoods == pytest.approx(certain.log_likelihoods, abs=1e-5)
    assert fired.generation.above_threshold == 1 and len(fired.generation.triggers) == 1


def test_logits_from_before_the_memory_judge_the_first_token_only(backbone) -> None:
    memory, (prompt,), choices = _memory(backbone), prompts_of(14), prompts_of(1, 3, seed=1)
    plain = score(backbone, prompt, choices)
    literal = score(backbone, prompt, choices, memory=memory, trigger=AT_END, sampling_logits="pre")
    assert literal.log_likelihoods[0] == pytest.approx(plain.log_likelihoods[0], abs=1e-5)
    assert literal.log_likelihoods[1] != pytest.approx(plain.log_likelihoods[1], abs=1e-3)


@pytest.mark.parametrize("source", ["separate-encoder", "constant", "weaver"])
def test_every_memory_source_is_scored_like_the_full_pass(source: str, backbone) -> None:
    memory = _memory(backbone, source)
    written = _keeping(memory)
    (prompt,), choices = prompts_of(13), prompts_of(3, 2, seed=8)
    found = score(backbone, prompt, choices, memory=memory, trigger=AT_END)
    wanted = [_full_pass("qwen2", backbone, prompt, written[0], tokens)[0] for tokens in choices]
    assert found.log_likelihoods == pytest.approx(wanted, abs=1e-4)
    if source == "weaver":
        assert found.generation.positions_woven == 13 + 3
        # As released, the cache is dropped for the memory: the same sums; the prompt's first pass is not made at all.
        memory.drops_cache = True
        for tail in (0, 2):
            dropped = score(backbone, prompt, choices, memory=memory, trigger=AT_END, tail=tail)
            kept_tail = score(backbone, prompt, choices, memory=_memory(backbone, source), trigger=AT_END, tail=tail)
            assert dropped.log_likelihoods == pytest.approx(kept_tail.log_likelihoods, abs=1e-4)
            assert dropped.generation.positions_encoded == 13 + 3 + 2 + 1


def test_an_evicted_prompt_is_scored_over_what_is_left(backbone) -> None:
    (prompt,), choices = prompts_of(40), prompts_of(3, 3, 2, seed=3)
    config = EvictionConfig("snapkv", 12, window=4)
    evicted = score(backbone, prompt, choices, prefill=lambda given: prefill_and_evict(backbone, given, config))
    apart = [
        score(backbone, prompt, [c], prefill=lambda given: prefill_and_evict(backbone, given, config)) for c in choices
    ]
    assert evicted.log_likelihoods == pytest.approx([one.log_likelihoods[0] for one in apart], abs=1e-4)
    assert evicted.generation.positions_evicted == 28
    assert evicted.log_likelihoods != pytest.approx(score(backbone, prompt, choices).log_likelihoods, abs=1e-2)


def test_the_monitor_is_off_again_and_no_hook_stays(backbone) -> None:
    score(backbone, *prompts_of(9), prompts_of(2), memory=_memory(backbone), trigger=AT_END, tail=1)
    assert backbone.tap is None and not backbone.decoder._forward_hooks
    with pytest.raises(PromptTooLongError, match="shorten the prompt"):
        score(backbone, *prompts_of(510), prompts_of(4))
    assert backbone.tap is None


@pytest.mark.parametrize(
    ("choices", "more", "why"),
    [([], {}, "Nothing to score"), ([[5], []], {}, "Nothing to score"), ([[5]], {"tail": 9}, "tail is 9"),
     ([[5]], {"trigger": AT_END}, "without a memory")],
)  # fmt: skip
def test_mistakes_are_one_sentence(choices, more, why, backbone) -> None:
    with pytest.raises(ConfigError, match=why):
        score(backbone, prompts_of(9)[0], choices, **more)
