"""Where a bound is stated, and where it is not.

The bounds for two processor cores are stated for the bundled backbone in float32, those for an accelerator for the
shape of Qwen2.5-1.5B in bfloat16, each at one context. Elsewhere the same figures are measured and shown without a
verdict: a smaller model on a larger device is limited by other things.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashmem_bench.engine.figures import Bound
from flashmem_bench.models import BUNDLED

if TYPE_CHECKING:
    from flashmem_bench.engine.setting import Setting

_WIDTH, _LAYERS = 1536, 28


def at_most(setting: Setting, value: float, device: str, usual: bool = True) -> Bound | None:
    """Return the bound where it is stated for this setting; `usual` says whether the context is the check's own."""
    return Bound("at most", value) if usual and stated(setting, device) else None


def at_least(setting: Setting, value: float, device: str, usual: bool = True) -> Bound | None:
    """Return the bound where it is stated for this setting; `usual` says whether the context is the check's own."""
    return Bound("at least", value) if usual and stated(setting, device) else None


def stated(setting: Setting, device: str) -> bool:
    """Return whether bounds for a type of device are stated for the model and the dtype of a setting."""
    backbone = setting.backbone
    dtype = str(backbone.dtype).removeprefix("torch.")
    if setting.device != device:
        return False
    if device == "cpu":
        return backbone.name == BUNDLED and dtype == "float32"
    return (backbone.hidden_size, backbone.num_layers, dtype) == (_WIDTH, _LAYERS, "bfloat16")
