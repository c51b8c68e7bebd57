"""Conversations as token ids with loss weights, and the pauses that are put into them.

A pause is a few tokens before an answer or inside it that are not learned: without meaning, or a hint.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from flashmem_bench.generators.base import NAMES, WORDS
from flashmem_bench.tiny.corpus import COMPOSED_WEIGHT, Text
from flashmem_bench.tiny.tokenizer import SEPARATORS

# Tokens of a pause at most.
PAUSE_LENGTH = 8


@dataclass
class Encoded:
    """Token ids of a conversation; `weights` is aligned with its last tokens, from the first answer on. What a user
    says in between weighs nothing.
    """

    task: str
    ids: list[int]
    weights: list[float]


def encode(tokenizer: PreTrainedTokenizerFast, text: Text) -> Encoded:
    """Render one conversation through the chat template, with the loss weight of each token from the first answer on.

    A row's weights sum to about the square root of the number of tokens that it teaches, so that one-word answers
    are not drowned by rationales.
    """
    answer, shares = _answer(tokenizer, text.target, text.quiet, text.hints)
    ids = [*_question(tokenizer, text.prompt), *answer]
    for question, target in text.turns:
        asked = _question(tokenizer, question)[1:]
        answer, learned = _answer(tokenizer, target)
        ids += [*asked, *answer]
        shares += [*[0.0] * len(asked), *learned]
    scale = sum(share > 0 for share in shares) ** -0.5
    return Encoded(text.task, ids, [scale * share for share in shares])


def _question(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _answer(
    tokenizer: PreTrainedTokenizerFast,
    target: str,
    quiet: Sequence[tuple[int, int]] = (),
    hints: Sequence[tuple[int, str]] = (),
) -> tuple[list[int], list[float]]:
    """Token ids of an answer with its end, and the share of the loss that each has; hints weigh nothing."""
    coded = tokenizer(target, add_special_tokens=False, return_offsets_mapping=True)
    said = dict(hints)
    ids: list[int] = []
    shares: list[float] = []
    for token, (start, _) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
        if start in said:
            pause = hint_pause(tokenizer, said[start], random.Random(f"{target}|{start}"))
            ids += pause
            shares += [0.0] * len(pause)
        ids.append(token)
        shares.append(COMPOSED_WEIGHT if any(a <= start < b for a, b in quiet) else 1.0)
    return [*ids, tokenizer.eos_token_id], [*shares, 1.0]


def hint_pause(tokenizer: PreTrainedTokenizerFast, name: str, chance: random.Random) -> list[int]:
    """Up to eight tokens, some of them `name`, the others newlines.

    A pre-trained model takes a hint that stands in front of its answer. One of this size must have seen some, or a
    memory that knows the last link but one could not say so.
    """
    coded, newline = (tokenizer.encode(text, add_special_tokens=False) for text in (name, "\n"))
    length = PAUSE_LENGTH if chance.random() < 0.7 else chance.randint(1, PAUSE_LENGTH)
    often, sure = chance.uniform(0.2, 1.0), chance.randrange(length)
    return [coded[0] if i == sure or chance.random() < often else newline[-1] for i in range(length)]


def with_pause(row: Encoded, chance: random.Random, filler: Sequence[int], newline: int) -> Encoded:
    """Put up to eight tokens that mean nothing before an answer, or somewhere inside it; none of them is learned.

    A real chat model shrugs off a few blank lines in front of its answer. A model of this size, which never saw any,
    loses every look-up to a single one, and then latents of any content would do nothing but harm.
    """
    length = PAUSE_LENGTH if chance.random() < 0.7 else chance.randint(1, PAUSE_LENGTH)
    words = [newline] * length if chance.random() < 0.85 else chance.choices(filler, k=length)
    learned = [place for place, weight in enumerate(row.weights) if weight > 0]
    before = 0 if chance.random() < 0.5 else chance.choice(learned)
    at = len(row.ids) - len(row.weights) + before
    ids = [*row.ids[:at], *words, *row.ids[at:]]
    return Encoded(row.task, ids, [*row.weights[:before], *[0.0] * length, *row.weights[before:]])


def fillers(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that a pause may hold: all but the special ones and the names and words that answers consist of."""
    kept_out = {*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids([*NAMES, *WORDS, *SEPARATORS])}
    return [token for token in range(len(tokenizer)) if token not in kept_out]


def pause_rows(
    rows: list[Encoded], tokenizer: PreTrainedTokenizerFast, share: float, seed: int, step: int
) -> list[Encoded]:
    """Give a share of the rows a pause, a third of these another one; the same ones for the same seed and step."""
    chance = random.Random(f"{seed}|pause|{step}")
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    filler = fillers(tokenizer)
    paused = []
    for row in rows:
        for wanted in (share, 1 / 3):
            if chance.random() >= wanted:
                break
            row = with_pause(row, chance, filler, newline)
        paused.append(row)
    return sorted(paused, key=lambda row: len(row.ids))
