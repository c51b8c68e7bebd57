"""Eight to sixteen look-ups answered in one generation, one line each, every line echoing its key.

Most lines are one link, a quarter are two ("Ana twice"). The right moment for a memory is known: just before
the value of a two-link line. Each row gives those places as text, so that the precision and recall of a
trigger policy can be counted.

Extras of a row: `echoes`, the text of every line up to and including its colon, in order; `moments`, those of
the two-link lines; `values`, the right value of every line.
"""

from __future__ import annotations

import random
from typing import Any

from flashmem_bench.generators.base import Row, cycle, fact_lines, follow, make_rows, matching

SUITE = "hops-list"


def _items(rng: random.Random, links: dict[str, str], count: int, two_link_share: float) -> list[tuple[str, int]]:
    """`count` requests (key, links), no request twice."""
    twice = round(count * two_link_share)
    keys = list(links)
    items = [(key, 2) for key in rng.sample(keys, twice)] + [(key, 1) for key in rng.sample(keys, count - twice)]
    rng.shuffle(items)
    return items


def draw(
    rng: random.Random,
    index: int,
    *,
    facts: int = 12,
    items: tuple[int, int] = (8, 16),
    two_link_share: float = 0.25,
    cyclic: bool = True,
) -> Row:
    """One row; `items` is the inclusive range of look-ups.

    With `cyclic` false no name is both a source and a target: an easier form, for training, that has no
    two-link look-ups.

    Raises:
        ValueError: more look-ups than facts, or two-link look-ups without a cycle.
    """
    low, high = items
    if high - round(high * two_link_share) > facts or round(high * two_link_share) > facts:
        raise ValueError(f"hops-list: {high} look-ups need more than {facts} facts")
    if two_link_share and not cyclic:
        raise ValueError("hops-list: two-link look-ups need cyclic facts")
    links = cycle(rng, facts) if cyclic else matching(rng, facts)
    requests = _items(rng, links, rng.randint(low, high), two_link_share)
    asked = [key if k == 1 else f"{key} twice" for key, k in requests]
    values = [follow(links, key, k) for key, k in requests]
    echoes = [f"{text}:" for text in asked]
    lines = [f"{echo} {value}" for echo, value in zip(echoes, values, strict=True)]
    return {
        "prompt": f"Look up each name.\n{fact_lines(rng, links)}\nNames:\n" + "\n".join(asked),
        "target": "\n".join(lines),
        "answer": "\n".join(lines),
        "stratum": f"items={len(requests)}",
        "echoes": echoes,
        "values": values,
        "moments": [echo for echo, (_, k) in zip(echoes, requests, strict=True) if k == 2],
        "facts": facts,
    }


def rows(split: str, n: int, seed: int = 0, **settings: Any) -> list[Row]:
    """The first `n` rows of `split` (train, validation, calibration or test)."""
    return make_rows(SUITE, draw, split, n, seed, settings)
