"""Does the same prompt give the same tokens twice, and in another batch? What `doctor --determinism` measures.

Floating-point sums depend on their order, and kernels choose that by the shape of a batch. Where two tokens are almost
equally likely this changes an answer, so results of different batch sizes are never paired. Here is how often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem.memory import MemorySource

TOKENS = 48


@dataclass(frozen=True)
class Agreement:
    """How far two runs over the same prompts agree.

    Attributes:
        what: What was changed between them.
        same: Answers that are equal token for token.
        answers: All answers.
        first_difference: Earliest token at which two answers part; None where none does.
    """

    what: str
    same: int
    answers: int
    first_difference: int | None


def measure(
    backbone: Backbone, prompts: Sequence[list[int]], batch: int, memory: MemorySource | None = None
) -> list[Agreement]:
    """Generate greedily at batch 1, again at batch 1, and at another batch size, and compare.

    Args:
        backbone: The model.
        prompts: Token ids.
        batch: The other batch size.
        memory: With one, a memory is written at every prompt end as well.
    """
    first = _answers(backbone, prompts, 1, memory)
    again, together = _answers(backbone, prompts, 1, memory), _answers(backbone, prompts, batch, memory)
    name = "with memory" if memory is not None else "plain"
    return [
        compare(f"{name}: twice at batch 1", first, again),
        compare(f"{name}: batch 1 against batch {batch}", first, together),
    ]


def compare(what: str, first: Sequence[list[int]], second: Sequence[list[int]]) -> Agreement:
    """Compare answers in pairs."""
    places = [place for a, b in zip(first, second, strict=True) if (place := _parting(a, b)) is not None]
    return Agreement(what, len(first) - len(places), len(first), min(places, default=None))


def _parting(a: list[int], b: list[int]) -> int | None:
    if a == b:
        return None
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _answers(
    backbone: Backbone, prompts: Sequence[list[int]], batch: int, memory: MemorySource | None
) -> list[list[int]]:
    from transformers import GenerationConfig

    from flashmem.generation import generate
    from flashmem.trigger import TriggerConfig

    found: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        done = generate(
            backbone,
            list(prompts[start : start + batch]),
            memory=memory,
            trigger=TriggerConfig(kind="prompt-end") if memory is not None else None,
            generation_config=GenerationConfig(max_new_tokens=TOKENS, do_sample=False),
        )
        found += [generation.token_ids for generation in done]
    return found
