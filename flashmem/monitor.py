"""The Cognitive Monitor: entropy of the newest token's attention, without a T x T matrix.

transformers lets one register an attention function by name. Ours, `monitored_attention`, hands everything to SDPA
except in the one layer that carries an `AttentionTap`. There it keeps the attention row of the newest token:

* a one-token query (a decode step) computes its scores once and uses them for the layer's output *and* for the
  entropy: one pass over K;
* a longer query (prefill, an injection) goes through SDPA, and the rows asked for (normally one) are scored again.

Entropy (paper Eq. 3-4): per head, the sinks (the first non-pad tokens) and the positions that hold latents are
removed, the rest is renormalised, Shannon entropy in nats in float32, then the mean over heads.

The name matters: transformers takes a name that begins with "flash" for a flash kernel, and Gemma 2 refuses a name
that contains "sdpa". Nothing here decides when to trigger: that is `flashmem.trigger`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from flashmem.errors import ConfigError

ATTENTION_NAME = "monitored_attention"
_TAP = "flashmem_tap"
_WATCHER = "flashmem_watcher"


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
        exclude: `[B, T]` True where a key is not counted, T the length of the cache after the pass.
        rows: how many of the newest queries are observed; 0 switches the tap off.
        normalise: as in `MonitorConfig`.
        entropy: `[B, rows]` nats, float32, the result of the last pass.
        clock: receives the phase "monitor"; None is no timing.
        kept: gets the newest query's whole row `[B, T]` in every pass, mean over heads, float32; None keeps nothing.
    """

    exclude: Tensor | None = None
    rows: int = 1
    normalise: bool = False
    entropy: Tensor | None = None
    clock: Any = field(default=None, repr=False)
    kept: list[Tensor] | None = field(default=None, repr=False)

    def observe(self, weights: Tensor) -> None:
        """Reduce attention rows `[B, G, R, rows, T]` to entropies `[B, rows]`."""
        with self.clock.phase("monitor") if self.clock is not None else nullcontext():
            self.entropy = row_entropy(weights.detach(), self.exclude, normalise=self.normalise)


def row_entropy(weights: Tensor, exclude: Tensor | None, *, normalise: bool = False) -> Tensor:
    """Entropy of attention rows after some keys are removed (paper Eq. 3-4).

    With p the row after removal and s its sum, `-sum (p/s) log (p/s) = log s - (1/s) sum p log p`: no second
    normalised row is ever stored.

    Args:
        weights: `[B, G, R, Q, T]` attention probabilities (G KV heads, R query heads each).
        exclude: `[B, T]` True where a key is removed, or None.
        normalise: divide by the logarithm of the number of keys that are left.

    Returns:
        `[B, Q]` nats, float32; 0 where nothing is left of a row.
    """
    p = weights.float()
    if exclude is not None:
        p = p.masked_fill(exclude[:, None, None, None, :].to(p.device), 0.0)
    mass = p.sum(-1)
    plogp = torch.special.entr(p).sum(-1)
    entropy = torch.where(mass > 0, mass.clamp_min(1e-30).log() + plogp / mass.clamp_min(1e-30), 0.0)
    entropy = entropy.clamp_min(0.0).mean(dim=(1, 2))
    if normalise:
        entropy = entropy / (p > 0).any(dim=(1, 2)).sum(-1).clamp_min(2).log()
    return entropy


def attention_rows(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention probabilities of a few queries, K never repeated for grouped heads.

    Args:
        query: `[B, H, Q, d_h]`.
        key: `[B, G, T, d_h]`, H a multiple of G.
        mask: `[B, 1, Q, T]`, boolean (True = visible) or additive, or None for "all visible".
        scaling: factor on the scores.
        softcap: Gemma 2's cap on the scores, or None.

    Returns:
        `[B, G, H / G, Q, T]` in float32.
    """
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, (heads // groups) * rows, width)
    scores = torch.matmul(grouped, key.transpose(-1, -2)).float() * scaling
    scores = scores.view(batch, groups, heads // groups, rows, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        mask = mask[..., : scores.shape[-1]].unsqueeze(2)
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def _apply(weights: Tensor, value: Tensor) -> Tensor:
    """`[B, G, R, Q, T]` times `[B, G, T, d_h]`, returned as `[B, Q, H, d_h]`."""
    batch, groups, repeat, rows, length = weights.shape
    flat = weights.to(value.dtype).reshape(batch, groups, repeat * rows, length)
    out = torch.matmul(flat, value).view(batch, groups * repeat, rows, -1)
    return out.transpose(1, 2).contiguous()


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """The `[1, 1, Q, T]` mask that a missing mask stands for: the queries are the last Q positions."""
    rows, length = query.shape[2], key.shape[2]
    ones = torch.ones(rows, length, dtype=torch.bool, device=query.device)
    return ones.tril(length - rows)[None, None]


def _last_rows(mask: Tensor | None, query: Tensor, key: Tensor, rows: int) -> Tensor | None:
    if mask is None:
        return None if rows == 1 else _causal(query[:, :, -rows:], key)
    return mask[:, :, -rows:]


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
        attention_mask: `[B, 1, Q, T]` boolean or additive; None means causal, and only with Q = T or Q = 1.

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
        mask = _last_rows(attention_mask, query, key, 1)
        row = attention_rows(query[:, :, -1:].float(), key.float(), mask, scale, softcap)
        tap.kept.append(row.mean(dim=(1, 2))[:, 0])
    if query.shape[2] == 1 and (rows or softcap is not None):
        weights = attention_rows(query, key, attention_mask, scale, softcap)
        if rows:
            tap.observe(weights)
        return _apply(weights, value), None
    if softcap is not None:
        mask = _causal(query, key) if attention_mask is None else attention_mask
        output = _apply(attention_rows(query, key, mask, scale, softcap), value)
    else:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if rows:
        mask = _last_rows(attention_mask, query, key, rows)
        tap.observe(attention_rows(query[:, :, -rows:], key, mask, scale, softcap))
    return output, None


def register() -> str:
    """Make the attention function known to transformers; safe to call again.

    Returns:
        The name to pass as `attn_implementation`.
    """
    AttentionInterface.register(ATTENTION_NAME, monitored_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)
    return ATTENTION_NAME


def attach(attention: nn.Module) -> AttentionTap:
    """Put a fresh tap on an attention module and return it."""
    tap = AttentionTap()
    setattr(attention, _TAP, tap)
    return tap


def watch(attention: nn.Module, watcher: Callable[[Tensor, Tensor, float], None] | None) -> None:
    """Have every pass of an attention module tell its queries, keys (both rotated) and scaling; None ends that."""
    if watcher is not None:
        setattr(attention, _WATCHER, watcher)
    elif hasattr(attention, _WATCHER):
        delattr(attention, _WATCHER)


def detach(attention: nn.Module) -> None:
    """Remove the tap of an attention module, if it has one (copies of a layer must not observe)."""
    if hasattr(attention, _TAP):
        delattr(attention, _TAP)
