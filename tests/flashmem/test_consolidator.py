"""The consolidator and the injection against slow references; checkpoints; placebos."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GenerationConfig

from flashmem import (
    CheckpointError,
    ConfigError,
    MeanMemory,
    MemoryBank,
    MemoryConfig,
    NoopMemory,
    RandomMemory,
    SampleContext,
    ShuffledMemory,
    TriggerConfig,
    generate,
    load_memory,
    new_memory,
)
from flashmem.memory import MemoryContext
from tests.flashmem.conftest import make_backbone, prompts_of, reference_model


def _perturb(module: torch.nn.Module) -> None:
    """Move every trained parameter off its starting value, so that identities and zeros hide nothing."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def _slow_memory(memory, family: str, prompt: list[int]) -> torch.Tensor:
    """K,V recomputed from hidden states by the family's own layer; the consolidator sees the history as a prefix.

    For each step the block's layer input is [hidden states of the history, current]: the history part goes through the
    *backbone's* key and value projections, the current one through the block's query path, in eager attention.
    """
    model = reference_model(family, "eager")
    consolidator, layer_index = memory.consolidator, len(model.model.layers) - 1
    captured = {}
    hook = model.model.layers[layer_index].register_forward_pre_hook(
        lambda _m, args, kwargs: captured.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    hidden = model.model(torch.tensor([prompt])).last_hidden_state[:, -1]
    hook.remove()
    original, block = model.model.layers[layer_index], consolidator.blocks[0]
    attention, block_attention = original.self_attn, block.self_attn
    normed_history = original.input_layernorm(captured["x"])
    width = attention.head_dim
    split = lambda t: t.view(1, -1, t.shape[-1] // width, width).transpose(1, 2)
    if hasattr(attention, "qkv_proj"):
        fused = attention.qkv_proj(normed_history)
        queries = attention.o_proj.in_features
        rest = (fused.shape[-1] - queries) // 2
        keys, values = split(fused[..., queries : queries + rest]), split(fused[..., queries + rest :])
    else:
        keys, values = split(attention.k_proj(normed_history)), split(attention.v_proj(normed_history))
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys = _rotate(model, keys, torch.arange(len(prompt))[None], layer_index)
    current, out = consolidator.seed(hidden)[:, None], []
    for step in range(memory.config.length):
        position = len(prompt) + step
        current = current * memory.config.stream_scale
        x = block.input_layernorm(current)
        query = block_attention.qkv_proj.query(x) if hasattr(attention, "qkv_proj") else block_attention.q_proj(x)
        query = split(query)
        if hasattr(block_attention, "q_norm"):
            query = block_attention.q_norm(query)
        query = _rotate(model, query, torch.tensor([[position]]), layer_index)
        repeat = query.shape[1] // keys.shape[1]
        scores = query @ keys.repeat_interleave(repeat, 1).transpose(-1, -2) * attention.scaling
        cap = getattr(model.config, "attn_logit_softcapping", None)
        scores = torch.tanh(scores / cap) * cap if cap else scores
        kind = (getattr(model.config, "layer_types", None) or ["sliding_attention"])[-1]
        window = model.config.sliding_window if getattr(model.config, "sliding_window", None) else None
        if window and kind == "sliding_attention":
            scores[..., torch.arange(len(prompt)) <= position - window] = float("-inf")
        attended = (scores.softmax(-1) @ values.repeat_interleave(repeat, 1)).transpose(1, 2).flatten(2)
        attended = block_attention.o_proj(attended)
        if hasattr(block, "pre_feedforward_layernorm"):
            current = current + block.post_attention_layernorm(attended)
            inner = block.mlp(block.pre_feedforward_layernorm(current))
            current = current + block.post_feedforward_layernorm(inner)
        else:
            current = current + attended
            current = current + block.mlp(block.post_attention_layernorm(current))
        current = consolidator.norm(current / memory.config.stream_scale)
        out.append(consolidator.output(current))
    return torch.cat(out, 1)


def _rotate(model, states: torch.Tensor, positions: torch.Tensor, layer: int) -> torch.Tensor:
    extra = (model.config.layer_types[layer],) if model.config.model_type == "gemma3_text" else ()
    cos, sin = model.model.rotary_emb(states, positions, *extra)
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * cos[:, None] + turned * sin[:, None]


def test_consolidator_equals_recomputed_keys_and_values(family: str) -> None:
    backbone = make_backbone(family)
    memory = new_memory(MemoryConfig(length=4), backbone)
    _perturb(memory)
    (prompt,) = prompts_of(21, seed=4)
    with torch.no_grad():
        fast = memory(MemoryContext(backbone, backbone.prefill([prompt]), [0]))
        slow = _slow_memory(memory, family, prompt)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


def test_padding_does_not_change_a_memory(family: str) -> None:
    backbone = make_backbone(family)
    for config in (MemoryConfig(length=3), MemoryConfig(length=3, latent_attention="earlier", depth=2)):
        memory = new_memory(config, backbone)
        _perturb(memory)
        prompts = prompts_of(19, 6, seed=5)
        with torch.no_grad():
            both = memory(MemoryContext(backbone, backbone.prefill(prompts), [0, 0]))
            alone = [memory(MemoryContext(backbone, backbone.prefill([p]), [0])) for p in prompts]
        torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_injection_equals_one_pass_over_concatenated_embeddings(family: str) -> None:
    backbone = make_backbone(family)
    reference = reference_model(family, "eager")
    (prompt,) = prompts_of(17, seed=6)
    first, second = torch.randn(2, 1, 3, backbone.hidden_size) * 0.3
    with torch.no_grad():
        state = backbone.prefill([prompt])
        backbone.inject(state, first)
        backbone.step(state, torch.tensor([8]))
        backbone.inject(state, second)
        parts = [backbone.embed(torch.tensor([prompt])), first, backbone.embed(torch.tensor([[8]])), second]
        whole = reference(inputs_embeds=torch.cat(parts, 1)).logits[:, -1]
    assert state.encoded == [17 + 3 + 1 + 3]
    torch.testing.assert_close(state.logits, whole, rtol=1e-4, atol=1e-4)


def test_separate_encoder_starts_where_the_shared_one_does(family: str) -> None:
    """With untrained LoRA the encoder is the backbone, so both sources must write the same memory."""
    backbone = make_backbone(family)
    prompts = prompts_of(18, 9, seed=7)
    torch.manual_seed(0)
    shared = new_memory(MemoryConfig(length=3), backbone)
    separate = new_memory(MemoryConfig(source="separate-encoder", length=3), backbone)
    separate.consolidator.load_state_dict(shared.consolidator.state_dict())
    with torch.no_grad():
        state = backbone.prefill(prompts, keep_inputs=True)
        backbone.inject(state, torch.randn(2, 2, backbone.hidden_size), torch.tensor([True, False]))
        backbone.step(state, torch.tensor([5, 6]))
        context = MemoryContext(backbone, state, [1, 0])
        torch.testing.assert_close(separate(context), shared(context), rtol=1e-4, atol=1e-4)


def test_starting_values_are_as_documented(backbone) -> None:
    memory = new_memory(MemoryConfig(length=2), backbone)
    hidden = torch.randn(3, backbone.hidden_size)
    torch.testing.assert_close(memory.consolidator.seed(hidden), hidden)
    mapped = memory.consolidator.output(hidden)
    torch.testing.assert_close(mapped.norm(dim=-1), torch.full((3,), backbone.embedding_norm()))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(mapped, hidden), torch.ones(3))
    gated = new_memory(MemoryConfig(length=2, output_map="gate"), backbone)
    newline = backbone.embed(torch.tensor(backbone.encode("\n")[-1]))
    similar = torch.nn.functional.cosine_similarity(gated.consolidator.output(hidden), newline[None])
    torch.testing.assert_close(similar, torch.ones(3))


@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(length=3, depth=2),
        MemoryConfig(length=2, source="separate-encoder", encoder_layers=2),
        MemoryConfig(length=5, source="constant"),
        MemoryConfig(length=2, output_map="gate", feedback="embedding", latent_attention="earlier"),
    ],
)
def test_checkpoint_round_trip(config: MemoryConfig, backbone, tmp_path) -> None:
    memory = new_memory(config, backbone)
    _perturb(memory)
    memory.save_pretrained(tmp_path / "m", {"train_seed": 3})
    loaded = load_memory(tmp_path / "m", backbone)
    assert loaded.config == memory.config
    assert loaded.metadata == {"train_seed": 3}
    with torch.no_grad():
        context = MemoryContext(backbone, backbone.prefill(prompts_of(9), keep_inputs=True), [0])
        assert torch.equal(memory(context), loaded(context))


def _loud_backbone(times: float):
    """A backbone whose layers add `times` as much to the stream; the layers read it through norms."""
    loud = make_backbone("qwen2")
    with torch.no_grad():
        for layer in loud.decoder.layers:
            layer.self_attn.o_proj.weight.mul_(times)
            layer.mlp.down_proj.weight.mul_(times)
    return loud


def test_a_large_stream_does_not_drown_the_state_that_seeds_a_memory() -> None:
    loud = _loud_backbone(3000.0)
    (prompt,) = prompts_of(15, seed=2)
    state = loud.prefill([prompt])
    assert loud.stream_scale() > 32

    def kept(scale):
        memory = new_memory(MemoryConfig(length=1, stream_scale=scale), loud)
        with torch.no_grad():
            written = memory(MemoryContext(loud, state, [0]))[:, 0]
        return float(torch.cosine_similarity(written, state.hidden))

    # The last of four layers added about a quarter of what is in the stream, so most of the state survives it.
    assert kept(None) > 0.7
    assert kept(1.0) < kept(None) - 0.2


def test_the_stream_scale_is_kept_with_a_checkpoint_and_was_one_before(tmp_path) -> None:
    loud = _loud_backbone(3000.0)
    new_memory(MemoryConfig(length=1), loud).save_pretrained(tmp_path / "m")
    assert load_memory(tmp_path / "m", loud).config.stream_scale == loud.stream_scale()
    record = json.loads((tmp_path / "m" / "config.json").read_text())
    del record["memory"]["stream_scale"]
    # Nor had the checkpoints of that time a hash over their record.
    del record["record_sha256"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(record))
    assert load_memory(tmp_path / "m", loud).consolidator.scale == 1.0
    with pytest.raises(ConfigError, match="stream_scale"):
        MemoryConfig(stream_scale=0.0)


def test_damaged_and_foreign_checkpoints_are_refused(backbone, tmp_path) -> None:
    memory = new_memory(MemoryConfig(), backbone)
    memory.save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="was trained for tiny-qwen2"):
        load_memory(tmp_path / "m", make_backbone("llama"))
    with pytest.raises(CheckpointError, match="No checkpoint folder"):
        load_memory(tmp_path / "absent", backbone)
    weights = tmp_path / "m" / "model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    with pytest.raises(CheckpointError, match="hash"):
        load_memory(tmp_path / "m", backbone)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(CheckpointError, match="not a memory checkpoint"):
        load_memory(tmp_path / "m", backbone)


def test_impossible_settings_are_named(backbone) -> None:
    with pytest.raises(ConfigError, match=r"memory\.length is 0"):
        MemoryConfig(length=0)
    with pytest.raises(ConfigError, match=r"memory\.feedback"):
        MemoryConfig(feedback="loud")
    with pytest.raises(ConfigError, match="only 3 layers"):
        new_memory(MemoryConfig(depth=9), backbone)


def _bank(backbone, memory) -> MemoryBank:
    bank = MemoryBank()
    config = GenerationConfig(max_new_tokens=6, eos_token_id=-1)
    trigger = TriggerConfig(kind="every", interval=3, cooldown=0)
    for i, prompt in enumerate(prompts_of(*[8 + i for i in range(10)], seed=9)):
        (run,) = generate(
            backbone, [prompt], memory=memory, trigger=trigger, generation_config=config, keep_memories=True
        )
        for index, latents in enumerate(run.memories):
            bank.add(latents, index, answer=str(i % 3))
    return bank


def test_placebos_replace_only_the_content(backbone, tmp_path) -> None:
    memory = new_memory(MemoryConfig(length=4), backbone)
    _perturb(memory)
    _bank(backbone, memory).save(tmp_path / "bank.safetensors")
    bank = MemoryBank.load(tmp_path / "bank.safetensors")
    assert len(bank) == 20
    calls = []
    memory.register_forward_hook(lambda *_: calls.append(1))
    state = backbone.prefill(prompts_of(12))
    samples = [SampleContext("s1", answer="1")]
    with torch.no_grad():
        real = memory(MemoryContext(backbone, state, [1], samples))
        for placebo in (
            RandomMemory(memory, bank, seed=0),
            ShuffledMemory(memory, bank, seed=0),
            MeanMemory(memory, bank),
            NoopMemory(memory, backbone),
        ):
            before = len(calls)
            out = placebo(MemoryContext(backbone, state, [1], samples))
            assert len(calls) == before + 1, "the real source must still run: the cost has to be equal"
            assert out.shape == real.shape and not torch.equal(out, real)
            assert torch.equal(out, placebo(MemoryContext(backbone, state, [1], samples)))


def test_shuffled_takes_another_answer_at_the_same_index(backbone) -> None:
    memory = new_memory(MemoryConfig(length=2), backbone)
    bank = MemoryBank()
    for i in range(9):
        bank.add(
            torch.full((2, backbone.hidden_size), float(i)), injection_index=i % 3, answer="yes" if i < 6 else "no"
        )
    picked = ShuffledMemory(memory, bank, seed=4)
    state = backbone.prefill(prompts_of(12))
    with torch.no_grad():
        for name in "abcdef":
            out = picked(MemoryContext(backbone, state, [2], [SampleContext(name, "yes")]))
            assert float(out[0, 0, 0]) == 8.0
    with pytest.raises(ConfigError, match="another answer"):
        lonely = MemoryBank()
        lonely.add(torch.zeros(2, backbone.hidden_size), 0, "x")
        lonely.others(0, "x")


def test_random_memory_has_the_banks_moments(backbone) -> None:
    memory = new_memory(MemoryConfig(length=8), backbone)
    _perturb(memory)
    bank = _bank(backbone, memory)
    source = RandomMemory(memory, bank, seed=0)
    state = backbone.prefill(prompts_of(12))
    with torch.no_grad():
        drawn = torch.cat(
            [source(MemoryContext(backbone, state, [i], [SampleContext(str(i))])).flatten(0, 1) for i in range(60)]
        )
    flat = bank.stack().flatten(0, 1)
    torch.testing.assert_close(drawn.norm(dim=-1), flat.norm(dim=-1).mean().expand(len(drawn)), rtol=1e-4, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(drawn.mean(0), flat.mean(0), dim=0)
    assert float(cosine) > 0.9
