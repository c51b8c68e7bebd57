"""Prefixes that a frozen backbone has encoded once, kept for the epochs to come.

A training sequence is [x, M, y], and nothing that is trained stands before x: its keys and values are the same in every
epoch. A store keeps those of the prompts as far as there is room, so that a later step pays for M and y alone, and for
the part of the answer before M where there is one. What it answers is what `Backbone.prefill` would, up to the rounding
of another batch.

It is for what fits: N layers of 2 G d_h numbers a token, 3 kB for the bundled backbone and 28 kB for one of 1.5 B
parameters in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from flashmem.backbone import Backbone
from flashmem.state import DecodeState


@dataclass
class PrefixStore:
    """Encoded prompts of one backbone.

    Attributes:
        backbone: frozen.
        prompts: what will come again, alone or with something behind it; a prefix that begins with none of them is
            taken for one itself.
        room: bytes that may still be kept.
        met: prefixes that were asked for, and `found` those of them whose prompt was there.
    """

    backbone: Backbone
    prompts: InitVar[Iterable[list[int]]]
    room: int
    met: int = 0
    found: int = 0
    _kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self, prompts: Iterable[list[int]]) -> None:
        self._known = {tuple(prompt) for prompt in prompts}
        self._lengths = sorted({len(prompt) for prompt in self._known}, reverse=True)

    @torch.no_grad()
    def prefill(self, prefixes: list[list[int]], *, keep_inputs: bool = False) -> DecodeState:
        """See `Backbone.prefill`."""
        keys = [self._prompt(prefix) for prefix in prefixes]
        missing = list(dict.fromkeys(key for key in keys if key not in self._kept))
        self.met, self.found = self.met + len(keys), self.found + len(keys) - len(missing)
        fresh = self._encode(missing) if missing else {}
        rows = [self._kept.get(key) or fresh[key] for key in keys]
        last = torch.stack([hidden for _, hidden in rows])
        state = self.backbone.restore([list(key) for key in keys], [cache for cache, _ in rows], last)
        if not keep_inputs:
            state.cache.inputs = None
        rests = [prefix[len(key) :] for prefix, key in zip(prefixes, keys, strict=True)]
        if any(rests):
            self.backbone.append(state, rests)
        return state

    def _prompt(self, prefix: list[int]) -> tuple[int, ...]:
        """The longest known prompt that a prefix begins with; the prefix itself if there is none."""
        whole = tuple(prefix)
        return next((whole[:n] for n in self._lengths if n <= len(whole) and whole[:n] in self._known), whole)

    def _encode(self, prefixes: list[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
        """Encode prefixes and keep them while there is room."""
        state = self.backbone.prefill([list(prefix) for prefix in prefixes])
        caches = self.backbone.row_caches(state)
        fresh = dict(zip(prefixes, zip(caches, state.hidden.clone(), strict=True), strict=True))
        for key, row in fresh.items():
            size = sum(part.numel() * part.element_size() for part in row)
            if size <= self.room:
                self._kept[key], self.room = row, self.room - size
        return fresh
