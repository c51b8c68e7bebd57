"""Tiny random-weight backbones of every supported family, with the family's real layer pattern."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from flashmem import Backbone

WORDS = 96
SMALL = dict(
    vocab_size=WORDS + 4,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    # Large enough that attention is far from uniform and greedy choices are far from ties.
    initializer_range=0.3,
    tie_word_embeddings=False,
)
FAMILY_SETTINGS = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 12},
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 8, "num_hidden_layers": 4},
    "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 8, "num_hidden_layers": 26},
    "phi3": {"sliding_window": 12},
}
FAMILIES = list(FAMILY_SETTINGS)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, no chat template."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "\n": 3} | {f"w{i}": i + 4 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w0"
    )


@functools.cache
def _model(family: str) -> PreTrainedModel:
    torch.manual_seed(7)
    settings = {**SMALL, **FAMILY_SETTINGS[family]}
    if settings["num_hidden_layers"] > 10:
        settings["initializer_range"] = 0.1
    config = AutoConfig.for_model(family, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def reference_model(family: str, attention: str) -> PreTrainedModel:
    """The same weights as `make_backbone`, under one of transformers' own attention functions."""
    model = copy.deepcopy(_model(family))
    model.set_attn_implementation(attention)
    return model.eval()


def make_backbone(family: str = "qwen2") -> Backbone:
    """A fresh backbone: tests may change it."""
    return Backbone(f"tiny-{family}", copy.deepcopy(_model(family)), make_tokenizer())


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def backbone() -> Backbone:
    return make_backbone()


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, WORDS + 4, (n,), generator=generator).tolist() for n in lengths]
