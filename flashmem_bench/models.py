"""Backbones by name: the bundled one, a local folder, or a hub id.

`model_key` is the name under which checkpoints and thresholds of a backbone are stored. It need not be unique: what
makes a mix-up harmless is the fingerprint inside every checkpoint, threshold and cell.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.hub import quick_hub

if TYPE_CHECKING:
    from flashmem.backbone import Backbone

BUNDLED = "flashmem-tiny"
BUNDLED_SUMMARY = "bundled: small enough for a laptop, shows that the machinery works"
DTYPES = ("float32", "bfloat16", "float16")
# Below this many parameters one step is too small to share: more threads only wait for each other.
_SMALL = 50_000_000


def model_key(model: str) -> str:
    """Return the folder name for a model: the hub id with `--`, or the last part of a path."""
    if model == BUNDLED:
        return BUNDLED
    if Path(model).exists():
        return Path(model).resolve().name
    return model.strip("/").replace("/", "--")


def bundled_weights() -> Path:
    """Return the folder of the bundled backbone.

    Raises:
        BenchError: This installation has no weights for it.
    """
    from flashmem_bench.tiny import weights_dir

    folder = Path(weights_dir())
    if not (folder / "config.json").exists():
        raise BenchError(
            f"the bundled model {BUNDLED} has no weights in {folder}; make them with `make tiny`, "
            "or choose another with --model"
        )
    return folder


def _checked(folder: Path) -> Path:
    from flashmem_bench.tiny.sums import check_sums

    check_sums(folder)
    return folder


def load_backbone(model: str, device: str = "auto", dtype: str = "auto", placement: str = "single") -> Backbone:
    """Load a frozen backbone.

    Args:
        model: `flashmem-tiny`, a folder, or a hub id.
        device: `auto` takes a GPU if there is one.
        dtype: `auto` is float32 on a CPU and bfloat16 elsewhere.
        placement: `auto` spreads the layers over all devices, for a model too big for one.

    Raises:
        BenchError: Neither a folder nor a reachable hub id.
        CheckpointError: A file of the bundled backbone is damaged.
        UsageError: An unknown dtype or a device that this machine does not have.
    """
    import torch
    from transformers.utils import logging

    from flashmem.backbone import Backbone

    logging.disable_progress_bar()
    # Prompts beyond the trained context are noticed, and said, by the runner itself.
    logging.set_verbosity_error()
    # Prompts come one at a time: handing each to a pool of threads costs more than tokenising it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    source = str(_checked(bundled_weights())) if model == BUNDLED else model
    if os.sep in model and model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise BenchError(f"there is no model folder at {model}")
    chosen = pick_device(device)
    chosen_dtype = pick_dtype(dtype, chosen)
    folder = Path(source).expanduser()
    # A hub id is looked for in the cache alone where the hub does not answer: no minute of retries.
    with nullcontext() if folder.is_dir() else quick_hub():
        backbone = Backbone.from_pretrained(
            str(folder) if folder.is_dir() else model,
            device=chosen,
            dtype=chosen_dtype,
            device_map="auto" if placement == "auto" else None,
        )
    backbone.name = model_key(model)
    if chosen == "cpu" and "OMP_NUM_THREADS" not in os.environ and _parameters(backbone) < _SMALL:
        torch.set_num_threads(1)
    return backbone


def _parameters(backbone: Backbone) -> int:
    return sum(parameter.numel() for parameter in backbone.model.parameters())


@contextmanager
def training_threads() -> Iterator[None]:
    """Use every core for work in large batches, whatever decoding uses."""
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(device: str) -> str:
    """Return the torch device to use, checked against this machine."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    available: dict[str, Any] = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
    }
    if kind not in available or not available[kind]():
        usable = [name for name, check in available.items() if check()]
        raise UsageError(f"device {device!r} is not available here; this machine has {', '.join(usable)}")
    return device


def pick_dtype(dtype: str, device: str) -> str:
    """Return the dtype to use on a device."""
    if dtype == "auto":
        return "float32" if device.startswith("cpu") else "bfloat16"
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {dtype!r}")
    return dtype
