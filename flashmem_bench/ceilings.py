"""What this machine can do at best: copy bandwidth, matrix products, the time to start one small operation.

Measured in about a second, so that every speed can be given as a share of what the hardware allows instead of of what
its data sheet says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ceilings:
    """The best of a few tries.

    Attributes:
        flops: Operations a second in one matrix product.
        bytes_s: Bytes a second of a copy, read and written.
        launch_us: Microseconds to start one small operation.
        where: Device and dtype.
    """

    flops: float
    bytes_s: float
    launch_us: float
    where: str


def measure_ceilings(device: str, dtype: Any) -> Ceilings:
    """Measure a device: one matrix product, one copy, many small operations.

    Args:
        device: A torch device, such as cpu or cuda:1.
        dtype: The torch dtype of the matrix product.
    """
    import torch

    on_cpu = device.startswith("cpu")
    size = 512 if on_cpu else 8192
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    flops = 2 * size**3 / _best(lambda: matrix @ matrix, device)
    bytes_s = copy_bandwidth(device)
    small = matrix[:1, :64]
    launch = _best(lambda: [torch.nn.functional.silu(small) for _ in range(200)], device) / 200
    return Ceilings(flops, bytes_s, launch * 1e6, f"{device} in {str(dtype).removeprefix('torch.')}")


def copy_bandwidth(device: str) -> float:
    """Return the bytes a second, read and written, of the fastest copy of a large block.

    Args:
        device: A torch device, such as cpu or cuda:1.
    """
    import torch

    block = torch.empty(2**26 if device.startswith("cpu") else 2**30, dtype=torch.uint8, device=device)
    # Into memory that is there already: a fresh block would be timed with the pages that the system brings in.
    target = torch.empty_like(block)
    return 2 * block.numel() / _best(lambda: target.copy_(block), device)


def _best(work: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of three runs after one that does not count."""
    import torch

    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
