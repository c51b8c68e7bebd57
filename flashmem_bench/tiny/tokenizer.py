"""A small byte-level BPE whose words are chosen for the bundled tasks.

Three choices make small models learn look-ups quickly. Every name and keyword of the generators is one token.
Separators such as " -> " and ": " carry their spaces with them, so that a name is the same token as a key, as
a value and as an answer. Digits are always split. Any other text still round-trips, because the alphabet
holds all bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flashmem_bench.generators import wordmath
from flashmem_bench.generators.base import NAMES, WORDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIALS = [PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES)]
SEPARATORS = (" -> ", ": ", " = ", " + ", " - ", " * ", " / ", "#### ")
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB_SIZE = 1792
_SPLIT = r" -> |: | = | \+ | - | \* | / |#### |\p{N}| ?\p{L}+|\n| ?[^\s\p{L}\p{N}]+|\s+"
KEYWORDS = (
    "One Two Three Four Key link links twice Follow the Look up each name Names Recall has have buys finds gives "
    "more to loses sells times as many shares them equally among friends friend How does get with"
).split()


def keywords() -> list[str]:
    """Words that must be one token, with and without a space before them."""
    words = dict.fromkeys([*NAMES, *WORDS, *KEYWORDS, *wordmath.ITEMS, *wordmath.BOXES])
    return [form for word in words for form in (word, f" {word}")]


def _pre_tokenizer():
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _bytes_form(text: str) -> str:
    """`text` in the printable alphabet that byte-level vocabularies are written in."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in level.pre_tokenize_str(text))


def build(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train the BPE on `texts`, then add the whole words that its merges did not reach.

    Whole words sit in the vocabulary without merges and are found by `ignore_merges`, which looks a pre-token
    up before it applies any merge: a hundred names would otherwise cost several hundred intermediate tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    whole = [_bytes_form(word) for word in (*SEPARATORS, *keywords())]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS) - len(whole),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    state = json.loads(learner.to_str())["model"]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *sorted(state["vocab"], key=state["vocab"].get)])}
    for token in whole:
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in state["merges"]], ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def build_tokenizer(
    texts: Iterable[str], vocab_size: int = VOCAB_SIZE, max_length: int = 131072
) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it, with chat template and special tokens."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=build(texts, vocab_size),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer exactly as `folder`'s tokenizer.json describes it.

    For a Qwen2 model `AutoTokenizer` takes the family's own class, and with it another pre-tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)
