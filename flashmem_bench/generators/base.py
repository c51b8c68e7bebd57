"""Splits that cannot overlap, and words that are one token each for the bundled backbone.

A generator module supplies `draw(rng, index, **settings)`: one random row. `make_rows` turns it into a fixed
sequence for a split. Disjointness does not depend on how many rows anybody asks for: the hash of a prompt
decides the one split that it may appear in, and a stream redraws until its own split comes up. A prompt
therefore belongs to the same split under every seed, row count and setting.

Plain Python and seeded: no torch, no numpy, nothing read from disk. Rows are stable across Python versions
because `random.Random` seeded with a string is.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
Draw = Callable[..., Row]

# Hash buckets (of sixteen) that each split owns: half of all prompts may be trained on, a quarter is for testing.
_BUCKETS = {
    "train": range(0, 8),
    "validation": range(8, 10),
    "calibration": range(10, 12),
    "test": range(12, 16),
}
SPLITS = tuple(_BUCKETS)
_MAX_REDRAWS = 2000

NAMES = tuple(
    (
        "Ana Bob Carl Dan Eve Fay Gus Hal Ida Jon Kim Leo Max Ned Oda Pat Quin Ray Sam Tom Una Vic Wes Xena Yan Zoe "
        "Amy Ben Cleo Dora Ed Finn Gil Hugo Ivan Jill Kurt Lena Mia Nora Otto Pia Rosa Seth Tess Uma Vera Will"
    ).split()
)

WORDS = tuple(
    (
        "amber apron arrow badge basil beach bench blade bread brick brush cabin camel candle canoe cedar chain chalk "
        "cloud clover coral crane crown daisy desert eagle ember fence ferry flame flute forest fox garlic globe grape "
        "hammer harbor hazel honey ivory jacket kettle ladder lantern lemon linen maple marble meadow mirror needle "
        "olive onion otter pearl pepper pine quartz ribbon river saddle shell silver"
    ).split()
)


def split_of(prompt: str) -> str:
    """The one split that may contain `prompt`."""
    bucket = hashlib.blake2b(prompt.encode(), digest_size=1).digest()[0] % 16
    return next(split for split, buckets in _BUCKETS.items() if bucket in buckets)


def row_at(suite: str, draw: Draw, split: str, index: int, seed: int = 0, **settings: Any) -> Row:
    """Row `index` of a split, without its `id`; any row can be made without those before it.

    Raises:
        ValueError: unknown split, or settings with so few possible prompts that none falls in the split.
    """
    if split not in _BUCKETS:
        raise ValueError(f"no split named {split!r}; the splits are {', '.join(SPLITS)}")
    rng = random.Random(f"{suite}/{split}/{seed}/{index}")
    for _ in range(_MAX_REDRAWS):
        row = draw(rng, index, **settings)
        if split_of(row["prompt"]) == split:
            return row
    raise ValueError(f"{suite}: no {split} row found with settings {settings}; too few prompts are possible")


def iterate(suite: str, draw: Draw, split: str, seed: int, settings: dict[str, Any]) -> Iterator[Row]:
    """Rows of a split in order, each prompt once."""
    seen: set[str] = set()
    index = repeats = 0
    while True:
        row = row_at(suite, draw, split, index, seed, **settings)
        index += 1
        if row["prompt"] in seen:
            repeats += 1
            if repeats > _MAX_REDRAWS:
                raise ValueError(f"{suite}: only {len(seen)} different {split} prompts found with settings {settings}")
            continue
        repeats = 0
        seen.add(row["prompt"])
        yield {"id": f"{suite}-{split}-{len(seen) - 1:05d}", **row}


def make_rows(suite: str, draw: Draw, split: str, n: int, seed: int, settings: dict[str, Any]) -> list[Row]:
    """The first `n` rows of a split; a larger `n` only appends."""
    stream = iterate(suite, draw, split, seed, settings)
    return [next(stream) for _ in range(n)]


def cycle(rng: random.Random, names: int, pool: tuple[str, ...] = NAMES) -> dict[str, str]:
    """A successor map of one random cycle through `names` people.

    Each person is the source of one fact and the target of one fact, so no name stands out by how often it
    occurs or by being the end of a chain: the only way to an answer is to follow the links.
    """
    people = rng.sample(pool, names)
    return {a: people[(i + 1) % names] for i, a in enumerate(people)}


def matching(rng: random.Random, names: int, pool: tuple[str, ...] = NAMES) -> dict[str, str]:
    """A successor map whose sources and targets are different people: look-ups without a second link."""
    people = rng.sample(pool, 2 * names)
    return dict(zip(people[:names], people[names:], strict=True))


def follow(links: dict[str, str], start: str, k: int) -> str:
    """The name reached from `start` after `k` links."""
    for _ in range(k):
        start = links[start]
    return start


def fact_lines(rng: random.Random, links: dict[str, str]) -> str:
    """The facts one a line, in shuffled order."""
    lines = [f"{a} -> {b}" for a, b in links.items()]
    rng.shuffle(lines)
    return "\n".join(lines)
