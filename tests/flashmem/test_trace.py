"""The recorder: it changes nothing, and what it records equals slow references."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GenerationConfig

from flashmem import (
    MemoryBank,
    MemoryConfig,
    NoopMemory,
    RandomMemory,
    SampleContext,
    ShuffledMemory,
    TraceRecorder,
    TriggerConfig,
    generate,
    new_memory,
)
from flashmem.trace import nearest_tokens, spoken_tokens, text_pieces
from tests.flashmem.conftest import make_backbone, prompts_of, reference_model

GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
EVERY = TriggerConfig(kind="every", interval=4, cooldown=0, max_injections=None)


def make_memory(backbone, **config):
    """An untrained memory moved off its start, so that identities and zeros hide nothing."""
    torch.manual_seed(5)
    memory = new_memory(MemoryConfig(**{"length": 3, **config}), backbone).eval()
    with torch.no_grad():
        for parameter in memory.trained().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return memory


def traced(backbone, prompts, memory, trigger=EVERY, recorder=None, **more):
    recorder = recorder or TraceRecorder()
    arguments = {"generation_config": GREEDY, **more}
    results = generate(backbone, prompts, memory=memory, trigger=trigger, recorder=recorder, **arguments)
    return results, recorder.samples


@pytest.mark.parametrize("source", ["consolidator", "separate-encoder", "constant"])
def test_a_recorder_changes_nothing(source: str) -> None:
    backbone = make_backbone()
    memory = make_memory(backbone, source=source)
    prompts = prompts_of(21, 8, 14)
    sampled = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=1.3, eos_token_id=-1, pad_token_id=0)
    for config in (GREEDY, sampled):
        plain = generate(
            backbone, prompts, memory=memory, trigger=EVERY, generation_config=config, seed=3, keep_memories=True
        )
        results, samples = traced(backbone, prompts, memory, generation_config=config, seed=3, keep_memories=True)
        again = generate(backbone, prompts, memory=memory, trigger=EVERY, generation_config=config, seed=3)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain] == [r.token_ids for r in again]
        assert [r.entropies for r in results] == [r.entropies for r in plain]
        for ours, theirs in zip(results, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.memories, theirs.memories, strict=True))
        assert [s.answer_ids for s in samples] == [r.token_ids for r in plain]


def test_a_recorder_leaves_no_hook_behind(backbone) -> None:
    memory = make_memory(backbone)
    broken = TraceRecorder()
    broken.injected = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        traced(backbone, prompts_of(9), memory, recorder=broken)
    assert not memory.consolidator.norm._forward_hooks
    assert all(not hasattr(block.self_attn, "flashmem_tap") for block in memory.consolidator.blocks)


def test_plain_decoding_has_its_entropies(backbone) -> None:
    plain = generate(backbone, prompts_of(9, 15), generation_config=GREEDY)
    results, samples = traced(backbone, prompts_of(9, 15), None, None)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    for result, sample in zip(results, samples, strict=True):
        assert [step.entropy for step in sample.steps] == result.entropies
        assert len(sample.steps) == 12 and not sample.injections and sample.tau is None
        assert all(step.above_tau is None and not step.fired for step in sample.steps)


def test_steps_say_what_the_trigger_did(backbone) -> None:
    memory = make_memory(backbone)
    (free,) = generate(backbone, prompts_of(15), generation_config=GREEDY, trace=True)
    for kind, values in (("attention-entropy", free.entropies), ("output-entropy", free.output_entropies)):
        trigger = TriggerConfig(kind=kind, threshold=sorted(values)[6], cooldown=5)
        (result,), (sample,) = traced(backbone, prompts_of(15), memory, trigger)
        watched = [s.output_entropy if kind == "output-entropy" else s.entropy for s in sample.steps]
        assert [s.above_tau for s in sample.steps] == [value > trigger.threshold for value in watched]
        assert sum(bool(s.above_tau) for s in sample.steps) == result.above_threshold
        assert [i for i, s in enumerate(sample.steps) if s.fired] == [t.text_index for t in result.triggers]
        assert result.triggers and len(result.triggers) < result.above_threshold
        assert [(i.text_index, i.position, i.latents) for i in sample.injections] == [
            (t.text_index, t.position, t.latents) for t in result.triggers
        ]


def _eager(memory, prompt: list[int]) -> list[torch.Tensor]:
    """`[K, T]` a block: keys recomputed from hidden states and repeated per query head, plain softmax (Qwen2)."""
    model = reference_model("qwen2", "eager")
    states = model.model(torch.tensor([prompt]), output_hidden_states=True)
    consolidator, keys = memory.consolidator, []
    split = lambda t: t.view(1, t.shape[1], -1, 8).transpose(1, 2)
    for index in consolidator.reads:
        layer = model.model.layers[index]
        raw = split(layer.self_attn.k_proj(layer.input_layernorm(states.hidden_states[index])))
        keys.append(_rotate(model, raw, torch.arange(len(prompt))[None]).repeat_interleave(2, 1))
    current = consolidator.seed(states.last_hidden_state[:, -1])[:, None]
    found = [[] for _ in keys]
    for step in range(memory.config.length):
        position = torch.tensor([[len(prompt) + step]])
        current = current * memory.config.stream_scale
        for number, (block, key) in enumerate(zip(consolidator.blocks, keys, strict=True)):
            attention, layer = block.self_attn, model.model.layers[consolidator.reads[number]]
            query = _rotate(model, split(attention.q_proj(block.input_layernorm(current))), position)
            weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
            found[number].append(weights.mean(1)[0, 0])
            history = layer.input_layernorm(states.hidden_states[consolidator.reads[number]])
            values = split(layer.self_attn.v_proj(history)).repeat_interleave(2, 1)
            current = current + attention.o_proj((weights @ values).transpose(1, 2).flatten(2))
            current = current + block.mlp(block.post_attention_layernorm(current))
        current = consolidator.norm(current / memory.config.stream_scale)
    return [torch.stack(rows) for rows in found]


def _rotate(model, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    cos, sin = model.model.rotary_emb(states, positions)
    turned = torch.cat([-states[..., 4:], states[..., :4]], -1)
    return states * cos[:, None] + turned * sin[:, None]


@pytest.mark.parametrize("depth", [1, 2])
def test_attention_equals_an_eager_reference(depth: int) -> None:
    """Grouped heads, rotation, several blocks; alone and in a padded batch."""
    backbone = make_backbone("qwen2")
    memory = make_memory(backbone, depth=depth)
    prompts = prompts_of(21, 13, seed=4)
    once = TriggerConfig(kind="prompt-end")
    for chosen in (prompts, prompts[1:]):
        _, samples = traced(backbone, chosen, memory, once)
        for prompt, sample in zip(chosen, samples, strict=True):
            with torch.no_grad():
                expected = _eager(memory, prompt)
            (injection,) = sample.injections
            assert [entry.layer for entry in injection.attention] == [2] if depth == 1 else [1, 2]
            for entry, slow in zip(injection.attention, expected, strict=True):
                torch.testing.assert_close(torch.tensor(entry.weights), slow, atol=2e-6, rtol=1e-4)
                assert entry.positions is None


@pytest.mark.parametrize("config", [{}, {"depth": 2}, {"latent_attention": "earlier"}, {"source": "separate-encoder"}])
def test_attention_rows_sum_to_one(family: str, config: dict) -> None:
    backbone = make_backbone(family)
    memory = make_memory(backbone, **config)
    _, samples = traced(backbone, prompts_of(17, 9), memory)
    for sample, prompt in zip(samples, (17, 9), strict=True):
        assert [i.text_index for i in sample.injections] == [0, 4, 8]
        for order, injection in enumerate(sample.injections):
            assert injection.position == prompt + 4 * order + 3 * order
            starts = [prompt + 4 * n + 3 * n for n in range(order)]
            assert injection.latent_positions == [start + k for start in starts for k in range(3)]
            assert len(injection.attention) == config.get("depth", 1)
            for entry in injection.attention:
                assert all(len(row) == injection.position for row in entry.weights)
                totals = [sum(row) + own for row, own in zip(entry.weights, entry.own, strict=True)]
                assert totals == pytest.approx([1.0] * 3, abs=1e-4)
                assert (max(entry.own) > 0) == (config.get("latent_attention") == "earlier")
    assert ("own encoder" in samples[0].injections[0].attention_note) == (config.get("source") == "separate-encoder")


def test_a_long_history_keeps_the_heaviest_positions(backbone) -> None:
    memory = make_memory(backbone)
    _, (full,) = traced(backbone, prompts_of(40), memory)
    _, (short,) = traced(backbone, prompts_of(40), memory, recorder=TraceRecorder(dense_positions=30, top_positions=7))
    for whole, part in zip(full.injections, short.injections, strict=True):
        (dense,), (sparse,) = whole.attention, part.attention
        for row, weights, positions, rest in zip(
            dense.weights, sparse.weights, sparse.positions, sparse.rest, strict=True
        ):
            assert weights == pytest.approx(sorted(row, reverse=True)[:7], abs=1e-7)
            assert weights == pytest.approx([row[p] for p in positions], abs=1e-7)
            assert sum(weights) + rest == pytest.approx(1.0, abs=1e-5)


def test_sources_without_attention_say_so(backbone) -> None:
    real, bank = make_memory(backbone), MemoryBank()
    for order in range(4):
        bank.add(torch.randn(3, backbone.hidden_size), order, f"answer {order}")
    samples = [SampleContext("a", "x")]
    constant = make_memory(backbone, source="constant")
    sources = [constant, RandomMemory(real, bank), ShuffledMemory(real, bank), NoopMemory(real, backbone)]
    for source, words in zip(sources, ["attends to nothing", *["placebo"] * 3], strict=True):
        _, (sample,) = traced(backbone, prompts_of(11), source, samples=samples)
        for injection in sample.injections:
            assert injection.attention == [] and injection.spoken == [] and words in injection.attention_note
            assert len(injection.nearest) == 3 and injection.next_token is not None
    newline = sample.injections[0].nearest
    assert all(row[0].text == "\n" and row[0].value == pytest.approx(1.0, abs=1e-5) for row in newline)


def test_nearest_token_of_an_embedding_is_itself(backbone) -> None:
    table = backbone.model.get_input_embeddings().weight
    found = nearest_tokens(backbone, 3.5 * table[[9, 50, 4]])
    assert [row[0].token for row in found] == [9, 50, 4]
    assert [row[0].text for row in found] == ["w5", "w46", "w0"]
    assert all(row[0].value == pytest.approx(1.0, abs=1e-5) and len(row) == 5 for row in found)
    cosine = torch.nn.functional.cosine_similarity(table[9], table, dim=-1)
    assert [entry.value for entry in found[0]] == pytest.approx(sorted(cosine.tolist(), reverse=True)[:5], abs=1e-5)


def test_states_speak_through_the_lm_head(backbone) -> None:
    memory = make_memory(backbone)
    (prompt,) = prompts_of(11)
    _, (sample,) = traced(backbone, [prompt], memory, TriggerConfig(kind="prompt-end"))
    with torch.no_grad():
        state = backbone.prefill([prompt])
        assert spoken_tokens(backbone, state.hidden)[0][0].token == int(state.logits.argmax())
        states = []
        memory.consolidator.norm.register_forward_hook(lambda *args: states.append(args[2][:, 0]))
        memory.consolidator(state.hidden, backbone, state, state.keys_values)
        expected = backbone.logits(torch.cat(states)).softmax(-1)
    for row, probabilities in zip(sample.injections[0].spoken, expected, strict=True):
        assert [entry.token for entry in row] == probabilities.topk(5).indices.tolist()
        assert [entry.value for entry in row] == pytest.approx(probabilities.topk(5).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("logits", ["post", "pre"])
def test_distributions_equal_those_of_plain_passes(backbone, logits: str) -> None:
    memory = make_memory(backbone)
    (prompt,) = prompts_of(11)
    once = TriggerConfig(kind="prompt-end")
    (result,), (sample,) = traced(backbone, [prompt], memory, once, keep_memories=True, sampling_logits=logits)
    with torch.no_grad():
        table = backbone.embed(torch.tensor([prompt]))
        before = backbone.model(inputs_embeds=table).logits[0, -1].double().log_softmax(-1)
        longer = torch.cat([table, result.memories[0][None]], 1)
        after = backbone.model(inputs_embeds=longer).logits[0, -1].double().log_softmax(-1)
    shift = sample.injections[0].next_token
    assert shift.kl == pytest.approx(float((after.exp() * (after - before)).sum()), rel=1e-3)
    top = {*before.topk(10).indices.tolist(), *after.topk(10).indices.tolist()}
    assert {entry.token for entry in shift.tokens} == top
    for entry in shift.tokens:
        assert entry.before == pytest.approx(float(before[entry.token].exp()), abs=1e-5)
        assert entry.after == pytest.approx(float(after[entry.token].exp()), abs=1e-5)
        assert entry.rank_after == int((after > after[entry.token]).sum()) + 1
    assert shift.proposed.token == int(before.argmax())
    assert shift.sampled.token == result.token_ids[0] == int((after if logits == "post" else before).argmax())


def test_rows_of_a_batch_are_those_of_single_runs(backbone) -> None:
    memory = make_memory(backbone)
    prompts = prompts_of(21, 8, 14, seed=3)
    trigger = TriggerConfig(kind="random", rate=0.3, cooldown=2, max_injections=3)
    names = [SampleContext(str(n)) for n in range(3)]
    _, together = traced(backbone, prompts, memory, trigger, samples=names)
    for prompt, name, sample in zip(prompts, names, together, strict=True):
        _, (alone,) = traced(backbone, [prompt], memory, trigger, samples=[name])
        assert (sample.answer_ids, sample.prompt) == (alone.answer_ids, alone.prompt)
        for ours, theirs in zip(sample.injections, alone.injections, strict=True):
            assert (ours.text_index, ours.latent_positions) == (theirs.text_index, theirs.latent_positions)
            weights = [torch.tensor(one.attention[0].weights) for one in (ours, theirs)]
            # Large random weights magnify the rounding of a padded pass; a wrong row would be off by far more.
            torch.testing.assert_close(*weights, atol=5e-4, rtol=0)
            assert ours.next_token.kl == pytest.approx(theirs.next_token.kl, rel=1e-2, abs=1e-4)
    assert len({tuple(i.text_index for i in sample.injections) for sample in together}) > 1


def test_json_holds_plain_numbers(backbone) -> None:
    _, (sample,) = traced(backbone, prompts_of(11), make_memory(backbone))
    document = sample.to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["injections"][0]["attention"][0]["weights"][0][0] == pytest.approx(
        sample.injections[0].attention[0].weights[0][0], rel=1e-5
    )
    assert "".join(document["answer"]) == backbone.tokenizer.decode(sample.answer_ids)


def test_pieces_of_split_characters_join_to_the_text(tmp_path) -> None:
    from flashmem import Backbone
    from tests.random_model import make_model

    backbone = Backbone.from_pretrained(make_model(tmp_path / "bytes"))
    text = "na\u00efve \u2192 \U0001f600!"
    ids = backbone.encode(text)
    pieces = text_pieces(backbone, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert "\U0001f600" in pieces and pieces.count("") > 3
    assert "".join(text_pieces(backbone, ids[: ids.index(ids[-1])][:-2])).startswith("na\u00efve \u2192 ")
