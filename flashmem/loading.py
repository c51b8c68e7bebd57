"""Getting a model and its tokenizer from a folder or a hub id, or one sentence that says why not.

A family is in the list when its attention, its masks and its cache have been checked against the monitor, the
consolidator and the injection (see the tests, which run on each). Others are refused instead of being tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from flashmem.errors import ConfigError, FlashMemError, UnsupportedBackboneError

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3")


def load(
    name_or_path: str | Path, dtype: str, trust_remote_code: bool, device_map: str | dict[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer.

    Args:
        name_or_path: folder with a transformers model, or a hub id.
        dtype: name of a floating torch dtype.
        trust_remote_code: run code that comes with the model.
        device_map: accelerate's placement of the layers; None leaves the model on the CPU.

    Raises:
        UnsupportedBackboneError: the family is not one of `FAMILIES`.
        FlashMemError: nothing is found under that name, or only weights that are pickles.
    """
    options = {"trust_remote_code": trust_remote_code}
    try:
        require_supported(AutoConfig.from_pretrained(name_or_path, **options))
        placed = {} if device_map is None else {"device_map": device_map}
        model = _model(name_or_path, dtype=_dtype(dtype), **placed, **options)
        return model, _tokenizer(name_or_path, options)
    except (OSError, ValueError) as error:
        raise FlashMemError(
            f"Cannot load a model from {str(name_or_path)!r}: give a folder with config.json, weights and "
            f"tokenizer, or a hub id while connected ({_first_line(error)})."
        ) from error


def _model(name_or_path: str | Path, **options: Any) -> PreTrainedModel:
    """The model from safetensors files. Other weights are pickles, and opening a pickle runs what is in it."""
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, use_safetensors=True, **options)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise FlashMemError(
            f"{str(name_or_path)!r} has no weights in safetensors files, and others are never opened, since a pickle "
            "can run any code: take a model or a revision that has model.safetensors, or convert it where you trust it."
        ) from error


def require_supported(config: Any) -> None:
    """Refuse a family that cannot work.

    Raises:
        UnsupportedBackboneError: with the reason.
    """
    kind = getattr(config, "model_type", "unknown")
    if kind not in FAMILIES:
        raise UnsupportedBackboneError(
            f"The family {kind!r} is not supported: its attention or cache has not been checked against the monitor. "
            f"Use one of {', '.join(FAMILIES)}."
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedBackboneError(f"This {kind} model attends in both directions: it has no causal KV cache.")


def _tokenizer(name_or_path: str | Path, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that the files describe.

    For some families AutoTokenizer takes the family's own class whatever the files say, and with it another
    pre-tokenizer; a folder that names the generic class means its tokenizer.json as it stands.
    """
    named = get_tokenizer_config(name_or_path, **options).get("tokenizer_class")
    if named in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return PreTrainedTokenizerFast.from_pretrained(name_or_path)
    return AutoTokenizer.from_pretrained(name_or_path, **options)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"Unknown dtype {name!r}: use float32, bfloat16 or float16.")
    return dtype


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
