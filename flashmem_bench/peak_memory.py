"""The peak of the memory that is allocated on a backbone's device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashmem.backbone import Backbone


class PeakMemory:
    """Reads the peak since the last reset; on a CPU nobody keeps one."""

    def __init__(self, backbone: Backbone):
        self._device = backbone.device

    def reset(self) -> None:
        """Begin anew."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> int | None:
        """Return the peak in bytes; None on a CPU."""
        if self._device.type != "cuda":
            return None
        import torch

        return int(torch.cuda.max_memory_allocated(self._device))
