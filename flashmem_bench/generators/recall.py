"""Key-value recall: one value asked for among n pairs, answered with the value alone.

The length is a setting, from a handful of pairs to the tens of thousands of tokens where cache eviction and
long-context cost show. Keys are one word while one word is enough to keep them apart, then two, then three;
values are names.
"""

from __future__ import annotations

import random
from typing import Any

from flashmem_bench.generators.base import NAMES, WORDS, Row, make_rows

SUITE = "recall"
# Largest number of pairs that keys of one and of two words serve.
_ONE_WORD, _TWO_WORDS = 48, 3000


def words_per_key(pairs: int) -> int:
    """Words that a key needs so that `pairs` of them differ with room to spare."""
    return 1 if pairs <= _ONE_WORD else 2 if pairs <= _TWO_WORDS else 3


def pairs_for_tokens(tokens: int) -> int:
    """About how many pairs fill `tokens` tokens of the bundled tokenizer (two a pair, two a word of its
    key).
    """
    for words in (1, 2, 3):
        pairs = tokens // (2 + 2 * words)
        if words_per_key(pairs) <= words:
            return max(2, pairs)
    return tokens // 8


def _keys(rng: random.Random, pairs: int) -> list[str]:
    """`pairs` different keys in random order."""
    width = words_per_key(pairs)
    codes = rng.sample(range(len(WORDS) ** width), pairs)
    return [" ".join(WORDS[code // len(WORDS) ** i % len(WORDS)] for i in range(width)) for code in codes]


def draw(rng: random.Random, index: int, *, pairs: int | tuple[int, ...] = (16, 32, 48, 64)) -> Row:
    """One row; several `pairs` are lengths that the rows take in turn.

    Raises:
        ValueError: fewer than two pairs, or more than the keys can tell apart.
    """
    lengths = (pairs,) if isinstance(pairs, int) else tuple(pairs)
    count = lengths[index % len(lengths)]
    if not 2 <= count <= len(WORDS) ** 3 // 4:
        raise ValueError(f"recall: pairs must be within 2..{len(WORDS) ** 3 // 4}, got {count}")
    keys = _keys(rng, count)
    values = [rng.choice(NAMES) for _ in keys]
    asked = rng.randrange(count)
    lines = "\n".join(f"{key} -> {value}" for key, value in zip(keys, values, strict=True))
    return {
        "prompt": f"Recall the name.\n{lines}\nKey: {keys[asked]}",
        "target": values[asked],
        "answer": values[asked],
        "stratum": f"n={count}",
        "pairs": count,
    }


def rows(split: str, n: int, seed: int = 0, **settings: Any) -> list[Row]:
    """The first `n` rows of `split` (train, validation, calibration or test)."""
    return make_rows(SUITE, draw, split, n, seed, settings)
