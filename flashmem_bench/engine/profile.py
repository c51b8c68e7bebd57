"""One decode step taken apart: kernels by time, the gaps between them, and the bytes that it has to move.

On a CUDA device the kernels of the step are those that the device ran; on a CPU they are the operators that no other
operator called, and a gap is what Python and the dispatcher take. The profiler slows the host down, so the gaps are an
upper bound; the time of a step without it stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from flashmem_bench.engine.contestants import timed
from flashmem_bench.engine.figures import Figure, Outcome
from flashmem_bench.engine.workload import random_prompt
from flashmem_bench.errors import BenchError
from flashmem_bench.floor import Shape
from flashmem_bench.latency.work import model_pass

if TYPE_CHECKING:
    from flashmem.backbone import DecodeState
    from flashmem_bench.engine.setting import Setting

CONTEXT, SHOWN = 4096, 12
_WARM, _TIMED = 3, 9


def profile_step(setting: Setting) -> Outcome:
    """Profile one decode step with the monitor on, and time it without the profiler."""
    import torch

    from flashmem_bench.ceilings import copy_bandwidth

    found, backbone = Outcome("profile"), setting.backbone
    bandwidth = copy_bandwidth(str(backbone.device))
    for context in setting.lengths((CONTEXT,), _WARM + _TIMED + 1):
        with torch.inference_mode():
            backbone.observe(True)
            try:
                state = backbone.prefill([random_prompt(backbone, context, setting.seed)])
                plain_us = _usual_step(setting, state)
                intervals = _profiled(setting, state)
            finally:
                backbone.observe(False)
        moved = model_pass(Shape.of(backbone.config), 1, context, backbone.dtype.itemsize).bytes
        busy, span = covered(intervals), _span(intervals)
        shares = {
            "kernels of a profiled step": busy / span,
            "least time for the bytes of a step / step": moved / bandwidth * 1e6 / plain_us,
        }
        found.figures += [Figure(name, share, context=context, counted=True) for name, share in shares.items()]
        found.details[str(context)] = {
            "step_us": plain_us,
            "profiled_span_us": span,
            "kernel_us": busy,
            "gap_us": span - busy,
            "kernels": len(intervals),
            "least_bytes": moved,
            "copy_bytes_s": bandwidth,
            "by_time": by_time(intervals),
        }
        found.notes.append(_sentence(context, found.details[str(context)]))
    return found


def _usual_step(setting: Setting, state: DecodeState) -> float:
    """Median microseconds of a step that nobody profiles."""
    import statistics

    times = [timed(setting.backbone, lambda: _step(setting, state))[0] for _ in range(_WARM + _TIMED)]
    return statistics.median(times[_WARM:]) * 1e6


def _step(setting: Setting, state: DecodeState) -> None:
    setting.backbone.engine.step(state, [0], [True])


def _profiled(setting: Setting, state: DecodeState) -> list[tuple[str, float, float]]:
    """Name, begin and end of every kernel of one step, microseconds."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_device = setting.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities) as found:
        timed(setting.backbone, lambda: _step(setting, state))
    kind = DeviceType.CUDA if on_device else DeviceType.CPU
    intervals = [
        (event.name, float(event.time_range.start), float(event.time_range.end))
        for event in found.events()
        if event.device_type == kind and (on_device or event.cpu_parent is None)
    ]
    if not intervals:
        raise BenchError("the profiler saw no kernel of the step: allow it to read the device's counters")
    return intervals


def covered(intervals: Iterable[tuple[str, float, float]]) -> float:
    """Return the time that lies in at least one interval."""
    total, reached = 0.0, float("-inf")
    for _, begin, end in sorted(intervals, key=lambda entry: entry[1]):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def by_time(intervals: Sequence[tuple[str, float, float]], most: int = SHOWN) -> list[dict[str, Any]]:
    """Return the names that take most, with their time in microseconds and how often they ran."""
    totals: dict[str, list[float]] = {}
    for name, begin, end in intervals:
        totals.setdefault(name, []).append(end - begin)
    ranked = sorted(totals.items(), key=lambda entry: -sum(entry[1]))[:most]
    return [{"name": name, "us": sum(times), "calls": len(times)} for name, times in ranked]


def _span(intervals: Sequence[tuple[str, float, float]]) -> float:
    return max(end for *_, end in intervals) - min(begin for _, begin, _ in intervals)


def _sentence(context: int, found: dict[str, Any]) -> str:
    top = ", ".join(f"{entry['name']} {entry['us']:.0f} us in {entry['calls']}" for entry in found["by_time"][:4])
    return (
        f"a step at {context} takes {found['step_us']:.0f} us; profiled, {found['kernels']} kernels take "
        f"{found['kernel_us']:.0f} us and the gaps between them {found['gap_us']:.0f} us; it has to move "
        f"{found['least_bytes'] / 1e6:.1f} MB; most time in {top}"
    )
