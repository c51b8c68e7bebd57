"""The least that FlashMem can cost, computed from N, K, L, d and T before anything is measured.

A decode step reads every weight once and the whole KV cache; on one sequence that traffic, not arithmetic, is the limit
of any hardware. An injection adds one more pass over the backbone (its K latents go through together) and K steps of
the consolidator, each of which reads its L blocks and the cache of L layers. The monitor adds nothing: the last layer
needs its row of scores anyway. Dispatch, allocation and Python are not in here: a measured ratio above this floor is
what an engine can still win.

Pure arithmetic on the shape of a backbone; imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The numbers that decide what a backbone costs. Widths in elements."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read a transformers configuration."""
        heads = int(config.num_attention_heads)
        return cls(
            layers=int(config.num_hidden_layers),
            width=int(config.hidden_size),
            heads=heads,
            kv_heads=int(config.num_key_value_heads or heads),
            head_width=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            ffn=int(config.intermediate_size),
            vocabulary=int(config.vocab_size),
        )

    @property
    def layer_weights(self) -> int:
        """Elements of one decoder layer: q, k, v, o and a gated FFN."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.width * self.ffn

    @property
    def block_weights(self) -> int:
        """Elements of one consolidator block: a layer without its key and value projections."""
        return self.layer_weights - 2 * self.width * self.head_width * self.kv_heads

    def cache(self, context: int) -> int:
        """Elements of one layer's keys and values over `context` positions."""
        return 2 * context * self.kv_heads * self.head_width


@dataclass(frozen=True)
class Floor:
    """Least decode cost of FlashMem relative to plain decoding.

    Attributes:
        bytes_ratio: by memory traffic, the limit of one sequence.
        flops_ratio: by arithmetic.
        passes: extra passes over the backbone a text token.
        plain_bytes: traffic of the plain decode of one text token, at the mean context.
    """

    bytes_ratio: float
    flops_ratio: float
    passes: float
    plain_bytes: float


def decode_floor(
    shape: Shape, *, context: int, text_tokens: int, injections: int, length: int, depth: int, element_bytes: int = 4
) -> Floor:
    """Compute the floor of one answer.

    Args:
        shape: Of the backbone.
        context: Prompt length T, tokens.
        text_tokens: Text tokens generated.
        injections: Memories injected.
        length: K.
        depth: L.
        element_bytes: Bytes of a weight or cache element.
    """
    middle = context + text_tokens // 2
    weights = shape.layers * shape.layer_weights
    head = shape.width * shape.vocabulary
    step = weights + head + shape.layers * shape.cache(middle)
    # Seed (two d x d maps) once, output map once a latent.
    block = depth * (shape.block_weights + shape.cache(middle)) + shape.width**2
    memory = step + length * block + 2 * shape.width**2
    scores = 2 * shape.heads * shape.head_width * middle
    step_flops = weights + head + shape.layers * scores
    memory_flops = (
        length * (weights + shape.layers * scores)
        + head
        + length * (depth * (shape.block_weights + scores) + shape.width**2)
        + 2 * shape.width**2
    )
    plain, plain_flops = text_tokens * step, text_tokens * step_flops
    return Floor(
        bytes_ratio=1 + injections * memory / plain,
        flops_ratio=1 + injections * memory_flops / plain_flops,
        passes=injections / text_tokens,
        plain_bytes=float(step * element_bytes),
    )
