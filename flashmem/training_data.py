"""What a step trains on: examples in batches of similar length, and the place of the memory in each of them.

Order and places follow from the seed, the epoch and the step alone, so that a resumed run and every process of a
parallel one see the same ones.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashmem.backbone import Backbone
from flashmem.training_loss import target_entropies

_WINDOW = 16


@dataclass(frozen=True)
class Example:
    """One sample: prompt and answer token ids, the answer with its EOS."""

    prompt_ids: list[int]
    target_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.target_ids)


@dataclass(frozen=True)
class Placed:
    """An example with a place for its memory: `cut` target tokens lie before it; None is the entropy's peak."""

    example: Example
    cut: int | None


def batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Batches without end: of similar length, in a shuffled order, epoch after epoch."""
    epoch = 0
    while True:
        order = random.Random(f"{seed}|{epoch}")
        indices = list(range(len(examples)))
        order.shuffle(indices)
        found = []
        for start in range(0, len(indices), size * _WINDOW):
            window = sorted(indices[start : start + size * _WINDOW], key=lambda index: examples[index].length)
            found += [window[i : i + size] for i in range(0, len(window), size)]
        order.shuffle(found)
        for batch in found:
            yield [examples[i] for i in batch]
        epoch += 1


def place(batch: Sequence[Example], insertion: str, key: str) -> list[Placed]:
    """Draw where the memory of each example goes.

    Args:
        batch: the examples.
        insertion: prompt-end or mixed (half at the prompt end, a quarter anywhere, a quarter at the entropy's peak).
        key: seed of the draws.
    """
    if insertion == "prompt-end":
        return [Placed(example, 0) for example in batch]
    chance = random.Random(key)
    where = [chance.choices(("end", "any", "peak"), (2, 1, 1))[0] for _ in batch]
    return [Placed(e, _cut(w, len(e.target_ids), chance)) for w, e in zip(where, batch, strict=True)]


def _cut(where: str, length: int, chance: random.Random) -> int | None:
    """How many target tokens lie before the memory; at least one stays behind it."""
    if where == "end" or length < 2:
        return 0
    return chance.randrange(length) if where == "any" else None


def split(backbone: Backbone, rows: Sequence[Placed]) -> tuple[list[list[int]], list[list[int]]]:
    """Prefixes and targets of rows: what lies before the memory and what lies after it."""
    peaks = [row.example for row in rows if row.cut is None]
    entropies = iter(_entropies(backbone, peaks))
    cuts = [_peak(next(entropies)) if row.cut is None else row.cut for row in rows]
    return (
        [row.example.prompt_ids + row.example.target_ids[:cut] for row, cut in zip(rows, cuts, strict=True)],
        [row.example.target_ids[cut:] for row, cut in zip(rows, cuts, strict=True)],
    )


def _entropies(backbone: Backbone, examples: Sequence[Example]) -> list[list[float]]:
    if not examples:
        return []
    return target_entropies(backbone, [e.prompt_ids for e in examples], [e.target_ids for e in examples])


def _peak(entropies: list[float]) -> int:
    return max(range(len(entropies)), key=entropies.__getitem__)


def examples_hash(examples: Sequence[Example]) -> str:
    """16 hex digits over the token ids of examples in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.prompt_ids}|{example.target_ids}\n".encode())
    return digest.hexdigest()[:16]
