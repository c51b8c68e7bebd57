"""Which slots of the cache each new position sees.

Slot numbers are positions, and a query at slot s sees the slots up to s, or the last `window` of them in a sliding
layer. Where that is plain causality no mask is made: one new position on rows of one length, a prompt from slot 0 on, a
long piece of a prompt behind another. A mask is added to the scores, since a kernel would turn a boolean one into that
in every layer again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmem.attention import FEW, plain
from flashmem.slots import Slots


def pass_mask(slots: Slots, width: int, window: int | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The mask of one pass in layers of one kind.

    Args:
        slots: where the pass writes and how far it looks.
        width: Q, its positions a row.
        window: of a sliding layer, or None.
        device: where the mask is made.
        dtype: of the scores.

    Returns:
        `[B or 1, 1, Q, T]`, 0 where a query may look and else the smallest number, or `attention.plain`.
    """
    reaches_all = window is None or slots.end <= window
    if slots.start is not None and reaches_all and _needs_none(slots.start, width, device):
        return plain(device)
    places = torch.arange(slots.end, device=device)
    if slots.index is not None:
        queries = slots.index
    else:
        assert slots.start is not None
        queries = torch.arange(slots.start, slots.start + width, device=device)[None]
    seen = places <= queries[..., None]
    if not reaches_all:
        assert window is not None
        seen &= places > queries[..., None] - window
    # Not infinity: a masked score must stay a number where it meets a weight of zero.
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
    return torch.where(seen, hidden.new_zeros(()), hidden)[:, None]


def _needs_none(start: int, width: int, device: torch.device) -> bool:
    # For a few queries a mask costs less than a kernel in two parts; a GPU has one that needs neither.
    return start == 0 or width == 1 or width > FEW or device.type == "cuda"
