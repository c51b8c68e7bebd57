"""The KV cache: allocated once, written in place, with a length of its own for each row of the batch.

Slot s of a row holds the row's s-th position, latents counted. Rows are as long as they are: a prompt begins at slot 0
whatever the others' lengths, and a row that takes no part in a pass is not moved on by it. What such a pass writes
behind the end of that row is never seen, because a query at slot s sees the slots up to s and no others, and the next
pass overwrites it. So there is no padding, no hole and no mask of either, and nothing is ever moved because of others.

Sharing: a fork has the same buffers and other lengths. Buffers only grow at their ends, so the first fork that goes on
writes where the others have not been, and copies nothing; only one that would write over slots that another cache
still holds gets buffers of its own (`place`).

With gradients (training) nothing is written in place: each pass puts new tensors in the place of the old ones.

This is the only file that knows what transformers asks of a cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from flashmem.slots import GRANULE, SlotBuffer, Slots


@dataclass
class _Book:
    """What the layers of one cache share: lengths, the pass under way, and whether it is kept."""

    lengths: list[int]
    reserved: int = 0
    slots: Slots | None = None
    keeps: bool = True
    # While a pass is recorded that must not ask the host: slots that it looks at, whatever the lengths.
    bucket: int | None = None
    ends: Tensor | None = None

    @property
    def longest(self) -> int:
        """Slots that hold everything."""
        return max(self.lengths) if self.bucket is None else self.bucket

    def fit(self, buffer: SlotBuffer, like: Tensor) -> None:
        """Grow a buffer that the pass does not fit into; the other axes are those of `like`."""
        assert self.slots is not None
        if self.slots.end > buffer.capacity:
            buffer.grow(like, max(self.slots.end, self.reserved), max(self.lengths))


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, `[B, G, C, d_h]` each."""

    is_sliding = False

    def __init__(self, book: _Book, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        # Not the base class's: there, keys and values are plain attributes.
        self.book, self.buffers = book, (SlotBuffer(2, keys), SlotBuffer(2, values))
        self.is_initialized = keys is not None

    @property
    def keys(self) -> Tensor:
        """`[B, G, T, d_h]`, T the longest row; a view, do not write."""
        return self.buffers[0].view(self.book.longest)

    @property
    def values(self) -> Tensor:
        """As `keys`."""
        return self.buffers[1].view(self.book.longest)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the model's layer with its new `[B, G, Q, d_h]`; returns what the pass looks at."""
        keys, values = (self._add(it, new) for it, new in zip(self.buffers, (key_states, value_states), strict=True))
        self.is_initialized = True
        return keys, values

    def _add(self, buffer: SlotBuffer, new: Tensor) -> Tensor:
        book = self.book
        assert book.slots is not None
        tracked = torch.is_grad_enabled() and (
            new.requires_grad or (buffer.data is not None and buffer.data.requires_grad)
        )
        if tracked or not book.keeps:
            whole = buffer.joined(new, book.slots)
            if book.keeps:
                buffer.data = whole
            return whole
        book.fit(buffer, new)
        return buffer.write(new, book.slots)

    def get_seq_length(self) -> int:
        """Slots of the longest row."""
        return max(self.book.lengths)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the pass sees, and where they begin."""
        return self.book.slots.end if self.book.slots is not None else self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit: a buffer that is full is replaced."""
        return -1

    # Asked for by older versions.
    get_max_cache_shape = get_max_length

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing to do: the first write makes the buffers."""


class RaggedCache(Cache):
    """The cache of B rows.

    Attributes:
        lengths: slots that each row holds, on the host.
        inputs: input embeddings `[B, C, d]` by slot, kept only for memories that re-encode the history.
        marks: `[B, C]` True where a slot holds a latent; made by the first latent, False behind each row's end.
    """

    def __init__(self, layers: int, rows: int, *, keep_inputs: bool = False) -> None:
        self.book = _Book([0] * rows)
        super().__init__(layers=[RaggedLayer(self.book) for _ in range(layers)])
        self.inputs = SlotBuffer(1) if keep_inputs else None
        self.marks: SlotBuffer | None = None
        # Caches with the same buffers, this one among them.
        self._kin: weakref.WeakSet[RaggedCache] = weakref.WeakSet([self])

    @property
    def lengths(self) -> list[int]:
        """Slots that each row holds."""
        return self.book.lengths

    @property
    def even(self) -> bool:
        """Whether all rows are known to have one length."""
        return self.book.bucket is None and len(set(self.book.lengths)) == 1

    @property
    def capacity(self) -> int:
        """Slots that the buffers have room for."""
        return max((buffer.capacity for buffer in self._buffers()), default=0)

    def reserve(self, slots: int) -> None:
        """The next buffers that are made have room for so many slots."""
        self.book.reserved = max(self.book.reserved, slots)

    def alias(self) -> RaggedCache:
        """The same buffers under lengths of their own, and no say in who may write."""
        other = self._like(len(self.lengths), lambda buffer: SlotBuffer(buffer.axis, buffer.data))
        other.book.lengths[:] = self.lengths
        return other

    def shares(self, other: RaggedCache) -> bool:
        """Whether both have the very same buffers; marks, which every fork has for itself, only need the same size."""
        mine, theirs = list(self._buffers()), list(other._buffers())
        if len(mine) != len(theirs) or self.marks is None or other.marks is None:
            return False
        alike = self.marks.capacity == other.marks.capacity
        return alike and all(a is self.marks or _same(a, b, 0) for a, b in zip(mine, theirs, strict=True))

    def hand_marks(self, other: RaggedCache, before: RaggedCache | None) -> None:
        """Have another cache keep its marks in this one's buffer, which `before` kept its own in."""
        assert self.marks is not None and self.marks.data is not None and other.marks is not None
        if other.marks.data is None or _same(self.marks, other.marks, 0):
            return
        if before is not None and before is not other and before.marks is not None:
            before.crop(list(before.lengths))
        self.marks.data.copy_(other.marks.data)
        other.marks = SlotBuffer(1, self.marks.data)

    def alike(self, other: RaggedCache) -> bool:
        """Whether another cache has layers and kept inputs as this one has."""
        return (len(self.layers), self.inputs is None) == (len(other.layers), other.inputs is None)

    def borrow(self, other: RaggedCache) -> None:
        """Begin, empty, in the buffers of another cache."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.buffers = tuple(SlotBuffer(buffer.axis, buffer.data) for buffer in theirs.buffers)
            mine.is_initialized = True
        if other.inputs is not None:
            self.inputs = SlotBuffer(1, other.inputs.data)
        if other.marks is not None and other.marks.data is not None:
            other.marks.data.zero_()
            self.marks = SlotBuffer(1, other.marks.data)

    def move_to(self, other: RaggedCache) -> None:
        """Go on in the buffers of a cache that is `alike`, is large enough and is not read any more."""
        held = max(self.lengths)
        for mine, theirs in zip(self._buffers(), other._buffers(), strict=True):
            assert theirs.data is not None
            if mine is self.marks:
                theirs.data.zero_()
            if mine.data is not None:
                known = min(held, mine.capacity)
                theirs.view(known).copy_(mine.view(known))
            mine.data = theirs.data
        self._leave()

    def make_room(self, slots: int) -> None:
        """Have buffers for so many slots now, which are this cache's own to write behind the rows' ends."""
        if len(self._kin) > 1:
            self._claim()
        self.book.slots = Slots(0, slots)
        for buffer in self._buffers():
            if buffer.data is not None:
                self.book.fit(buffer, buffer.data)
            elif buffer is self.marks:
                like = torch.zeros(1, 1, dtype=torch.bool, device=self._device()).expand(len(self.lengths), 1)
                self.book.fit(buffer, like)

    @contextmanager
    def static(self, slots: Slots, ends: Tensor) -> Iterator[None]:
        """Inside, nothing depends on the host's lengths: a pass has these slots, and rows end where `ends` says."""
        self.book.bucket, self.book.ends, self.book.slots = slots.end, ends, slots
        try:
            yield
        finally:
            self.book.bucket = self.book.ends = None

    def place(self, width: int, starts: Callable[[], Tensor]) -> Slots:
        """Decide where a pass of `width` positions a row writes, and have the right to write there.

        Args:
            width: Q.
            starts: the rows' lengths as a `[B]` tensor; asked for where they differ.
        """
        lengths = self.book.lengths
        longest = max(lengths)
        if len(self._kin) > 1:
            self._claim()
        if self.even:
            self.book.slots = Slots(longest, longest + width)
        else:
            here = starts()
            index = here[:, None] + torch.arange(width, device=here.device)
            self.book.slots = Slots(None, longest + width, index)
        if self.marks is not None and self.marks.data is not None:
            # A pass without latents writes none, but marks reach as far as keys do.
            self.book.fit(self.marks, self.marks.data)
        return self.book.slots

    def commit(self, counts: Sequence[int]) -> None:
        """The pass is over: so many of its positions count for each row."""
        if self.book.keeps:
            self.book.lengths[:] = [n + count for n, count in zip(self.book.lengths, counts, strict=True)]

    def keep_inputs(self, embeds: Tensor, slots: Slots) -> None:
        """Write input embeddings `[B, Q, d]` where they are kept."""
        if self.inputs is not None and self.book.keeps:
            self.book.fit(self.inputs, embeds)
            self.inputs.write(embeds.detach(), slots)

    def mark(self, latents: Tensor, slots: Slots) -> None:
        """Note which of the new positions `[B, Q]` are latents."""
        if not self.book.keeps:
            return
        if self.marks is None:
            self.marks = SlotBuffer(1)
        self.book.fit(self.marks, latents)
        self.marks.write(latents, slots)

    def fork(self) -> RaggedCache:
        """A cache that goes on by itself from what this one holds; nothing is copied."""
        other = self.alias()
        # Marks, a byte a slot, become its own here: a pass without latents does not write over what another marked.
        other.crop(self.lengths)
        self._kin.add(other)
        other._kin = self._kin
        return other

    def reading(self) -> RaggedCache:
        """A cache that shows new positions behind those of this one and keeps nothing of them."""
        other = self.fork()
        other.book.keeps = False
        # It never writes, so nobody has to spare it.
        self._kin.discard(other)
        other._kin = weakref.WeakSet([other])
        return other

    def rows(self, rows: Sequence[int]) -> RaggedCache:
        """A cache of some rows. Neighbours are views, written in place with room for all; others are copies.

        What was written comes back with `put`. Until then this cache and its forks stand still, and the rows may forget
        what they added but nothing of what they began with.
        """
        first, count, end = rows[0], len(rows), max(self.lengths[row] for row in rows)
        together = list(rows) == list(range(first, first + count))

        def take(buffer: SlotBuffer) -> SlotBuffer:
            if buffer.data is None:
                return SlotBuffer(buffer.axis)
            if together:
                return SlotBuffer(buffer.axis, buffer.data[first : first + count])
            index = torch.tensor(rows, device=buffer.data.device)
            return SlotBuffer(buffer.axis, buffer.view(end).index_select(0, index))

        if together and len(self._kin) > 1:
            self._claim()
        other = self._like(count, take)
        other.book.lengths[:] = [self.lengths[row] for row in rows]
        other.book.reserved = self.book.reserved
        return other

    def put(self, rows: Sequence[int], other: RaggedCache, since: Sequence[int] | None = None) -> None:
        """Take over rows of another cache, from the slots `since` on (the beginning)."""
        self._match(other)
        self.reserve(other.book.reserved)
        if len(self._kin) > 1:
            self._claim([0 if since is None else since[rows.index(n)] if n in rows else 10**9 for n in self._each()])
        self.book.slots = Slots(0, max(other.lengths))
        if self.marks is not None and self.marks.data is not None and not _same(self.marks, other.marks, rows[0]):
            # Latents of whoever sat there before.
            for nth, row in enumerate(rows):
                self.marks.data[row, 0 if since is None else since[nth] :] = False
        for mine, theirs in zip(self._buffers(), other._buffers(), strict=True):
            like = mine.data if theirs.data is None else theirs.data
            if like is None or _same(mine, theirs, rows[0]):
                continue
            # Also where nothing is copied: all buffers reach as far as the longest row.
            self.book.fit(mine, like[:1].expand(len(self.lengths), *like.shape[1:]))
            if mine.data is None or theirs.data is None:
                continue
            for nth, row in enumerate(rows):
                begin = 0 if since is None else since[nth]
                place = mine.axis - 1, begin, other.lengths[nth] - begin
                mine.data[row].narrow(*place).copy_(theirs.data[nth].narrow(*place))
        for nth, row in enumerate(rows):
            self.lengths[row] = other.lengths[nth]

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget the newest slots: each row is as long as said."""
        if self.marks is not None and self.marks.data is not None:
            # Latents are False behind the end. Not in place: rows that were taken out may be cropped for themselves.
            with torch.inference_mode(False):
                ends = torch.tensor(lengths, device=self.marks.data.device)
                places = torch.arange(self.marks.capacity, device=ends.device)
                self.marks.data = self.marks.data & (places < ends[:, None])
        self.book.lengths[:] = lengths

    def repeat(self, times: int) -> None:
        """Every row so many times, one behind the other; each gets its own copy."""
        for buffer in self._buffers():
            if buffer.data is not None:
                held = buffer.view(max(self.lengths)).repeat_interleave(times, 0)
                buffer.data = None
                buffer.resized(held, max(self.book.reserved, held.shape[buffer.axis] + GRANULE), 0)
                assert buffer.data is not None
                buffer.view(held.shape[buffer.axis]).copy_(held)
        self.book.lengths = [n for n in self.lengths for _ in range(times)]
        self._rebind()

    def pick(self, kept: Sequence[Tensor]) -> None:
        """Keep some slots of each layer and KV head, `[B, G, S]` in ascending order, S the same everywhere."""
        gone = max(self.lengths) - kept[0].shape[-1]
        self.book.reserved = max(0, self.book.reserved - gone)
        for layer, slots in zip(self.layers, kept, strict=True):
            for buffer in layer.buffers:
                index = slots.to(buffer.data.device)[..., None].expand(-1, -1, -1, buffer.data.shape[-1])
                chosen = buffer.data.gather(2, index)
                buffer.data = None
                buffer.resized(chosen, max(self.book.reserved, chosen.shape[2] + GRANULE), 0)
                buffer.view(chosen.shape[2]).copy_(chosen)
        if self.inputs is not None:
            self.inputs = None
        self.marks = None
        self.book.lengths[:] = [kept[0].shape[-1]] * len(self.lengths)
        self._leave()

    def load(self, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int]) -> None:
        """Hold given keys and values of all layers, `[B, G, T, d_h]` each; `place` must have said where."""
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            layer.update(k, v)
        self.book.lengths[:] = lengths

    def _device(self) -> torch.device:
        data = self.layers[0].buffers[0].data
        return data.device if data is not None else torch.device("cpu")

    def _each(self) -> range:
        return range(len(self.lengths))

    def _buffers(self) -> Iterator[SlotBuffer]:
        for layer in self.layers:
            yield from layer.buffers
        if self.inputs is not None:
            yield self.inputs
        if self.marks is not None:
            yield self.marks

    def _match(self, other: RaggedCache) -> None:
        """Both have the same kinds of buffers afterwards, and marks where either has any."""
        for mine, theirs in ((self, other), (other, self)):
            if mine.marks is None and theirs.marks is not None and theirs.marks.data is not None:
                mine.marks = SlotBuffer(1)
                none = theirs.marks.data[:1, :1].expand(len(mine.lengths), -1)
                mine.marks.resized(none, max(1, mine.capacity), 0)

    def _like(self, rows: int, take: Callable[[SlotBuffer], SlotBuffer]) -> RaggedCache:
        """A cache whose buffers `take` makes of this one's."""
        other = RaggedCache(len(self.layers), rows)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.buffers = tuple(take(buffer) for buffer in mine.buffers)
            theirs.is_initialized = mine.is_initialized
        other.inputs = take(self.inputs) if self.inputs is not None else None
        other.marks = take(self.marks) if self.marks is not None else None
        other.book.reserved = self.book.reserved
        return other

    def _claim(self, starts: Sequence[int] | None = None) -> None:
        """Have buffers of one's own where another cache holds slots that are about to be written."""
        starts = self.lengths if starts is None else starts
        others = [cache for cache in self._kin if cache is not self]
        if any(theirs > start for cache in others for theirs, start in zip(cache.lengths, starts, strict=True)):
            held = max(self.lengths)
            for buffer in self._buffers():
                if buffer.data is not None:
                    buffer.resized(buffer.data, max(buffer.capacity, self.book.reserved), held)
            self._leave()

    def _leave(self) -> None:
        self._kin.discard(self)
        self._kin = weakref.WeakSet([self])

    def _rebind(self) -> None:
        self._leave()
        for layer in self.layers:
            layer.book = self.book


def _same(mine: SlotBuffer, theirs: SlotBuffer | None, row: int) -> bool:
    """Whether a buffer of some rows is a view of the whole one."""
    if theirs is None or mine.data is None or theirs.data is None:
        return False
    return mine.data[row].data_ptr() == theirs.data.data_ptr()
