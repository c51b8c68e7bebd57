"""Which slots of the cache each new position sees.

Slot numbers are positions, and a query at slot s sees the slots up to s, or the last `window` of them in a sliding
layer. Where that is plain causality no mask is made: one new position on rows of one length, a prompt from slot 0 on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmem.attention import plain
from flashmem.kv_cache import Slots


def pass_mask(slots: Slots, width: int, window: int | None, device: torch.device) -> Tensor:
    """The mask of one pass in layers of one kind.

    Args:
        slots: where the pass writes and how far it looks.
        width: Q, its positions a row.
        window: of a sliding layer, or None.
        device: where the mask is made.

    Returns:
        `[B or 1, 1, Q, T]`, True where a query may look, or `attention.plain`.
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
    return seen[:, None]


def _needs_none(start: int, width: int, device: torch.device) -> bool:
    # Only a GPU has kernels for a piece of a prompt behind another; elsewhere each layer would make the mask again.
    return start == 0 or width == 1 or device.type == "cuda"
