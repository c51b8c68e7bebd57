"""How many positions a method encodes, by formula: what its cost grows with.

P is the prompt, N the text tokens, t_1 < t_2 < ... the text tokens before each of the m memories, K latents each. The
last token of an answer is never fed. Pure arithmetic; the engine counts the same while it runs, and the two must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Encoded(NamedTuple):
    """Positions through the backbone, and through a second model of the method."""

    backbone: int
    second: int = 0


def encoded(
    source: str | None, prompt: int, text: int, moments: Sequence[int], length: int, reused: int = 0
) -> Encoded:
    """Return the positions that one sample costs.

    Args:
        source: consolidator, constant, separate-encoder, weaver, weaver-recompute (MemGen as released), or None for
            plain decoding.
        prompt: P.
        text: N, the end token included.
        moments: t_1, t_2, ..., ascending, within the text that is fed.
        length: K.
        reused: Positions of the prompt that were in the cache already. A weaver or an encoder of its own reads them all
            the same.
    """
    m = len(moments) if source is not None else 0
    plain = prompt - reused + text - 1 + length * m
    # What stands before each memory: prompt, text so far, earlier latents.
    before = [prompt + t + length * i for i, t in enumerate(moments)]
    if source == "separate-encoder":
        return Encoded(plain, sum(before))
    if source == "weaver":
        newest = before[-1] if before else 0
        return Encoded(plain, newest + length * m)
    if source == "weaver-recompute" and m:
        # It drops the cache, so nothing can be reused.
        return Encoded(_recomputed(before, moments, text, length), sum(before) + length * m)
    return Encoded(plain)


def _recomputed(before: Sequence[int], moments: Sequence[int], text: int, length: int) -> int:
    """Everything again for each memory; the fed tokens in between are one step each."""
    again = sum(before) + length * len(before)
    # The prompt is first encoded with the first memory, if that stands at its end.
    first = 0 if moments[0] == 0 else before[0] - moments[0]
    return first + again + text - 1
