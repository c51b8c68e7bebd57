"""A small byte-level BPE whose words are chosen for the bundled tasks.

Three choices make small models learn look-ups quickly. Every name and key of the generators is one token.
Separators such as " -> " and ": " carry their spaces with them, so that a name is the same token as a key, as
a value and as an answer. Digits are always split. Any other text still round-trips (in Unicode's NFC form),
because the alphabet holds all bytes.

The rest is Qwen2's own tokenizer class and pattern: `AutoTokenizer` gives every Qwen2 model that class,
whatever its files say, so a pre-tokenizer of our own would be silently replaced when the folder is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flashmem_bench.generators.base import NAMES, WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SEPARATORS = (" -> ", ": ", " = ", " + ", " - ", " * ", " / ", "#### ")
KEYWORDS = (*NAMES, *WORDS, "Key")
# Only the assistant ends its turn with a token of its own. A question's last word then stands right before the answer,
# as a key stands before its colon, and one look-up serves both; two places before it, where a key stands before its
# value, an answer's place would look like the value that it looks for.
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB_SIZE = 1664


def _learn_merges(texts: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level vocabulary of `size` tokens and its merges, learned over Qwen2's pre-tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(learner.to_str())["model"]
    return state["vocab"], [tuple(merge) for merge in state["merges"]]


def build_tokenizer(
    texts: Iterable[str], vocab_size: int = VOCAB_SIZE, max_length: int = 131072
) -> PreTrainedTokenizerFast:
    """Train on `texts` and add the whole words, separators, special tokens and chat template.

    Whole words are added tokens, since merges would spend several hundred intermediate tokens on a hundred
    names. They match between word boundaries only: "Ana" is one token, "Anatomy" has nothing to do with it.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    whole = [AddedToken(text, normalized=False) for text in SEPARATORS]
    whole += [AddedToken(word, single_word=True, normalized=False) for word in KEYWORDS]
    vocab, merges = _learn_merges(texts, vocab_size - len(whole) - len(ROLES) - 3)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=None,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[f"<|{role}|>" for role in ROLES],
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(whole)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
