"""Prefixes that a frozen backbone has encoded once, kept for the epochs to come.

A training sequence is [x, M, y], and nothing that is trained stands before x: its keys and values are the same in every
epoch. A store keeps them as far as there is room, so that a later step pays for M and y alone. What it answers is what
`Backbone.prefill` would, up to the rounding of another batch.

It is for what fits: N layers of 2 G d_h numbers a token, 3 kB for the bundled backbone and 28 kB for one of 1.5 B
parameters in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashmem.backbone import Backbone, DecodeState


@dataclass
class PrefixStore:
    """Encoded prefixes of one backbone.

    Attributes:
        backbone: frozen.
        room: bytes that may still be kept.
        met: prefixes that were asked for, and `found` those of them that were there.
    """

    backbone: Backbone
    room: int
    met: int = 0
    found: int = 0
    _kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def prefill(self, prefixes: list[list[int]], *, keep_inputs: bool = False) -> DecodeState:
        """See `Backbone.prefill`."""
        keys = [tuple(prefix) for prefix in prefixes]
        missing = list(dict.fromkeys(key for key in keys if key not in self._kept))
        self.met, self.found = self.met + len(keys), self.found + len(keys) - len(missing)
        fresh = self._encode(missing) if missing else {}
        rows = [self._kept.get(key) or fresh[key] for key in keys]
        state = self.backbone.restore(prefixes, [cache for cache, _ in rows], torch.stack([last for _, last in rows]))
        if not keep_inputs:
            state.inputs = None
        return state

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
