"""What a pretraining needs to go on: one safetensors file, replaced at once, never a pickle.

safetensors holds tensors by name and text beside them. So the state, which is mappings and lists with tensors and
plain values at their ends, is taken apart: tensors go by the path that leads to them, and the rest is JSON with the
path in each tensor's place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashmem.integrity import tensors_hash

_TENSOR, _FACTS = "tensor", "facts"
# JSON has no numbers as keys; optimisers number their parameters.
_NUMBERED = "numbered"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state; its leaves are tensors and what JSON knows."""
    tensors: dict[str, Tensor] = {}
    facts = _apart(state, "", tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # Copies, because weights that are tied share their memory, which safetensors refuses.
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    labels = {_FACTS: json.dumps(facts)}
    save_file(copies, partial, metadata={**labels, "sha256": tensors_hash(copies, labels)})
    partial.replace(path)


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises:
        ValueError: the file is damaged, or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            labels = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        wanted, facts = labels.pop("sha256"), json.loads(labels[_FACTS])
        if tensors_hash(tensors, labels) != wanted:
            raise ValueError("hash mismatch")
        return _together(facts, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to start afresh") from error


def _apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        made = {str(key): _apart(entry, f"{name}/{key}", tensors) for key, entry in value.items()}
        return {_NUMBERED: made} if value and all(isinstance(key, int) for key in value) else made
    if isinstance(value, list | tuple):
        return [_apart(entry, f"{name}/{place}", tensors) for place, entry in enumerate(value)]
    return value


def _together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_NUMBERED}:
            return {int(key): _together(entry, tensors) for key, entry in value[_NUMBERED].items()}
        return {key: _together(entry, tensors) for key, entry in value.items()}
    return [_together(entry, tensors) for entry in value] if isinstance(value, list) else value
