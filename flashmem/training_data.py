"""What a step trains on: random batches of examples, lesson after lesson, and the place of the memory in each of them.

Order and places follow from the seed, the epoch and the step alone, so that a resumed run and every process of a
parallel one see the same ones.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashmem.backbone import Backbone
from flashmem.errors import ConfigError
from flashmem.training_loss import step_entropies
from flashmem.trigger import DELIMITERS

# Of every eight memories, how many go to the prompt end, anywhere, and where attention or next-token entropy is high.
_SHARES = {"prompt-end": (8, 0, 0, 0), "mixed": (4, 2, 1, 1), "firing": (1, 1, 1, 5)}
INSERTIONS = (*_SHARES, "delimiters")
# Memories inside an answer at most, as in MemGen's released configuration.
_MOST_IN_ANSWER = 5
# Batches that "length" sorts together.
_WINDOW = 16
BATCHINGS = ("random", "length")
# Share of the steps above the default threshold, the 85th percentile.
_FIRING_SHARE = 0.15


@dataclass(frozen=True)
class Example:
    """One sample: prompt and answer token ids, the answer with its EOS, and the lesson that it belongs to."""

    prompt_ids: list[int]
    target_ids: list[int]
    lesson: int = 0

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.target_ids)


@dataclass(frozen=True)
class Placed:
    """An example with a place for its memory.

    Attributes:
        example: the sample.
        cut: target tokens before the memory; None is one of the places of highest entropy.
        signal: which entropy that is, "attention" or "output".
        draw: picks one of those places, from 0 to below 1.
    """

    example: Example
    cut: int | None
    signal: str = "attention"
    draw: float = 0.0


def batches(examples: Sequence[Example], size: int, seed: int, batching: str = "random") -> Iterator[list[Example]]:
    """Batches without end, epoch after epoch, the examples of each in order of their length.

    "random" leaves to chance alone who shares a batch, and micro batches need little padding all the same. "length"
    puts examples of similar length together. That is cheaper still, but length often tells suites or kinds of question
    apart, and then each step is of one kind.
    """
    window = size if batching == "random" else size * _WINDOW
    epoch = 0
    while True:
        order = random.Random(f"{seed}|{epoch}")
        indices = list(range(len(examples)))
        order.shuffle(indices)
        found = []
        for start in range(0, len(indices), window):
            near = sorted(indices[start : start + window], key=lambda index: examples[index].length)
            found += [near[i : i + size] for i in range(0, len(near), size)]
        order.shuffle(found)
        for batch in found:
            yield [examples[i] for i in batch]
        epoch += 1


class Lessons:
    """Batches lesson after lesson: which one a step takes from depends on how far the run is.

    Args:
        examples: of all lessons.
        starts: shares of the run at which lesson 1, 2, ... begin. An example of a later lesson than these belongs to
            the last one; without any, all examples make one lesson.
        size: examples of a batch.
        seed: of the order.
        batching: see `batches`.
        seen: progress at each step that was taken already, so that a resumed run goes on where it stopped.

    Raises:
        ConfigError: a lesson has no examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        starts: Sequence[float],
        size: int,
        seed: int,
        seen: Sequence[float] = (),
        batching: str = "random",
    ) -> None:
        self.starts = starts
        pools: list[list[Example]] = [[] for _ in range(len(starts) + 1)]
        for example in examples:
            pools[min(example.lesson, len(starts))].append(example)
        if empty := [number for number, pool in enumerate(pools) if not pool]:
            raise ConfigError(f"Lesson {empty[0]} has no examples: give fewer lessons, or examples for it.")
        self._streams = [batches(pool, size, seed, batching) for pool in pools]
        for progress in seen:
            self.next(progress)

    def next(self, progress: float) -> list[Example]:
        """The next batch of the lesson that is on at this share of the run."""
        return next(self._streams[sum(progress >= start for start in self.starts)])


def place(batch: Sequence[Example], insertion: str, key: str) -> list[Placed]:
    """Draw where the memory of each example goes.

    Args:
        batch: the examples.
        insertion: prompt-end; or mixed: half at the prompt end, a quarter anywhere, and a quarter where a trigger
            fires, at one of the steps whose attention entropy (or, in half of the cases, next-token entropy) is
            above the 85th percentile of the answer; or firing: three quarters where a trigger fires, most of them by
            next-token entropy, and an eighth each at the prompt end and anywhere; or delimiters: the first at the
            prompt end (see `cut` for the others).
        key: seed of the draws.
    """
    if insertion in ("prompt-end", "delimiters"):
        return [Placed(example, 0) for example in batch]
    chance = random.Random(key)
    return [_placed(example, _SHARES[insertion], chance) for example in batch]


def _placed(example: Example, shares: Sequence[int], chance: random.Random) -> Placed:
    """One example with its place; at least one target token stays behind the memory."""
    where = chance.choices(("end", "any", "attention", "output"), shares)[0]
    draw, length = chance.random(), len(example.target_ids)
    if where == "end" or length < 2:
        return Placed(example, 0)
    return Placed(example, int(draw * length)) if where == "any" else Placed(example, None, where, draw)


def cut(
    backbone: Backbone, rows: Sequence[Placed], insertion: str, horizon: int | None = None
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """What lies before the first memory of each row, and the answer behind it in pieces, each with a memory before it.

    There is one piece, unless memories stand at delimiters.
    """
    if insertion == "delimiters":
        return [r.example.prompt_ids for r in rows], [in_pieces(backbone, r.example.target_ids) for r in rows]
    prefixes, targets = split(backbone, rows, horizon)
    return prefixes, [[target] for target in targets]


def in_pieces(backbone: Backbone, target_ids: list[int]) -> list[list[int]]:
    """An answer cut behind its first delimiters: where MemGen puts its memories."""
    cuts = [i + 1 for i, token in enumerate(target_ids[:-1]) if _delimits(backbone, token)][:_MOST_IN_ANSWER]
    return [target_ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(target_ids)], strict=True)]


def _delimits(backbone: Backbone, token: int) -> bool:
    return backbone.tokenizer.decode([token]).endswith(DELIMITERS)


def split(
    backbone: Backbone, rows: Sequence[Placed], horizon: int | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Prefixes and targets of rows: what lies before the memory, and what lies after it up to a horizon in tokens."""
    open_rows = [row for row in rows if row.cut is None]
    found = iter(_high_places(backbone, open_rows))
    cuts = [next(found) if row.cut is None else row.cut for row in rows]
    return (
        [row.example.prompt_ids + row.example.target_ids[:cut] for row, cut in zip(rows, cuts, strict=True)],
        [row.example.target_ids[cut:][:horizon] for row, cut in zip(rows, cuts, strict=True)],
    )


def _high_places(backbone: Backbone, rows: Sequence[Placed]) -> list[int]:
    """For each row one of its steps of highest entropy."""
    if not rows:
        return []
    prompts, targets = [row.example.prompt_ids for row in rows], [row.example.target_ids for row in rows]
    entropies = step_entropies(backbone, prompts, targets)
    return [high_place(entropies[row.signal][i], row.draw) for i, row in enumerate(rows)]


def high_place(entropies: Sequence[float], draw: float) -> int:
    """One of the steps above the 85th percentile, at least the highest; `draw` in [0, 1) says which."""
    order = sorted(range(len(entropies)), key=entropies.__getitem__, reverse=True)
    return order[int(draw * max(1, round(_FIRING_SHARE * len(order))))]


def examples_hash(examples: Sequence[Example]) -> str:
    """16 hex digits over the token ids of examples in their order."""
    digest = hashlib.sha256()
    for example in examples:
        lesson = f"|{example.lesson}" if example.lesson else ""
        digest.update(f"{example.prompt_ids}|{example.target_ids}{lesson}\n".encode())
    return digest.hexdigest()[:16]
