"""The state of the machine around a block of runs: clocks, temperature, throttling, who else is there.

On NVIDIA devices through NVML, where `nvidia-ml-py` is installed; nothing fails without it. Nothing is dropped because
of what is seen here: blocks are marked, and the reader decides.
"""

from __future__ import annotations

import os
from typing import Any

# Bits of NVML's throttle reasons that mean heat or power, not idleness or a setting.
_HOT_OR_CAPPED = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


def snapshot(device: str) -> dict[str, Any]:
    """Return what can be seen now; on a CPU the load."""
    found: dict[str, Any] = {"load_average": round(os.getloadavg()[0], 2)}
    if not device.startswith("cuda"):
        return found
    try:
        return found | _nvml(int(device.partition(":")[2] or 0))
    except Exception as error:  # NVML is missing, or refuses in this container.
        return found | {"nvml": f"not available ({type(error).__name__})"}


def _nvml(index: int) -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        reasons = int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        running = [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "throttle_reasons": reasons,
            "throttled": bool(reasons & _HOT_OR_CAPPED),
            "other_processes": sum(pid != os.getpid() for pid in running),
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
        }
    finally:
        pynvml.nvmlShutdown()
