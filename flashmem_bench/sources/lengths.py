"""Prompts of a wanted length that is the same text for every backbone.

Lengths are in nominal tokens of four characters, the usual rule for English text and a large vocabulary: what a prompt
is does not depend on who reads it, and `prompt_tokens` says how many tokens it was for the one that did (a small
vocabulary makes twice as many). Every suite of this kind has the same strata, so that scores against length can be laid
beside each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashmem_bench.data import Doc, Splits
from flashmem_bench.errors import UsageError
from flashmem_bench.generators import hops as hops_rows
from flashmem_bench.generators import recall as recall_rows
from flashmem_bench.generators.base import WORDS, row_at
from flashmem_bench.sources.histories import whole_number

CHARACTERS = 4
LARGEST = 131072
# Characters of a line "<key> -> <value>" whose key has so many words, and the end of the line.
_LINE = {1: 14.0, 2: 20.2, 3: 26.4}
# Pairs that keys of one and of two words tell apart at most.
_MOST_PAIRS = (48, 3000)
_SPLITS = ("test", "calibration", "validation")


def wanted_lengths(settings: Mapping[str, Any] | None, tokens: Sequence[int]) -> list[int]:
    """Return the lengths of a suite, `suite.tokens` where it is set, in nominal tokens.

    Raises:
        UsageError: A length that is no whole number from 0 to 131072.
    """
    found = (settings or {}).get("tokens", list(tokens))
    lengths = [found] if isinstance(found, int) else found
    if not isinstance(lengths, list) or not lengths or not all(_is_length(length) for length in lengths):
        raise UsageError(f"suite.tokens must be whole numbers from 0 to {LARGEST}, such as [1024,8192], not {found!r}")
    return lengths


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def length_name(tokens: int) -> str:
    """Return how a length is called as a stratum, such as `4k`."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


def in_turn(suite: str, lengths: Sequence[int], rows: int, draw: Callable[[str, int, int], Doc]) -> Splits:
    """Return the splits of a suite whose rows take the lengths in turn.

    Args:
        suite: Its name.
        lengths: Nominal tokens.
        rows: Rows of each length.
        draw: Makes the document of a split, a length and the row's number within that length.
    """

    def docs(split: str) -> list[Doc]:
        named = [(number, length, draw(split, length, number)) for number in range(rows) for length in lengths]
        return [
            {"id": f"{suite}-{split}-{length_name(length)}-{number:04d}", "stratum": length_name(length), **doc}
            for number, length, doc in named
        ]

    return Splits(suite, {split: _later(docs, split) for split in _SPLITS})


def _later(function: Callable[[str], list[Doc]], argument: str) -> Callable[[], list[Doc]]:
    return lambda: function(argument)


def refuse_unknown(suite: str, settings: Mapping[str, Any] | None, known: Sequence[str]) -> None:
    """Raise UsageError for a setting that a suite does not have."""
    odd = sorted(set(settings or {}) - set(known))
    if odd:
        raise UsageError(
            f"{suite} has no setting suite.{odd[0]}; it has {', '.join(f'suite.{name}' for name in known)}"
        )


def recall_long(
    *, tokens: Sequence[int], rows: int, settings: Mapping[str, Any] | None = None, seed: int = 0, **_: Any
) -> Splits:
    """Key-value recall (`recall`) at nominal lengths; see `in_turn`.

    Args:
        tokens: The lengths of the suite file.
        rows: Rows of each length.
        settings: `tokens` and `rows`, which win.
        seed: Seed of the rows.
    """
    refuse_unknown("recall-long", settings, ("tokens", "rows"))

    def draw(split: str, length: int, number: int) -> Doc:
        row = row_at("recall-long", recall_rows.draw, split, number, seed, pairs=_pairs(length))
        return {**row, "gold": row["answer"], "stratum": length_name(length)}

    count = whole_number(settings, "rows", rows) or rows
    return in_turn("recall-long", wanted_lengths(settings, tokens), count, draw)


def _pairs(tokens: int) -> int:
    """Pairs that come nearest to a length; where longer keys begin, there is a gap between the lengths."""
    counts = [max(2, round(tokens * CHARACTERS / width)) for width in _LINE.values()]
    return min(
        [*counts, *_MOST_PAIRS],
        key=lambda pairs: abs(tokens * CHARACTERS - pairs * _LINE[recall_rows.words_per_key(pairs)]),
    )


def hops_long(
    *, tokens: Sequence[int], rows: int, settings: Mapping[str, Any] | None = None, seed: int = 0, **_: Any
) -> Splits:
    """Pointer chasing (`hops`, twelve facts, one and two links) with its facts among lines that are about no person.

    Args:
        tokens: The lengths of the suite file; a prompt that is longer without any filler stays as it is.
        rows: Rows of each length; one and two links take turns.
        settings: `tokens` and `rows`, which win.
        seed: Seed of the rows: the facts of a row are the same at every length.
    """
    refuse_unknown("hops-long", settings, ("tokens", "rows"))

    def draw(split: str, length: int, number: int) -> Doc:
        row = row_at("hops-long", hops_rows.draw, split, number, seed, k=(1, 2))
        rng = random.Random(f"hops-long/{split}/{seed}/{number}/{length}")
        known = {**row, "gold": row["answer"], "cluster": f"{split}-{number:04d}"}
        stratum = f"k={row['k']}, {length_name(length)}"
        return {**known, "prompt": _filled(rng, row["prompt"], length), "stratum": stratum}

    count = whole_number(settings, "rows", rows) or rows
    return in_turn("hops-long", wanted_lengths(settings, tokens), count, draw)


def _filled(rng: random.Random, prompt: str, tokens: int) -> str:
    """Put filler lines between the facts, at random, until the prompt has its length."""
    first, *facts, question = prompt.split("\n")
    room = tokens * CHARACTERS - len(prompt)
    filler: list[str] = []
    while room > 0:
        line = f"{rng.choice(WORDS)} {rng.choice(WORDS)} -> {rng.choice(WORDS)}"
        filler.append(line)
        room -= len(line) + 1
    # A fact's places among all lines: shuffled marks keep the facts in their order.
    marks = [True] * len(facts) + [False] * len(filler)
    rng.shuffle(marks)
    kept, extra = iter(facts), iter(filler)
    return "\n".join([first, *(next(kept) if mark else next(extra) for mark in marks), question])
