"""A batch of sequences under way: what a pass moves on, and what can be done with whole rows.

The state holds the cache and, for each row, what its newest position left behind. Its verbs are those of bookkeeping:
fork, take some rows out and put them back, repeat, forget, save. What runs the model is `flashmem.backbone`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flashmem.errors import ConfigError
from flashmem.kv_cache import RaggedCache
from flashmem.slots import Slots

_ROWS = ("next_position", "logits", "hidden", "entropy")
_COUNTS = ("encoded", "evicted", "woven", "reused")
FORMAT = (*_ROWS, "lengths", "latents")


@dataclass
class DecodeState:
    """B sequences under way, each as long as it is.

    Attributes:
        cache: the backbone's KV cache, with the lengths of the rows.
        next_position: `[B]` position that the next token of each row will take: its length, and what was evicted.
        logits: `[B, V]` after the newest position of each row, float32.
        hidden: `[B, d]` post-norm last hidden state of the newest position.
        entropy: `[B]` monitored entropy of the newest position, nats; zeros when the monitor is off.
        encoded: positions that went through the backbone for this state, one count a row.
        reused: positions that it took over from the state that it was forked from, one count a row.
        evicted: positions whose keys and values were dropped, one count a row.
        woven: positions that went through a second model of the memory source, one count a row.
        kept: what a memory source keeps between its memories of these sequences.
    """

    cache: RaggedCache
    next_position: Tensor
    logits: Tensor
    hidden: Tensor
    entropy: Tensor
    encoded: list[int]
    evicted: list[int]
    woven: list[int]
    reused: list[int]
    kept: dict[str, DecodeState] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return len(self.cache.lengths)

    @property
    def lengths(self) -> list[int]:
        """Slots that each row holds: its positions, latents counted, without what was evicted."""
        return self.cache.lengths

    @property
    def length(self) -> int:
        """T, the longest row."""
        return self.cache.book.longest

    @property
    def inputs(self) -> Tensor | None:
        """Input embeddings `[B, T, d]` of what each row holds, or None where nobody keeps them."""
        kept = self.cache.inputs
        return None if kept is None or kept.data is None else kept.view(self.length)

    @property
    def keeps_inputs(self) -> bool:
        """Whether input embeddings are kept."""
        return self.cache.inputs is not None

    @property
    def latents(self) -> Tensor:
        """`[B, T]` True where a slot holds a latent."""
        marks = self.cache.marks
        if marks is None or marks.data is None:
            return torch.zeros(self.batch_size, self.length, dtype=torch.bool, device=self.next_position.device)
        return _padded(marks.view(min(self.length, marks.capacity)), self.length)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """The cached K and V of one layer, both `[B, G, T, d_h]` (views: do not write)."""
        here, entry = self.next_position.device, self.cache.layers[layer]
        return entry.keys.to(here), entry.values.to(here)

    def ends(self) -> Tensor:
        """`[B]` the slot behind each row."""
        if self.cache.book.ends is not None:
            return self.cache.book.ends
        if not any(self.evicted):
            return self.next_position
        return self.next_position - torch.tensor(self.evicted, device=self.next_position.device)

    def visible(self, ahead: int, window: int | None) -> Tensor | None:
        """What a query `ahead` positions behind each row's end sees of the cache.

        Returns:
            `[B, 1, 1, T]`, True where it may look; None where every slot is visible to every row.
        """
        reaches_all = window is None or self.length + ahead < window
        if self.cache.even and reaches_all:
            return None
        places, ends = torch.arange(self.length, device=self.next_position.device), self.ends()[:, None]
        seen = places < ends
        if window is not None and not reaches_all:
            seen = seen & (places > ends + (ahead - window))
        return seen[:, None, None]

    def fork(self) -> DecodeState:
        """A state that goes on from here by itself, while this one stays as it is.

        Keys and values are shared until both go on. What the fork encodes is counted from 0, and what it has from its
        parent is in `reused`.
        """
        return replace(
            self,
            cache=self.cache.fork(),
            encoded=[0] * self.batch_size,
            woven=[0] * self.batch_size,
            evicted=list(self.evicted),
            reused=list(self.lengths),
            kept={name: it.fork() for name, it in self.kept.items()},
            **{name: getattr(self, name).clone() for name in _ROWS},
        )

    def reading(self) -> DecodeState:
        """A state over which positions can be run that leave nothing behind."""
        return replace(self, cache=self.cache.reading(), encoded=list(self.encoded))

    def repeat(self, times: int) -> None:
        """Continue every row in several ways: rows 0..n-1 come from row 0, and so on. The prompt counts once a row."""
        self.cache.repeat(times)
        for name in _ROWS:
            setattr(self, name, getattr(self, name).repeat_interleave(times, 0))
        for name in _COUNTS:
            once = name != "evicted"
            counts = [n if nth == 0 or not once else 0 for n in getattr(self, name) for nth in range(times)]
            setattr(self, name, counts)
        for own in self.kept.values():
            own.repeat(times)

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget the newest slots of every row: they are as long as said."""
        gone = [old - new for old, new in zip(self.lengths, lengths, strict=True)]
        self.next_position = self.next_position - torch.tensor(gone, device=self.next_position.device)
        self.cache.crop(lengths)

    def release(self, row: int) -> None:
        """Empty a row, so that nobody waits for what it held; it can be filled again with `put`."""
        self.crop([0 if nth == row else n for nth, n in enumerate(self.lengths)])
        # Where something was evicted, the position is ahead of the slot.
        self.next_position[row] = 0
        for name in _COUNTS:
            getattr(self, name)[row] = 0
        for own in self.kept.values():
            own.release(row)

    def rows(self, rows: Sequence[int]) -> DecodeState:
        """Some rows as a state of their own, which may go on; what became of it comes back with `put`."""
        if list(rows) == list(range(self.batch_size)):
            return self
        index = torch.tensor(rows, device=self.next_position.device)
        return DecodeState(
            cache=self.cache.rows(rows),
            **{name: getattr(self, name).index_select(0, index) for name in _ROWS},
            **{name: [getattr(self, name)[row] for row in rows] for name in _COUNTS},
            kept={name: it.rows(rows) for name, it in self.kept.items()},
        )

    def put(self, rows: Sequence[int], other: DecodeState, since: Sequence[int] | None = None) -> None:
        """Take over rows of another state, from the slots `since` on where the older ones are the same."""
        if other is self:
            return
        index = torch.tensor(rows, device=self.next_position.device)
        self.cache.put(rows, other.cache, since)
        for name in _ROWS:
            setattr(self, name, getattr(self, name).index_copy(0, index, getattr(other, name)))
        self.note(rows, other)

    def note(self, rows: Sequence[int], other: DecodeState) -> None:
        """Take over the counts of rows of another state, and what memory sources keep."""
        if other is self:
            return
        for name in _COUNTS:
            for row, count in zip(rows, getattr(other, name), strict=True):
                getattr(self, name)[row] = count
        for name, own in other.kept.items():
            if name not in self.kept:
                self.kept[name] = own.blank(self.batch_size)
            self.kept[name].put(rows, own)
        for name in self.kept.keys() - other.kept.keys():
            # It was kept for the sequences that were here before.
            for row in rows:
                self.kept[name].release(row)

    def adopt(self, other: DecodeState) -> None:
        """Become another state of the same rows, what memory sources keep aside."""
        for name in ("cache", "encoded", *_ROWS):
            setattr(self, name, getattr(other, name))

    def blank(self, rows: int) -> DecodeState:
        """An empty state of so many rows, otherwise like this one."""
        return DecodeState(
            cache=RaggedCache(len(self.cache.layers), rows, keep_inputs=self.keeps_inputs),
            **{name: getattr(self, name).new_zeros(rows, *getattr(self, name).shape[1:]) for name in _ROWS},
            **{name: [0] * rows for name in _COUNTS},
        )

    def only(self, rows: Sequence[int]) -> DecodeState:
        """A state that goes on with some rows alone; copies, so that the others can be forgotten."""
        other = self.blank(len(rows))
        other.cache.reserve(self.cache.capacity)
        other.put(range(len(rows)), self.rows(rows))
        return other

    def exported(self) -> dict[str, Tensor]:
        """Everything that the state needs to go on, by name, as tensors of its own device; views, do not write.

        What a memory source keeps (`kept`) is left out: it is made again when it is missing.

        Raises:
            ConfigError: keys and values were evicted, so a slot no longer has one position.
        """
        if any(self.evicted):
            raise ConfigError("A state whose keys and values were evicted cannot be saved: save it before eviction.")
        tensors = {name: getattr(self, name) for name in _ROWS}
        tensors |= {"lengths": torch.tensor(self.lengths), "latents": self.latents}
        for index, layer in enumerate(self.cache.layers if self.length else ()):
            tensors |= {f"keys.{index}": layer.keys, f"values.{index}": layer.values}
        return tensors if self.inputs is None else {**tensors, "inputs": self.inputs}

    def restore(self, tensors: Mapping[str, Tensor], layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Become the state that `exported` took apart; its positions count as `reused`.

        Args:
            tensors: what was exported.
            layers: the keys and values of each layer, where they shall lie; empty for an empty state.
        """
        here, lengths = self.next_position.device, tensors["lengths"].tolist()
        for name in _ROWS:
            setattr(self, name, tensors[name].to(here))
        slots = self.cache.place(max(lengths), self.ends)
        if layers:
            self.cache.load([k for k, _ in layers], [v for _, v in layers], lengths)
            self.cache.mark(tensors["latents"].to(here), slots)
        if "inputs" in tensors:
            self.cache.keep_inputs(tensors["inputs"].to(here), slots)
        self.reused = lengths


def behind(held: Tensor, lengths: Sequence[int], new: Tensor, width: int) -> Tensor:
    """Rows of what each holds and new positions right behind it.

    Args:
        held: `[B, T, ...]`.
        lengths: how much of T each row holds.
        new: `[B, Q, ...]`.
        width: of the result, at least the longest row and Q.

    Returns:
        `[B, width, ...]`, zeros behind a row's end; gradients flow to `held` and `new`.
    """
    rest = (width - held.shape[1], *held.shape[2:])
    whole = torch.cat([held, held.new_zeros(held.shape[0], *rest)], 1) if rest[0] > 0 else held[:, :width]
    places = torch.tensor(lengths, device=held.device)[:, None] + torch.arange(new.shape[1], device=held.device)
    shape = (*places.shape, *[1] * (new.dim() - 2))
    return whole.scatter(1, places.view(shape).expand_as(new), new.to(whole.dtype))


def new_state(cache: RaggedCache, make: Callable[..., Tensor], vocabulary: int, width: int, like: Any) -> DecodeState:
    """A state that has seen nothing, as long as its cache has rows."""
    rows = len(cache.lengths)
    return DecodeState(
        cache=cache,
        next_position=make(rows, dtype=torch.long),
        logits=make(rows, vocabulary),
        hidden=make(rows, width, dtype=like),
        entropy=make(rows),
        **{name: [0] * rows for name in _COUNTS},
    )


def _padded(marks: Tensor, length: int) -> Tensor:
    missing = length - marks.shape[1]
    return marks if not missing else torch.nn.functional.pad(marks, (0, missing))


__all__ = ["FORMAT", "DecodeState", "Slots", "behind", "new_state"]
