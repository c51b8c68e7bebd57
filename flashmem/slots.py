"""Tensors with a slot axis: what a cache is made of.

Slot s of a row holds the row's s-th position. A buffer has room for more slots than are used, is written in place at
slots that may differ from row to row, and shows the first so many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Capacities are multiples of it, so that a few tokens more do not ask for a new buffer.
GRANULE = 64
_GROWTH = 1.5


@dataclass(frozen=True)
class Slots:
    """Where one pass writes, and how far it looks.

    Attributes:
        start: the slot at which all rows begin; None where they differ.
        end: slots [0, end) hold everything that a query of the pass may see.
        index: `[B, Q]` slot of each new position; None where `start` says it all.
    """

    start: int | None
    end: int
    index: Tensor | None = None


class SlotBuffer:
    """A tensor with a slot axis of fixed capacity; it is made by the first write.

    Attributes:
        axis: which axis counts slots; axis 0 counts rows.
        data: `[B, ..., C, ...]`, zeros where nothing was written, or None.
    """

    def __init__(self, axis: int, data: Tensor | None = None) -> None:
        self.axis, self.data = axis, data

    @property
    def capacity(self) -> int:
        """Slots C."""
        return 0 if self.data is None else self.data.shape[self.axis]

    def view(self, end: int) -> Tensor:
        """The first slots; do not write."""
        assert self.data is not None
        return self.data.narrow(self.axis, 0, end)

    def write(self, new: Tensor, slots: Slots) -> Tensor:
        """Put new positions at their slots in place; returns the slots that the pass looks at."""
        assert self.data is not None
        if slots.start is not None:
            self.data.narrow(self.axis, slots.start, new.shape[self.axis]).copy_(new)
        else:
            self.data.scatter_(self.axis, self._index(slots, new), new)
        return self.view(slots.end)

    def joined(self, new: Tensor, slots: Slots) -> Tensor:
        """What `write` returns, as a tensor of its own through which gradients flow; the buffer stays as it is."""
        if slots.start is not None:
            return new if not slots.start else torch.cat([self.view(slots.start), new], self.axis)
        old = self.view(min(slots.end, self.capacity))
        missing = list(old.shape)
        missing[self.axis] = slots.end - old.shape[self.axis]
        return torch.cat([old, old.new_zeros(missing)], self.axis).scatter(self.axis, self._index(slots, new), new)

    def resized(self, like: Tensor, capacity: int, held: int) -> None:
        """Move what is held to a buffer of another capacity, with the other axes and the type of `like`."""
        shape = list(like.shape)
        shape[self.axis] = capacity
        # Never an inference tensor: who reads a state later may write to it outside of inference mode.
        with torch.inference_mode(False):
            fresh = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if self.data is not None and held:
            fresh.narrow(self.axis, 0, held).copy_(self.view(held))
        self.data = fresh

    def grow(self, like: Tensor, wanted: int, held: int) -> None:
        """Have room for so many slots, and for some more, so that this is not asked for often."""
        wanted = max(wanted, int(self.capacity * _GROWTH))
        self.resized(like, -(-wanted // GRANULE) * GRANULE, min(self.capacity, held))

    def _index(self, slots: Slots, new: Tensor) -> Tensor:
        assert slots.index is not None
        shape = [1] * new.dim()
        shape[0], shape[self.axis] = new.shape[0], new.shape[self.axis]
        return slots.index.to(new.device).view(shape).expand_as(new)
