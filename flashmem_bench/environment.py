"""What a timing depends on besides the code: versions, processor, threads, load.

Recorded with every attempt of a cell, and shown by `doctor`. It never holds host names or user names.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmem.backbone import Backbone

PACKAGES = ("torch", "transformers", "lm-eval", "datasets", "safetensors", "pandas", "pyarrow", "scipy")


def describe(backbone: Backbone) -> dict[str, Any]:
    """Return what the timings of an attempt depend on."""
    import torch

    found = {**describe_machine(), "device_name": None}
    if backbone.device.type == "cuda":
        found["device_name"] = torch.cuda.get_device_name(backbone.device)
    return found


def describe_machine() -> dict[str, Any]:
    """Return versions, processor, threads and load."""
    import torch

    return {
        "versions": package_versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_quota": cpu_quota(),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
    }


def package_versions() -> dict[str, str | None]:
    """Return the version of each package that can change a result; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def processor() -> str:
    """Return the processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def cpu_quota() -> float | None:
    """Return how many processors the control group allows, None without a quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None
