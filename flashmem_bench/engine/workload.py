"""The prompts of the checks, and how answers end.

*Mixed* prompts come from the four bundled generators, shuffled once by the seed: word problems of 20 to 55 tokens with
rationales of 11 to 33, single look-ups (60 tokens, answers of 2), lists of look-ups (80 to 95, answers of 37 to 61) and
key-value recall (80 to 400, answers of 2). An answer ends at the EOS or after 128 tokens. So a batch in this order
holds prompts and answers of very different lengths, as a suite does that nobody sorted.

*Fixed* answers ignore the EOS and have a given number of tokens.

A backbone with random weights has no tokenizer: its prompts are random ids of mixed lengths, and its answers never
meet an EOS, so their budget ends them.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmem.backbone import Backbone

SUITES = ("wordmath", "hops", "hops-list", "recall")
MOST_TOKENS = 128
_RANDOM_LENGTHS = (16, 96)


def mixed_prompts(backbone: Backbone, count: int, seed: int) -> list[list[int]]:
    """Return prompts of the bundled suites, as token ids, in an order that the seed shuffled."""
    chance = random.Random(f"mixed|{seed}")
    if backbone.name.startswith("random-"):
        lengths = [chance.randint(*_RANDOM_LENGTHS) for _ in range(count)]
        return [random_prompt(backbone, length, seed + place) for place, length in enumerate(lengths)]
    from flashmem_bench.generators import generate

    each = -(-count // len(SUITES))
    texts = [row["prompt"] for name in SUITES for row in generate(name, "test", each, 0)]
    chance.shuffle(texts)
    return [backbone.encode_chat(text) for text in texts[:count]]


def random_prompt(backbone: Backbone, length: int, seed: int) -> list[int]:
    """Return ids drawn at random; the same that `latency` draws."""
    chance = random.Random(f"{seed}|{length}")
    return [chance.randrange(len(backbone.tokenizer)) for _ in range(length)]


def until_eos(backbone: Backbone, most: int = MOST_TOKENS) -> Any:
    """Return the greedy generation configuration that ends at the EOS."""
    found = getattr(backbone.model.generation_config, "eos_token_id", None)
    found = backbone.tokenizer.eos_token_id if found is None else found
    eos = _no_eos(backbone) if found is None else [found] if isinstance(found, int) else list(found)
    return _greedy(backbone, most, eos)


def fixed_length(backbone: Backbone, tokens: int) -> Any:
    """Return the greedy generation configuration that ignores the EOS."""
    return _greedy(backbone, tokens, _no_eos(backbone))


def _no_eos(backbone: Backbone) -> list[int]:
    """An id that no token has: `generate` takes the model's own EOS where none is given, and warns of negative ones."""
    return [int(backbone.config.vocab_size)]


def _greedy(backbone: Backbone, tokens: int, eos: list[int]) -> Any:
    from transformers import GenerationConfig

    pad = backbone.tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0 if pad is None else pad,
        use_cache=True,
    )
