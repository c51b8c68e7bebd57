"""The bundled backbone, small enough to train and to run on a laptop.

It shows that the machinery works; it does not show that a method is right. The weights are a plain Hugging
Face folder, so `AutoModelForCausalLM.from_pretrained(weights_dir())` works without this package's help.
"""

from __future__ import annotations

from pathlib import Path

TINY_NAME = "flashmem-tiny"


def weights_dir() -> Path:
    """Folder with the bundled model, its tokenizer and its model card."""
    return Path(__file__).resolve().parent / "weights" / TINY_NAME
