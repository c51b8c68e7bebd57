"""Pointer chasing: follow k links through a shuffled list of facts and answer with a name, nothing else.

One link is plain in-context look-up. Two and more must be composed without writing the intermediate name,
which a small model cannot do in one pass: those strata show whether a memory adds a step of computation. The
facts form a single cycle, so chance is one in `facts` for every k below `facts`.
"""

from __future__ import annotations

import random
from typing import Any

from flashmem_bench.generators.base import Row, cycle, fact_lines, follow, make_rows

SUITE = "hops"
COUNTS = {1: "One link", 2: "Two links", 3: "Three links", 4: "Four links"}


def draw(
    rng: random.Random, index: int, *, facts: int | tuple[int, ...] = 12, k: tuple[int, ...] = (1, 2, 3, 4)
) -> Row:
    """One row; `k` are the link counts that the rows take in turn, and `facts`, if there are several, their numbers of
    facts.

    Raises:
        ValueError: a k outside 1..4, or fewer than two facts.
    """
    if not k or set(k) - set(COUNTS):
        raise ValueError(f"hops: k must be within 1..4, got {k}")
    sizes = (facts,) if isinstance(facts, int) else tuple(facts)
    if not sizes or min(sizes) < 2:
        raise ValueError(f"hops: at least two facts are needed, got {facts}")
    size = sizes[index // len(k) % len(sizes)]
    links = cycle(rng, size)
    count = k[index % len(k)]
    start = rng.choice(list(links))
    prompt = f"Follow the links.\n{fact_lines(rng, links)}\n{COUNTS[count]}: {start}"
    answer = follow(links, start, count)
    return {"prompt": prompt, "target": answer, "answer": answer, "stratum": f"k={count}", "k": count, "facts": size}


def rows(split: str, n: int, seed: int = 0, **settings: Any) -> list[Row]:
    """The first `n` rows of `split` (train, validation, calibration or test)."""
    return make_rows(SUITE, draw, split, n, seed, settings)
