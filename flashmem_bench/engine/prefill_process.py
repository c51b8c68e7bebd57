"""One long prefill in a process of its own: how far its resident memory grows. Started by the `prefill-memory` check.

A short prefill comes first, so that what is loaded once is not counted. The peak is that of this process's own memory
(VmHWM), because the peak that `getrusage` gives begins with that of the process which started this one.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

_SHORT = 16


def main() -> None:
    """Prefill what the argument asks for, and print one line of JSON."""
    print(json.dumps(measure(json.loads(sys.argv[1]))))


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Prefill once.

    Args:
        asked: `model`, `shape`, `dtype`, `execution`, `context` and `seed`.
    """
    import torch

    from flashmem_bench.engine.setting import set_execution
    from flashmem_bench.engine.workload import random_prompt
    from flashmem_bench.latency.shapes import random_backbone
    from flashmem_bench.models import load_backbone

    if asked["shape"] is not None:
        backbone = random_backbone(asked["shape"], "cpu", asked["dtype"], asked["seed"])
    else:
        backbone = load_backbone(asked["model"], "cpu", asked["dtype"])
    set_execution(backbone, asked["execution"])
    prompt = random_prompt(backbone, asked["context"], asked["seed"])
    with torch.inference_mode():
        backbone.prefill([prompt[:_SHORT]])
        gc.collect()
        before, peak_before = memory_bytes("VmRSS"), memory_bytes("VmHWM")
        begun = time.perf_counter()
        # Kept until the peak is read, as a caller keeps it.
        state = backbone.prefill([prompt])
        seconds, peak = time.perf_counter() - begun, memory_bytes("VmHWM")
    assert state.batch_size == 1
    # Where the peak of loading was higher, the growth is at most what is given.
    return {"growth_bytes": peak - before, "risen": peak > peak_before, "seconds": seconds, "before_bytes": before}


def memory_bytes(name: str) -> int:
    """Return a figure of this process's memory from the system, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the system does not tell {name} of a process")


if __name__ == "__main__":
    main()
