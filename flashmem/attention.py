"""Attention over the part of the cache that is used, through torch's kernels and without repeating grouped K and V.

A decode step has one query per head, and R = H / G query heads share one KV head: folded, they are R queries of that
KV head, which any kernel takes as it is, with or without a mask. The same serves the few queries of an injection. Long
queries (prefill) are handed over with `enable_gqa`; where nothing but causality hides a key, no mask is made at all.

`plain()` is how the backbone says so. transformers makes a mask of its own where it gets none, but passes on what has
four dimensions; so "no mask" is a tensor of four dimensions and no elements.

A recorded decode step (see `flashmem.engine`) attends under a mask over more slots than are used. On a GPU a kernel
that gives each KV head one block would leave most of the device idle there, so there are several ways to compute the
same, and `best_kernel` takes the one that measures best for a shape, once, after each has been held against the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

# Queries that are folded under a mask: the mask is repeated R times, which is nothing for so few.
FEW = 64
# Slots of one part where a row of keys is cut into parts.
_PART = 1024
_TRIES = 5
_sdpa = torch.nn.functional.scaled_dot_product_attention
_cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


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
    rows, few = query.shape[2], query.shape[2] <= FEW
    if rows == 1 and is_plain(mask):
        return _folded(query, key, value, None, scaling, dropout)
    if rows == 1 and mask is not None and mask.dtype != torch.bool and not dropout:
        return KERNELS[_decoding](query, key, value, mask, scaling)
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
    """`[B, H, Q, d_h]`; a piece behind another needs no mask where the device has a kernel for it."""
    rows, length, grouped = query.shape[2], key.shape[2], query.shape[1] != key.shape[1]
    if rows == length:
        return _sdpa(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped)
    if query.device.type == "cpu" and not dropout and not (torch.is_grad_enabled() and query.requires_grad):
        return _in_two(query, key, value, scaling)
    bias = causal_lower_right(rows, length)
    return _sdpa(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling, enable_gqa=grouped)


def _in_two(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """What lies before the piece, all of it visible, and the piece itself, joined by their sums of exponentials.

    The CPU has no kernel for a causal piece behind another, and under a mask it takes twice as long and Q x T numbers.
    The kernel is called by its own name because the public function does not tell the sums.
    """
    batch, heads, rows, width = query.shape
    groups, start = key.shape[1], key.shape[2] - rows
    early, early_sums = _cpu_kernel(fold(query, groups), key[:, :, :start], value[:, :, :start], scale=scaling)
    shape = (batch, groups, heads // groups, rows)
    early, early_sums = early.view(*shape, width), early_sums.view(shape)
    pieces = [
        # Folded queries have no order, so the query heads of a KV head come one after the other.
        _cpu_kernel(part, key[:, :, start:], value[:, :, start:], is_causal=True, scale=scaling)
        for part in query.view(*shape, width).unbind(2)
    ]
    late, late_sums = (torch.stack(parts, 2) for parts in zip(*pieces, strict=True))
    share = torch.sigmoid(early_sums - late_sums)[..., None].to(late.dtype)
    return late.lerp_(early, share).view(batch, heads, rows, width)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, dropout: float) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1 and query.device.type != "cpu":
        # The one kernel that takes a mask there wants as many KV heads as query heads.
        key, value, repeat = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1), 1
    return _sdpa(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=repeat > 1)


def _by_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    return _folded(query, key, value, mask, scaling, 0.0)


def _by_matmul(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Scores, softmax and weighted sum as three kernels; each spreads over the keys as it likes."""
    batch, heads, _, width = query.shape
    scores = torch.matmul(fold(query, key.shape[1]), key.transpose(-1, -2)).float() * scaling
    weights = (scores + mask).softmax(-1)
    return torch.matmul(weights.to(value.dtype), value).reshape(batch, heads, 1, width).transpose(1, 2)


def _by_parts(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """The keys in parts, each with a softmax of its own, put together by their sums: parallel over the parts."""
    batch, heads, _, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    parts = max(n for n in range(1, max(2, length // _PART + 1)) if length % n == 0)
    shape = (batch, groups, parts, length // parts)
    keys, values = key.unflatten(2, shape[2:]), value.unflatten(2, shape[2:])
    folded = fold(query, groups)[:, :, None]
    scores = torch.matmul(folded, keys.transpose(-1, -2)).float() * scaling
    scores = scores + mask.expand(batch, 1, 1, length).reshape(batch, 1, parts, 1, length // parts)
    peak = scores.amax(-1, keepdim=True)
    weights = (scores - peak).exp()
    sums, outputs = weights.sum(-1, keepdim=True), torch.matmul(weights.to(value.dtype), values).float()
    share = (peak - peak.amax(2, keepdim=True)).exp()
    out = (outputs * share).sum(2) / (sums * share).sum(2)
    return out.to(query.dtype).reshape(batch, heads, 1, width).transpose(1, 2)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
# Attention of one query a row under an additive mask `[B, 1, 1, T]`, all `[B, 1, H, d_h]`; the first is the reference.
KERNELS: dict[str, Kernel] = {"sdpa": _by_sdpa, "matmul": _by_matmul, "parts": _by_parts}
_decoding = "sdpa"
_measured: dict[tuple[object, ...], str] = {}


@contextmanager
def decoding_with(kernel: str) -> Iterator[None]:
    """Inside, one-token queries under a mask take this kernel."""
    global _decoding
    before, _decoding = _decoding, kernel
    try:
        yield
    finally:
        _decoding = before


def best_kernel(keys: Tensor, heads: int) -> str:
    """The kernel of one-token queries that measures best on a GPU; on a CPU always the first one.

    Args:
        keys: `[B, G, T, d_h]` of one layer, T the slots that are looked at.
        heads: query heads H.
    """
    if keys.device.type != "cuda":
        return "sdpa"
    shape = (*keys.shape, heads, keys.dtype, keys.device)
    if shape not in _measured:
        _measured[shape] = _measure(keys, heads)
    return _measured[shape]


def _measure(keys: Tensor, heads: int) -> str:
    batch, _, length, width = keys.shape
    query = torch.randn(batch, heads, 1, width, dtype=keys.dtype, device=keys.device)
    mask = torch.zeros(batch, 1, 1, length, dtype=keys.dtype, device=keys.device)
    wanted, times = _by_sdpa(query, keys, keys, mask, width**-0.5), {}
    for name, kernel in KERNELS.items():
        found = kernel(query, keys, keys, mask, width**-0.5)
        if torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=2e-2):
            times[name] = _seconds(lambda kernel=kernel: kernel(query, keys, keys, mask, width**-0.5), keys.device)
    return min(times, key=lambda name: times[name])


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of a few runs as they will be: replayed, without the launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_TRIES):
            run()
    times = []
    for _ in range(_TRIES):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
