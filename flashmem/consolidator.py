"""The Shared-KV Consolidator: a few latents written from the backbone's own cache (paper 3.4, Eq. 5).

The seed m_0 is a two-layer MLP of the last hidden state (a residual whose second layer starts at zero, so it begins
as the identity). Each of K steps runs m_{j-1} through L blocks. A block is one of the backbone's last L decoder layers
without W_K and W_V: norm, W_Q, attention over the K,V that the backbone *already cached* for that layer, W_O, norm,
FFN. No key or value of the history is ever computed again. Queries are rotated for the position that the latent will
take. The copied final norm follows, then a map to embedding space.

The seed and every later input of the blocks are states of post-norm size, and what a copied block adds has the size of
the stream that it was trained in: a few times larger in some backbones, hundreds of times in others, where it would
drown the state that it is added to. So a block's input is brought to the size of the stream (`stream_scale`, a
property of the backbone) and its output back. The paper is silent on this.

A block is a deep copy of the transformers layer. Its k and v projections become stubs, and the cache that it is handed
is a read-only adapter whose `update()` answers with the backbone's K,V: every family's own norms, biases and
rotations stay in force without a line of ours about them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashmem import monitor
from flashmem.backbone import Backbone
from flashmem.memory import MemoryConfig, MemoryContext, MemorySource
from flashmem.state import DecodeState

KeysValues = Callable[[int], tuple[Tensor, Tensor]]


class Seed(nn.Module):
    """State projection m_0 = h + W_2 silu(W_1 h), the identity at the start (paper 3.4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, d]` to `[B, d]`."""
        return hidden + self.outer(nn.functional.silu(self.inner(hidden)))


class OutputMap(nn.Module):
    """From post-norm states to input embeddings of the size that the backbone knows.

    Raw last-layer states are 10 to 100 times longer than token embeddings and wreck the backbone; every form ends at
    the mean norm of the token embeddings. "gate" is newline + g W m with g from 0: the one form that starts harmless.
    """

    def __init__(self, kind: str, backbone: Backbone) -> None:
        super().__init__()
        self.kind = kind
        self.norm = backbone.embedding_norm()
        width = backbone.hidden_size
        if kind != "identity":
            self.linear = nn.Linear(width, width, bias=False)
            nn.init.eye_(self.linear.weight)
        if kind == "gate":
            self.gate = nn.Parameter(torch.zeros(()))
            newline = torch.tensor([backbone.encode("\n")[-1:]], device=backbone.device)
            with torch.no_grad():
                self.register_buffer("newline", backbone.embed(newline)[0, 0].clone(), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """`[..., d]` to `[..., d]` of constant Euclidean norm."""
        mapped = states if self.kind == "identity" else self.linear(states)
        if self.kind == "gate":
            mapped = self.newline + self.gate * _to_norm(mapped, self.norm)
        return _to_norm(mapped, self.norm)


def _to_norm(states: Tensor, norm: float) -> Tensor:
    return nn.functional.normalize(states.float(), dim=-1).mul(norm).to(states.dtype)


class _NoProjection(nn.Module):
    """Stands in for W_K and W_V: the cache adapter ignores what it returns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.width)


class _QueryOnly(nn.Module):
    """The query part of a fused qkv projection (Phi-3); the key and value parts are zeros."""

    def __init__(self, fused: nn.Linear, query_width: int) -> None:
        super().__init__()
        self.rest = fused.out_features - query_width
        self.query = nn.Linear(fused.in_features, query_width, bias=False)
        with torch.no_grad():
            self.query.weight = nn.Parameter(fused.weight[:query_width].clone())

    def forward(self, hidden: Tensor) -> Tensor:
        query = self.query(hidden)
        return torch.cat([query, query.new_zeros(*query.shape[:-1], self.rest)], -1)


class ReadOnlyCache:
    """Answers a layer's `update()` with fixed K,V; with `grow`, the layer's own K,V are appended behind them.

    Growing serves `latent_attention="earlier"`: the latents see each other, the backbone's cache stays untouched.
    """

    def __init__(self, keys: Tensor, values: Tensor, *, grow: bool = False) -> None:
        self.keys, self.values, self.grow = keys, values, grow

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the layer with its own `[B, G, 1, d_h]`."""
        if self.grow:
            self.keys = torch.cat([self.keys, keys], -2)
            self.values = torch.cat([self.values, values], -2)
        return self.keys, self.values


def make_block(backbone: Backbone, layer: int, config: MemoryConfig) -> nn.Module:
    """A trainable copy of one decoder layer without its key and value projections."""
    block = _copy(backbone.decoder.layers[layer])
    attention = block.self_attn
    monitor.detach(attention)
    block.requires_grad_(True)
    if config.init == "random":
        _randomise(block, float(backbone.config.initializer_range))
    if config.latent_attention == "earlier":
        _freeze_keys_values(attention)
    elif hasattr(attention, "qkv_proj"):
        attention.qkv_proj = _QueryOnly(attention.qkv_proj, attention.o_proj.in_features)
    else:
        attention.k_proj = _NoProjection(attention.k_proj.out_features)
        attention.v_proj = _NoProjection(attention.v_proj.out_features)
    if hasattr(attention, "k_norm") and config.latent_attention == "none":
        # The adapter drops the keys, so training it would only decay the weight.
        attention.k_norm.requires_grad_(False)
    return block


def _copy(module: nn.Module) -> nn.Module:
    """A copy that is nobody's part: a placement over several devices hooks modules to theirs."""
    copied = copy.deepcopy(module)
    if any(hasattr(part, "_hf_hook") for part in copied.modules()):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(copied, recurse=True)
    return copied


def _freeze_keys_values(attention: nn.Module) -> None:
    for name in ("k_proj", "v_proj", "k_norm"):
        if hasattr(attention, name):
            getattr(attention, name).requires_grad_(False)


def _randomise(block: nn.Module, spread: float) -> None:
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=spread)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Consolidator(nn.Module):
    """Seed, L blocks, copied final norm, output map: `[B, d]` and a cache to `[B, K, d]`."""

    def __init__(self, config: MemoryConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        last = backbone.num_layers - 1
        sources = list(range(last - config.depth + 1, last + 1))
        self.reads = [last] * config.depth if config.kv_layer == "last" else sources
        self.seed = Seed(backbone.hidden_size)
        self.blocks = nn.ModuleList(make_block(backbone, layer, config) for layer in sources)
        self.norm = _copy(backbone.decoder.norm).requires_grad_(True)
        self.scale = config.stream_scale or 1.0
        self.output = OutputMap(config.output_map, backbone)

    def forward(self, hidden: Tensor, backbone: Backbone, state: DecodeState, cached: KeysValues) -> Tensor:
        """Write one memory, K deterministic steps.

        Args:
            hidden: `[B, d]` post-norm last hidden state at the trigger.
            backbone: for rotations and windows.
            state: for positions and masks.
            cached: layer index to its K and V, `[B, G, T, d_h]` each.

        Returns:
            `[B, K, d]`.
        """
        grow = self.config.latent_attention == "earlier"
        caches = [ReadOnlyCache(*cached(layer), grow=grow) for layer in self.reads]
        current = self.seed(hidden.to(self.seed.inner.weight.dtype))[:, None]
        written = []
        turned = self._rotations(backbone, state)
        for index in range(self.config.length):
            current = self._through_blocks(current, index, caches, backbone, state, turned)
            normed = self.norm(current)
            latent = self.output(normed)
            written.append(latent)
            current = {"raw": current, "normed": normed, "embedding": latent}[self.config.feedback]
        return torch.cat(written, 1)

    def _rotations(self, backbone: Backbone, state: DecodeState) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each layer that is read, cosine and sine `[B, K, d_h]` of the positions that the latents will take."""
        steps = torch.arange(self.config.length, device=state.next_position.device)
        positions = state.next_position[:, None] + steps
        return {layer: backbone.rotary(positions, layer) for layer in dict.fromkeys(self.reads)}

    def _through_blocks(
        self,
        current: Tensor,
        index: int,
        caches: list[ReadOnlyCache],
        backbone: Backbone,
        state: DecodeState,
        turned: dict[int, tuple[Tensor, Tensor]],
    ) -> Tensor:
        positions = (state.next_position + index)[:, None]
        current = current * self.scale
        for block, layer, cache in zip(self.blocks, self.reads, caches, strict=True):
            mask = state.visible(index, backbone.window(layer))
            if mask is not None and cache.grow:
                mask = torch.cat([mask, mask.new_ones(*mask.shape[:-1], index + 1)], -1)
            output = block(
                current,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                position_embeddings=tuple(part[:, index : index + 1] for part in turned[layer]),
            )
            current = output[0] if isinstance(output, tuple) else output
        return current / self.scale


class SharedKVMemory(MemorySource):
    """FlashMem's source: the consolidator over the backbone's own cache."""

    def __init__(self, config: MemoryConfig, backbone: Backbone) -> None:
        super().__init__(config)
        self.consolidator = Consolidator(config, backbone).to(backbone.device, backbone.dtype)

    def forward(self, context: MemoryContext) -> Tensor:
        """See `MemorySource.forward`."""
        state = context.state
        return self.consolidator(state.hidden, context.backbone, state, state.keys_values)
