"""KV eviction after prefill: rivals that forget, where a memory adds.

Each layer and KV head of the backbone keeps the `budget` positions of the prompt with the highest scores; decoding goes
on over what is left. Four scores, with q and k after rotation and a = softmax(q k / sqrt(d_h)) under the causal mask:

* `snapkv` (Li et al., 2024): mean a of the last `window` queries, smoothed by an average over `kernel` neighbours, mean
  over the query heads of a KV head; the window itself always stays.
* `tova` (Oren et al., 2024): a of the last query, mean over *all* heads of the layer; the last position stays.
* `h2o` (Zhang et al., 2023): a summed over all queries, mean over the query heads of a KV head; half of the budget goes
  to the newest positions, half to the heavy hitters before them.
* `streaming-llm` (Xiao et al., 2024): the first `sinks` positions and the newest ones.

The first three agree with kvpress where it has them (its `ObservedAttentionPress` divides h2o's sum by the number of
queries and keeps no recent half). Scores are made during the one prefill, in chunks of queries: never T x T. Positions
are not renumbered. A prompt within the budget is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flashmem import monitor
from flashmem.backbone import Backbone
from flashmem.errors import ConfigError
from flashmem.state import DecodeState

POLICIES = ("snapkv", "streaming-llm", "tova", "h2o")
_CHUNK = 256


@dataclass(frozen=True)
class EvictionConfig:
    """What stays of a prompt.

    Attributes:
        policy: whose score.
        budget: positions that each layer and KV head keeps.
        window: newest queries that vote, and stay, in `snapkv`; at most half of the budget.
        kernel: neighbours over which `snapkv` averages, odd.
        sinks: first positions that `streaming-llm` keeps.
    """

    policy: Literal["snapkv", "streaming-llm", "tova", "h2o"]
    budget: int
    window: int = 64
    kernel: int = 5
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"eviction.policy is {self.policy!r}; use one of {', '.join(POLICIES)}.")
        if self.budget <= self.sinks:
            raise ConfigError(f"eviction.budget is {self.budget}; it must be above the {self.sinks} sinks.")
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError("eviction.window must be 1 or more and eviction.kernel an odd number.")


def prefill_and_evict(backbone: Backbone, prompts: list[list[int]], config: EvictionConfig) -> DecodeState:
    """Encode prompts of one length and keep the budget of each layer and KV head.

    Args:
        backbone: without sliding layers, whose window would be counted over what is left.
        prompts: token ids.
        config: what stays.

    Raises:
        ConfigError: sliding layers, or prompts of several lengths.
    """
    if any(backbone.window(layer) is not None for layer in range(backbone.num_layers)):
        raise ConfigError(f"KV eviction needs full attention in every layer, and {backbone.name} has sliding ones.")
    length = len(prompts[0])
    if any(len(prompt) != length for prompt in prompts):
        raise ConfigError("KV eviction takes prompts of one length at a time: use batch size 1.")
    if length <= config.budget:
        return backbone.prefill(prompts)
    kept: list[Tensor] = []
    with _scoring(backbone, config, kept):
        state = backbone.prefill(prompts)
    backbone.keep(state, kept)
    return state


@contextmanager
def _scoring(backbone: Backbone, config: EvictionConfig, kept: list[Tensor]) -> Iterator[None]:
    """Passes inside leave for each layer the kept positions `[B, G, budget]`, in order."""

    def score(query: Tensor, key: Tensor, scaling: float) -> None:
        kept.append(kept_positions(query, key, scaling, config))

    layers = [layer.self_attn for layer in backbone.decoder.layers]
    # A score needs the queries of one whole pass.
    chunk, backbone.chunk = backbone.chunk, None
    for attention in layers:
        monitor.watch(attention, score)
    try:
        yield
    finally:
        backbone.chunk = chunk
        for attention in layers:
            monitor.watch(attention, None)


def kept_positions(query: Tensor, key: Tensor, scaling: float, config: EvictionConfig) -> Tensor:
    """The positions that one layer keeps, ascending.

    Args:
        query: `[B, H, T, d_h]` after rotation.
        key: `[B, G, T, d_h]` after rotation.
        scaling: factor on the scores.
        config: what stays.

    Returns:
        `[B, G, budget]`.
    """
    scores = _SCORES[config.policy](query, key, scaling, config)
    return scores.topk(config.budget, -1).indices.sort(-1).values


def _snapkv(query: Tensor, key: Tensor, scaling: float, config: EvictionConfig) -> Tensor:
    length, window = key.shape[2], min(config.window, max(1, config.budget // 2))
    seen = _attention(query, key, scaling, length - window, length).mean(-2)[..., : length - window]
    flat = seen.flatten(0, 2)[:, None]
    smooth = torch.nn.functional.avg_pool1d(flat, config.kernel, stride=1, padding=config.kernel // 2)
    return _always(smooth.view_as(seen).mean(2), window)


def _tova(query: Tensor, key: Tensor, scaling: float, config: EvictionConfig) -> Tensor:
    length = key.shape[2]
    row = _attention(query, key, scaling, length - 1, length)[..., 0, : length - 1]
    return _always(row.mean(dim=(1, 2), keepdim=True)[:, :, 0].expand(-1, key.shape[1], -1), 1)


def _h2o(query: Tensor, key: Tensor, scaling: float, config: EvictionConfig) -> Tensor:
    length, recent = key.shape[2], config.budget // 2
    return _always(received(query, key, scaling)[..., : length - recent], recent)


def received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention that each position got from all queries, mean over the query heads of a KV head: `[B, G, T]`."""
    length = key.shape[2]
    total = key.new_zeros(key.shape[:3], dtype=torch.float32)
    for start in range(0, length, _CHUNK):
        total += _attention(query, key, scaling, start, min(start + _CHUNK, length)).sum(-2).mean(2)
    return total


def _streaming(query: Tensor, key: Tensor, scaling: float, config: EvictionConfig) -> Tensor:
    scores = torch.arange(key.shape[2], dtype=torch.float32, device=key.device)
    scores[: config.sinks] = float("inf")
    return scores.expand(*key.shape[:2], -1)


def _attention(query: Tensor, key: Tensor, scaling: float, start: int, end: int) -> Tensor:
    """Causal attention rows of queries start..end: `[B, G, H / G, end - start, T]`, float32."""
    places = torch.arange(key.shape[2], device=key.device)
    visible = places[None, :] <= places[start:end, None]
    return monitor.attention_rows(query[:, :, start:end], key, visible[None, None], scaling)


def _always(scores: Tensor, newest: int) -> Tensor:
    """Scores of the older positions, with the newest ones above all of them."""
    return torch.nn.functional.pad(scores, (0, newest), value=float("inf"))


_SCORES = {"snapkv": _snapkv, "tova": _tova, "h2o": _h2o, "streaming-llm": _streaming}
