"""The least traffic and arithmetic of a run, by formula: what each row is held against.

A pass over a model reads every weight once and the keys and values that are there, and multiplies each of its Q
positions with every weight (two operations each) and with every key and value that it sees. Activations, dispatch and
recomputed scores are not in here, so a share of the hardware's ceiling that is computed from these numbers is a lower
bound on how busy the hardware was, and an upper bound on what an engine can still win.

Pure arithmetic; see `flashmem_bench.floor` for the shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashmem_bench.floor import Shape


@dataclass(frozen=True)
class Work:
    """Bytes moved and operations done."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(self.bytes + other.bytes, self.flops + other.flops)


NOTHING = Work(0.0, 0.0)


def run_work(
    shape: Shape,
    kind: str | None,
    *,
    prompt: int,
    text: int,
    moments: Sequence[int],
    length: int,
    depth: int = 1,
    element_bytes: int = 4,
) -> tuple[Work, Work]:
    """Work of the prefill and of everything after it.

    Args:
        shape: Of the backbone.
        kind: Source of the memories, as in `flashmem_bench.positions`; None decodes plainly.
        prompt: P.
        text: Text tokens; the last one is never fed.
        moments: Text tokens before each memory, ascending.
        length: K.
        depth: L of a consolidator.
        element_bytes: Of a weight or a cache element.
    """
    when = moments if kind is not None else ()
    steps = [_step(shape, prompt + t + 1 + length * sum(m <= t for m in when), element_bytes) for t in range(text - 1)]
    prefill = model_pass(shape, prompt, prompt, element_bytes)
    memories = [
        part
        for i, t in enumerate(when)
        for part in _memory(shape, kind, prompt + t + length * i, prompt if i == 0 else 0, length, depth, element_bytes)
    ]
    # MemGen as released encodes the prompt with its first memory, not before it.
    lazy = kind == "weaver-recompute" and bool(when) and when[0] == 0
    return NOTHING if lazy else prefill, sum([*steps, *memories], NOTHING)


def model_pass(shape: Shape, positions: int, end: int, element_bytes: int, head: bool = True) -> Work:
    """One pass of `positions` positions that ends at `end` positions of context, logits for the last one only."""
    weights = shape.layers * shape.layer_weights
    vocabulary = shape.width * shape.vocabulary if head else 0
    seen = end - (positions - 1) / 2
    scores = 2 * shape.heads * shape.head_width * seen
    moved = weights + vocabulary + shape.layers * shape.cache(end)
    done = positions * (weights + shape.layers * scores) + vocabulary
    return Work(float(moved * element_bytes), 2.0 * done)


def _step(shape: Shape, end: int, element_bytes: int) -> Work:
    return model_pass(shape, 1, end, element_bytes)


def _memory(
    shape: Shape, kind: str | None, before: int, unseen: int, length: int, depth: int, element_bytes: int
) -> Iterator[Work]:
    """Making one memory behind `before` positions, and passing it through the backbone."""
    if kind == "weaver-recompute":
        yield model_pass(shape, before + length, before + length, element_bytes, head=False)
        yield model_pass(shape, before + length, before + length, element_bytes)
        return
    if kind == "weaver":
        # What came since the last memory, at least the latents of that one, and the query slots.
        new = unseen or length
        yield model_pass(shape, new + length, before + length, element_bytes, head=False)
    if kind == "separate-encoder":
        yield model_pass(shape, before, before, element_bytes, head=False)
    if kind in ("consolidator", "separate-encoder"):
        block = depth * (shape.block_weights + shape.cache(before)) + shape.width**2
        scores = depth * 2 * shape.heads * shape.head_width * before
        done = length * (depth * shape.block_weights + scores + shape.width**2) + 2 * shape.width**2
        yield Work(float((length * block + 2 * shape.width**2) * element_bytes), 2.0 * done)
    yield model_pass(shape, length, before + length, element_bytes)
