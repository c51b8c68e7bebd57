"""Do our KV evictions keep what kvpress keeps? For an environment of its own: kvpress pins another transformers.

    python -m venv kv && kv/bin/pip install torch kvpress
    PYTHONPATH=. kv/bin/python tests/parity/kvpress_parity.py

A random Llama encodes one prompt. `snapkv`, `tova` and `streaming-llm` must keep the same keys as kvpress's presses in
every layer and KV head; the attention that `h2o` sums up must be `ObservedAttentionPress`'s scores times the number of
queries that each position was seen by. Exits with 1 if one of them differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from kvpress import ObservedAttentionPress, SnapKVPress, StreamingLLMPress, TOVAPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from flashmem.eviction import EvictionConfig, kept_positions, received

LENGTH, BUDGET, WINDOW = 120, 48, 24
Layer = tuple[torch.Tensor, torch.Tensor, float]


def rotated(model: LlamaForCausalLM, ids: torch.Tensor) -> list[Layer]:
    """Queries and keys after rotation, and the scaling, of every layer."""
    found: list[Layer] = []
    original = modeling_llama.eager_attention_forward

    def keeping(module, query, key, value, mask, scaling, dropout=0.0, **rest):
        found.append((query.detach(), key.detach(), scaling))
        return original(module, query, key, value, mask, scaling, dropout=dropout, **rest)

    modeling_llama.eager_attention_forward = keeping
    try:
        model(ids)
    finally:
        modeling_llama.eager_attention_forward = original
    return found


def same_keys(model: LlamaForCausalLM, ids: torch.Tensor, layers: list[Layer]) -> Iterator[tuple[str, bool]]:
    """Whether each policy keeps the same keys, layer by layer; kvpress does not sort what it keeps."""
    ratio = 1 - BUDGET / LENGTH
    presses = {
        "snapkv": SnapKVPress(compression_ratio=ratio, window_size=WINDOW),
        "tova": TOVAPress(compression_ratio=ratio),
        "streaming-llm": StreamingLLMPress(compression_ratio=ratio),
    }
    for policy, press in presses.items():
        cache = DynamicCache()
        with press(model):
            model(ids, past_key_values=cache)
        for number, (query, key, scaling) in enumerate(layers):
            theirs = cache.layers[number].keys
            config = EvictionConfig(policy, theirs.shape[2], window=WINDOW)
            slots = kept_positions(query, key, scaling, config)
            ours = key.gather(2, slots[..., None].expand(-1, -1, -1, key.shape[-1]))
            # A key tells itself by the sum of its numbers.
            equal = torch.allclose(ours.sum(-1).sort(-1).values, theirs.sum(-1).sort(-1).values, atol=1e-5)
            yield f"{policy}, layer {number}", equal


def same_sums(model: LlamaForCausalLM, ids: torch.Tensor, layers: list[Layer]) -> Iterator[tuple[str, bool]]:
    """Whether h2o's sums are kvpress's means times the number of queries."""
    attentions = model(ids, output_attentions=True).attentions
    press = ObservedAttentionPress(compression_ratio=0.5)
    for number, (query, key, scaling) in enumerate(layers):
        theirs = press.score(model.model.layers[number].self_attn, None, key, None, attentions[number], {})
        means = received(query, key, scaling) / torch.arange(LENGTH, 0, -1)
        yield f"h2o, layer {number}", torch.allclose(theirs, means, atol=1e-5)


@torch.no_grad()
def main() -> int:
    """Print one line a check."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(4, 100, (1, LENGTH))
    layers = rotated(model, ids)
    found = [*same_keys(model, ids, layers), *same_sums(model, ids, layers)]
    for name, equal in found:
        print(f"{name}: {'same' if equal else 'DIFFERENT'}")
    return 0 if all(equal for _, equal in found) else 1


if __name__ == "__main__":
    sys.exit(main())
