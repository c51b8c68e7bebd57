"""Running out of memory: how it shows, and how what is held without need is given back."""

from __future__ import annotations

import gc
import sys

_SIGNS = ("out of memory", "can't allocate memory", "alloc_failed")


def is_shortage(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the device or on the host.

    torch raises `OutOfMemoryError` for its own pools, but a plain RuntimeError where a library or the CPU has none.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def give_back() -> None:
    """Free what only cycles and torch's pools still hold; call it when the failure's frames are gone."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
