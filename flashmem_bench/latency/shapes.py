"""Backbones of real shapes with random weights: what a method costs on them, and never what it scores.

Widths and counts are those of the published configurations. Positions are as many as the context needs: rotary tables
are computed as they go, so a longer limit costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import UsageError

if TYPE_CHECKING:
    from flashmem.backbone import Backbone

_POSITIONS = 2**18
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-1.5b": ("qwen2", {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
                               "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936,
                               "tie_word_embeddings": True}),
    "qwen2.5-7b": ("qwen2", {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
                             "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
                             "tie_word_embeddings": False}),
    "qwen3-4b": ("qwen3", {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32,
                           "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9728,
                           "vocab_size": 151936, "tie_word_embeddings": True}),
    "llama-3.2-3b": ("llama", {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
                               "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192,
                               "vocab_size": 128256, "tie_word_embeddings": True}),
    "llama-3.1-8b": ("llama", {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                               "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
                               "vocab_size": 128256, "tie_word_embeddings": False}),
    "smoke": ("qwen2", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512,
                        "tie_word_embeddings": True}),
}  # fmt: skip


class NumberTokenizer:
    """Stands in for a tokenizer where ids are drawn at random: every token is its own number."""

    pad_token_id, eos_token_id, chat_template = 0, None, None

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        """Size of the vocabulary."""
        return self._size

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """One id for each character."""
        return [ord(letter) % self._size for letter in text]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The numbers, with a blank between them."""
        return " ".join(str(token) for token in token_ids)


def random_backbone(shape: str, device: str, dtype: str, seed: int = 0) -> Backbone:
    """Make a backbone of a named shape with random weights.

    Raises:
        UsageError: No such shape.
    """
    from flashmem.backbone import Backbone

    model = random_model(shape, device, dtype, seed)
    tokenizer: Any = NumberTokenizer(int(model.config.vocab_size))
    return Backbone(f"random-{shape}", model, tokenizer)


def random_model(shape: str, device: str, dtype: str, seed: int = 0) -> Any:
    """Make the transformers model of a named shape; the same seed gives the same weights.

    Raises:
        UsageError: No such shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if shape not in SHAPES:
        raise UsageError(f"--model-shape is one of {', '.join(SHAPES)}, not {shape!r}")
    family, values = SHAPES[shape]
    config = AutoConfig.for_model(family, **values, max_position_embeddings=_POSITIONS)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.to(device)
