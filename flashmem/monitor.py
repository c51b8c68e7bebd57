"""The Cognitive Monitor: entropy of the newest token's attention, without a T x T matrix.

transformers lets one register an attention function by name. Ours, `monitored_attention`, hands everything to
`flashmem.attention` except in the one layer that carries an `AttentionTap`. There it reads the attention row of the
newest token:

* a one-token query (a decode step) computes its scores once and uses them for the layer's output *and* for the
  entropy: one pass over K;
* a longer query (prefill, an injection) goes the way of all layers, and the rows asked for (normally one) are scored
  again.

Entropy (paper Eq. 3-4): per head, the sinks (the first non-pad tokens) and the positions that hold latents are
removed, the rest is renormalised, Shannon entropy in nats in float32, then the mean over heads.

The name matters: transformers takes a name that begins with "flash" for a flash kernel, and Gemma 2 refuses a name
that contains "sdpa". Nothing here decides when to trigger: that is `flashmem.trigger`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from flashmem import attention
from flashmem.errors import ConfigError

ATTENTION_NAME = "monitored_attention"
_TAP = "flashmem_tap"
_WATCHER = "flashmem_watcher"
# A masked score. Infinity would turn into "not a number" where it meets a weight of zero.
_LEAST = torch.finfo(torch.float32).min
# Of a row's weight, what must be left of it for an entropy.
_LEAST_MASS = 1e-30


@dataclass(frozen=True)
class MonitorConfig:
    """Where the monitor looks and what it leaves out.

    Attributes:
        layer: index of the monitored layer; None is the last full-attention layer of the backbone.
        sinks: how many of the first non-pad tokens are removed from the row.
        normalise: divide by the logarithm of the number of visible positions (an ablation; the paper does not).
        count_latents: keep the positions of latents in the row (an ablation; they lower the entropy mechanically).
    """

    layer: int | None = None
    sinks: int = 4
    normalise: bool = False
    count_latents: bool = False

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ConfigError(f"monitor.sinks is {self.sinks}; it must be 0 or more.")


@dataclass
class AttentionTap:
    """What the monitored layer is told before a forward pass and what it leaves behind.

    Attributes:
        sinks: how many of the first keys are not counted.
        latents: `[B, T]` or longer, True where a key is a latent and not counted; None where there is none.
        rows: how many of the newest queries are observed; 0 switches the tap off.
        at: `[B]` the one query of each row that is observed, where that is not the newest; None is the newest.
        normalise: as in `MonitorConfig`.
        entropy: `[B, rows]` nats, float32, the result of the last pass.
        recorded: the pass is recorded (compiled, captured): no number may leave the device.
        clock: receives the phase "monitor"; None is no timing.
        kept: gets the newest query's whole row `[B, T]` in every pass, mean over heads, float32; None keeps nothing.
    """

    sinks: int = 0
    latents: Tensor | None = None
    rows: int = 1
    at: Tensor | None = None
    normalise: bool = False
    entropy: Tensor | None = None
    recorded: bool = False
    clock: Any = field(default=None, repr=False)
    kept: list[Tensor] | None = field(default=None, repr=False)

    def observe(self, scores: Tensor, weights: Tensor) -> None:
        """Reduce attention rows `[B, G, R, rows, T]` to entropies `[B, rows]`."""
        if scores.requires_grad:
            scores, weights = scores.detach(), weights.detach()
        with self.clock.phase("monitor") if self.clock is not None else nullcontext():
            self.entropy = row_entropy(
                scores,
                weights,
                sinks=self.sinks,
                latents=self.latents,
                normalise=self.normalise,
                on_host=not self.recorded and scores.device.type == "cpu" and len(scores) == scores.shape[3] == 1,
            )


def row_entropy(
    scores: Tensor,
    weights: Tensor,
    *,
    sinks: int = 0,
    latents: Tensor | None = None,
    normalise: bool = False,
    on_host: bool = False,
) -> Tensor:
    """Entropy of attention rows after some keys are removed (paper Eq. 3-4).

    With p = exp(x - c) the row after removal and s its sum, `-sum (p/s) log (p/s) = log s + c - (1/s) sum p x`: two
    sums over the row, no logarithm of it and no second normalised row. c is known from any one key, here the largest.

    Args:
        scores: x, `[B, G, R, Q, T]` before the softmax (G KV heads, R query heads each); finite where masked.
        weights: p, their softmax.
        sinks: how many of the first keys are removed.
        latents: `[B, T]` or longer, True where a key is removed, or None.
        normalise: divide by the logarithm of the number of keys that are left.
        on_host: do the arithmetic of the sums in Python, for one row (B = Q = 1).

    Returns:
        `[B, Q]` nats, float32; 0 where nothing is left of a row.
    """
    peak, top = scores.amax(-1), weights.amax(-1)
    x, p = scores[..., sinks:], weights[..., sinks:]
    if latents is not None:
        # A product, since filling under a mask takes three times as long on a CPU.
        kept = (~latents[:, sinks : weights.shape[-1]]).to(p.device, p.dtype)
        p = p * kept[:, None, None, None]
    finish = _finish_on_host if on_host else _finish
    entropy = finish(peak, top, p.sum(-1), (p * x).sum(-1))
    if normalise:
        entropy = entropy / (p > 0).any(dim=2).any(dim=1).sum(-1).clamp_min(2).log()
    return entropy


def _finish(peak: Tensor, top: Tensor, mass: Tensor, dot: Tensor) -> Tensor:
    """From the sums of each head's row, `[B, G, R, Q]`, to the mean over heads, `[B, Q]`."""
    entropy = peak + (mass / top).log() - dot / mass
    # Below the least mass a share of the rest has too few digits left, or none.
    return torch.where(mass > _LEAST_MASS, entropy, 0.0).mean(dim=(1, 2)).clamp_min(0.0)


def _finish_on_host(peak: Tensor, top: Tensor, mass: Tensor, dot: Tensor) -> Tensor:
    """The same of one row in Python: on a handful of numbers each operation of torch takes as long as on all keys."""
    heads = list(zip(*torch.stack((peak, top, mass, dot)).view(4, -1).tolist(), strict=True))
    found = sum(c + math.log(s / p) - d / s for c, p, s, d in heads if s > _LEAST_MASS)
    return torch.full((1, 1), max(0.0, found / len(heads)))


def attention_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Scaled scores of a few queries, K never repeated for grouped heads.

    Args:
        query: `[B, H, Q, d_h]`.
        key: `[B, G, T, d_h]`, H a multiple of G.
        mask: `[B or 1, 1, Q, T]`, boolean (True = visible) or additive, or None for "all visible".
        scaling: factor on the scores.
        softcap: Gemma 2's cap on the scores, or None.

    Returns:
        `[B, G, H / G, Q, T]` in float32; what is masked is the smallest number, not infinite.
    """
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    # One product for each KV head; `matmul` over four dimensions takes a detour that a short row feels.
    grouped, keys = query.reshape(batch * groups, heads // groups * rows, width), key.flatten(0, 1).transpose(1, 2)
    # The query is T times smaller than the scores; but in a short format it would lose bits.
    early = query.dtype == torch.float32
    scores = torch.bmm(grouped * scaling, keys) if early else torch.bmm(grouped, keys).float() * scaling
    scores = scores.view(batch, groups, heads // groups, rows, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        mask = mask[..., : scores.shape[-1]].unsqueeze(2)
        scores = scores.masked_fill(~mask, _LEAST) if mask.dtype == torch.bool else scores + mask
    return scores


def attention_rows(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention probabilities of a few queries, `[B, G, H / G, Q, T]` in float32; see `attention_scores`."""
    return attention_scores(query, key, mask, scaling, softcap).softmax(-1)


def _apply(weights: Tensor, value: Tensor) -> Tensor:
    """`[B, G, R, Q, T]` times `[B, G, T, d_h]`, returned as `[B, Q, H, d_h]`."""
    batch, groups, repeat, rows, length = weights.shape
    flat = weights.to(value.dtype).reshape(batch * groups, repeat * rows, length)
    out = torch.bmm(flat, value.flatten(0, 1))
    if rows == 1:
        return out.view(batch, 1, groups * repeat, -1)
    return out.view(batch, groups * repeat, rows, -1).transpose(1, 2).contiguous()


def _mask_of(mask: Tensor | None, query: Tensor, key: Tensor, rows: int, at: Tensor | None) -> Tensor | None:
    """The mask of the observed queries, `[B or 1, 1, rows, T]`, or None where they see everything."""
    if not attention.is_plain(mask):
        assert mask is not None
        if at is None:
            return mask[:, :, -rows:]
        return mask.expand(len(at), -1, -1, -1).gather(2, at.view(-1, 1, 1, 1).expand(-1, -1, -1, mask.shape[-1]))
    if at is None and rows == 1:
        return None
    length, places = key.shape[2], torch.arange(key.shape[2], device=key.device)
    first = length - query.shape[2]
    queries = torch.arange(length - rows, length, device=key.device)[None] if at is None else (first + at)[:, None]
    return (places <= queries[..., None])[:, None]


def _observed(query: Tensor, rows: int, at: Tensor | None) -> Tensor:
    if at is None:
        return query[:, :, -rows:]
    return query.gather(2, at.view(-1, 1, 1, 1).expand(-1, query.shape[1], -1, query.shape[3]))


def monitored_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for every layer of a backbone; the layer with a tap also leaves its entropy.

    Args:
        query: `[B, H, Q, d_h]`.
        key: `[B, G, T, d_h]`.
        value: `[B, G, T, d_h]`.
        attention_mask: `[B or 1, 1, Q, T]` boolean or additive; None or `attention.plain` mean causal, the queries
            being the last Q positions.

    Returns:
        `[B, Q, H, d_h]` and None: attention weights are never materialised for the caller.
    """
    tap: AttentionTap | None = getattr(module, _TAP, None)
    rows = min(tap.rows, query.shape[2]) if tap is not None else 0
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if watcher := getattr(module, _WATCHER, None):
        watcher(query, key, scale)
    if tap is not None and tap.kept is not None:
        # Scored once more, so that the output is computed exactly as it is when nobody reads along.
        mask = _mask_of(attention_mask, query, key, 1, None)
        row = attention_rows(query[:, :, -1:].float(), key.float(), mask, scale, softcap)
        tap.kept.append(row.mean(dim=(1, 2))[:, 0])
    if query.shape[2] == 1 and (rows or softcap is not None):
        scores = attention_scores(query, key, _mask_of(attention_mask, query, key, 1, None), scale, softcap)
        weights = scores.softmax(-1)
        if rows:
            # Before the values are read, which would drive the row out of the fast memory.
            assert tap is not None
            tap.observe(scores, weights)
        return _apply(weights, value), None
    if softcap is not None:
        mask = _mask_of(attention_mask, query, key, query.shape[2], None)
        output = _apply(attention_rows(query, key, mask, scale, softcap), value)
    else:
        output = attention.attend(query, key, value, attention_mask, scale, dropout)
    if rows:
        assert tap is not None
        mask = _mask_of(attention_mask, query, key, rows, tap.at)
        scores = attention_scores(_observed(query, rows, tap.at), key, mask, scale, softcap)
        tap.observe(scores, scores.softmax(-1))
    return output, None


def register() -> str:
    """Make the attention function known to transformers; safe to call again.

    Returns:
        The name to pass as `attn_implementation`.
    """
    AttentionInterface.register(ATTENTION_NAME, monitored_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)
    return ATTENTION_NAME


def attach(layer: nn.Module, tap: AttentionTap | None = None) -> AttentionTap:
    """Put a tap, a fresh one unless one is given, on an attention module and return it."""
    tap = tap or AttentionTap()
    setattr(layer, _TAP, tap)
    return tap


def watch(layer: nn.Module, watcher: Callable[[Tensor, Tensor, float], None] | None) -> None:
    """Have every pass of an attention module tell its queries, keys (both rotated) and scaling; None ends that."""
    if watcher is not None:
        setattr(layer, _WATCHER, watcher)
    elif hasattr(layer, _WATCHER):
        delattr(layer, _WATCHER)


def detach(layer: nn.Module) -> None:
    """Remove the tap of an attention module, if it has one (copies of a layer must not observe)."""
    if hasattr(layer, _TAP):
        delattr(layer, _TAP)
