"""Attention over the part of the cache that is used, through torch's kernels and without repeating grouped K and V.

A decode step has one query per head, and R = H / G query heads share one KV head: folded, they are R queries of that
KV head, which any kernel takes as it is, with or without a mask. The same serves the few queries of an injection. Long
queries (prefill) are handed over with `enable_gqa`; where nothing but causality hides a key, no mask is made at all.

`plain()` is how the backbone says so. transformers makes a mask of its own where it gets none, but passes on what has
four dimensions; so "no mask" is a tensor of four dimensions and no elements.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

# Queries that are folded under a mask: the mask is repeated R times, which is nothing for so few.
_FEW = 64
_sdpa = torch.nn.functional.scaled_dot_product_attention


def plain(device: torch.device) -> Tensor:
    """Stands for: causal, the queries are the last positions, nothing else is hidden."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def is_plain(mask: Tensor | None) -> bool:
    """Whether a mask says nothing but causality."""
    return mask is None or mask.numel() == 0


def fold(query: Tensor, groups: int) -> Tensor:
    """`[B, H, Q, d_h]` to `[B, G, R Q, d_h]`: the query heads of a KV head become queries of it."""
    batch, heads, rows, width = query.shape
    return query.reshape(batch, groups, (heads // groups) * rows, width)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: `[B, H, Q, d_h]`.
        key: `[B, G, T, d_h]`, H a multiple of G.
        value: `[B, G, T, d_h]`.
        mask: `[B or 1, 1, Q, T]` boolean or additive, or one for which `is_plain` holds.
        scaling: factor on the scores.
        dropout: share of the weights that is dropped; 0 outside of training a backbone.

    Returns:
        `[B, Q, H, d_h]`.
    """
    rows, few = query.shape[2], query.shape[2] <= _FEW
    if rows == 1 and is_plain(mask):
        return _folded(query, key, value, None, scaling, dropout)
    if few and not is_plain(mask):
        return _folded(query, key, value, mask, scaling, dropout)
    if is_plain(mask):
        output = _causal(query, key, value, scaling, dropout)
    else:
        output = _masked(query, key, value, mask, scaling, dropout)
    return output.transpose(1, 2).contiguous()


def _folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float) -> Tensor:
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    if mask is not None and rows > 1:
        mask = mask.repeat(1, 1, heads // groups, 1)
    out = _sdpa(fold(query, groups), key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.reshape(batch, heads, rows, width).transpose(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
    """`[B, H, Q, d_h]`; the lower-right form makes no mask where the device has a kernel for it."""
    rows, length, grouped = query.shape[2], key.shape[2], query.shape[1] != key.shape[1]
    if rows == length:
        return _sdpa(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped)
    bias = causal_lower_right(rows, length)
    return _sdpa(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling, enable_gqa=grouped)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, dropout: float) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1 and query.device.type != "cpu":
        # The one kernel that takes a mask there wants as many KV heads as query heads.
        key, value, repeat = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1), 1
    return _sdpa(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=repeat > 1)
