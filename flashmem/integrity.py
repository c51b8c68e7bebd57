"""Hashes that stored records and tensors carry, so that a flipped bit is an error instead of another answer.

A record (a JSON object) carries the hash of all its other entries; tensors in a safetensors file carry one over names,
types, shapes and bytes in the file's metadata; a weights file of its own has its hash in the record beside it. Files
from before these hashes were there are taken as they are.

Nothing here guards against somebody who changes a file on purpose: who can do that can write the hash anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SEAL = "record_sha256"


def record_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record as canonical JSON, its seal left out."""
    rest = {key: value for key, value in record.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its hash."""
    # What is hashed is what will be read: tuples have become lists by then, and keys text.
    plain = json.loads(json.dumps(dict(record)))
    return {**plain, SEAL: record_hash(plain)}


def require_seal(record: Mapping[str, Any], path: Path, mend: str) -> None:
    """Refuse a record that is not the one that was written.

    Args:
        record: as it was read.
        path: its file, for the message.
        mend: what the user can do about it.

    Raises:
        CheckpointError: with the file and both hashes.
    """
    if SEAL in record:
        require_hash(path, str(record[SEAL]), record_hash(record), mend)


def require_hash(path: Path, wanted: str, found: str, mend: str) -> None:
    """Refuse content whose hash is not the one that was written with it.

    Raises:
        CheckpointError: with the file and both hashes.
    """
    if wanted != found:
        raise CheckpointError(
            f"{path} is damaged or was changed (hash mismatch: it was written with SHA-256 {wanted} and now has "
            f"{found}): {mend}."
        )


def tensors_hash(tensors: Mapping[str, Tensor], labels: Mapping[str, str]) -> str:
    """SHA-256 over named tensors (on any device) and the texts that belong to them."""
    import torch

    digest = hashlib.sha256(json.dumps(dict(labels), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
