"""Clocks that time one generation by phase.

The decode loop of the library tells a clock when a phase begins and ends and when a sampled token is known on the
host. Three clocks understand that: `HostClock` for a CPU, `CudaEventClock` for a GPU, `FakeClock` for tests. A clock
does not decide what is timed and never changes an answer.

Definitions, per generation, in milliseconds. t0 is set by `start()`, with the ids ready and the device idle.
`prefill_ms` is the phase "prefill". `ttft_ms` is t0 to the first sampled token on the host, `e2e_ms` t0 to the last
one. `decode_ms` = e2e_ms - prefill_ms. `tpot_ms` = (e2e_ms - ttft_ms) / (n - 1), null for n < 2, n being the text
tokens with the final EOS. `itl_ms` are the n - 1 gaps between tokens. `step_ms`,
`sample_ms`, `monitor_ms`, `consolidate_ms`, `inject_ms` are the summed phases of these names. Phases may be nested (the
monitor lies inside prefill, step and inject); each accumulates its own total, so totals of nested phases overlap.

In a batch all rows share one clock: its times are those of the batch, n is the longest answer of the batch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PHASES = ("prefill", "step", "monitor", "consolidate", "inject", "sample")
_EVENT_PAIRS = 4096


@dataclass(frozen=True)
class Timing:
    """Times of one generation in milliseconds; see the module for the formulas."""

    prefill_ms: float
    ttft_ms: float | None
    decode_ms: float | None
    e2e_ms: float | None
    tpot_ms: float | None
    sample_ms: float
    monitor_ms: float
    consolidate_ms: float
    inject_ms: float
    step_ms: float = 0.0
    itl_ms: tuple[float, ...] = ()

    @property
    def unaccounted_share(self) -> float | None:
        """Part of e2e that lies in no phase; the monitor lies inside others."""
        if not self.e2e_ms:
            return None
        known = self.prefill_ms + self.step_ms + self.sample_ms + self.consolidate_ms + self.inject_ms
        return 1 - known / self.e2e_ms

    @property
    def overhead_share(self) -> float | None:
        """(monitor + consolidate + inject) / (e2e - prefill); null where nothing was decoded."""
        if not self.decode_ms or self.decode_ms <= 0:
            return None
        return (self.monitor_ms + self.consolidate_ms + self.inject_ms) / self.decode_ms


class _HostPhase:
    """Context manager of one phase; re-entered for every occurrence, so the decode loop allocates nothing."""

    def __init__(self, now: Callable[[], int]):
        self._now, self.total_ns = now, 0
        self._starts: list[int] = []

    def __enter__(self) -> _HostPhase:
        self._starts.append(self._now())
        return self

    def __exit__(self, *exc: object) -> None:
        self.total_ns += self._now() - self._starts.pop()


class HostClock:
    """Times with the host's `perf_counter_ns`.

    Args:
        synchronise: Called before t0 so that the device is idle; needed where kernels run asynchronously.
        now: The time source in nanoseconds.
    """

    def __init__(self, synchronise: Callable[[], None] | None = None, now: Callable[[], int] = time.perf_counter_ns):
        self._now, self._synchronise = now, synchronise
        self._phases: dict[str, _HostPhase] = {}
        self._seen: list[int] = []
        self._t0 = now()

    def start(self) -> None:
        """Forget earlier times and set t0."""
        self._phases = {name: _HostPhase(self._now) for name in PHASES}
        self._seen = []
        if self._synchronise:
            self._synchronise()
        self._t0 = self._now()

    def phase(self, name: str) -> Any:
        """Return the context manager that adds to phase `name`."""
        if name not in self._phases:
            self._phases[name] = _HostPhase(self._now)
        return self._phases[name]

    def token(self) -> None:
        """Note that a sampled token is known on the host now."""
        self._seen.append(self._now())

    def phase_ms(self, name: str) -> float:
        """Return the summed time of a phase; read it only when the generation has ended."""
        phase = self._phases.get(name)
        return phase.total_ns / 1e6 if phase else 0.0

    def result(self, output_tokens: int) -> Timing:
        """Return the times of the generation that ended, for `output_tokens` text tokens with EOS."""
        prefill = self.phase_ms("prefill")
        ttft = (self._seen[0] - self._t0) / 1e6 if self._seen else None
        e2e = (self._seen[-1] - self._t0) / 1e6 if self._seen else None
        decode = None if e2e is None else e2e - prefill
        tpot = (
            (e2e - ttft) / (output_tokens - 1) if e2e is not None and ttft is not None and output_tokens > 1 else None
        )
        return Timing(
            prefill_ms=prefill,
            ttft_ms=ttft,
            decode_ms=decode,
            e2e_ms=e2e,
            tpot_ms=tpot,
            sample_ms=self.phase_ms("sample"),
            monitor_ms=self.phase_ms("monitor"),
            consolidate_ms=self.phase_ms("consolidate"),
            inject_ms=self.phase_ms("inject"),
            step_ms=self.phase_ms("step"),
            itl_ms=tuple((b - a) / 1e6 for a, b in itertools.pairwise(self._seen)),
        )


class FakeClock(HostClock):
    """A clock for tests: time stands still except for what `costs` and `advance` say.

    Args:
        costs: Milliseconds that leaving a phase takes, by phase name.
    """

    def __init__(self, costs: dict[str, float] | None = None):
        self.time_ns, self.costs = 0, costs or {}
        super().__init__(now=lambda: self.time_ns)

    def advance(self, milliseconds: float) -> None:
        """Let time pass."""
        self.time_ns += round(milliseconds * 1e6)

    def phase(self, name: str) -> Any:
        """Return a phase that takes its cost when it is left."""
        return _FakePhase(self, super().phase(name), self.costs.get(name, 0.0))


class _FakePhase:
    def __init__(self, clock: FakeClock, phase: _HostPhase, cost: float):
        self._clock, self._phase, self._cost = clock, phase, cost

    def __enter__(self) -> _FakePhase:
        self._phase.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._clock.advance(self._cost)
        self._phase.__exit__(*exc)


class _EventPhase:
    """Records a pair of events around each occurrence; nothing is read before the generation has ended."""

    def __init__(self, clock: CudaEventClock):
        self._clock = clock
        self._open: list[tuple[Any, Any]] = []
        self.pairs: list[tuple[Any, Any]] = []

    def __enter__(self) -> _EventPhase:
        pair = self._clock.take_pair()
        pair[0].record()
        self._open.append(pair)
        return self

    def __exit__(self, *exc: object) -> None:
        pair = self._open.pop()
        pair[1].record()
        self.pairs.append(pair)


class CudaEventClock(HostClock):
    """Times phases with CUDA events on the current stream, and tokens with the host, which sees them after a copy.

    The events come from a pool that exists before t0; should a generation need more, the pool grows and
    `pool_misses` counts it. One synchronise when the first phase is read, none in the loop.

    Args:
        pairs: Event pairs allocated beforehand.
    """

    def __init__(self, pairs: int = _EVENT_PAIRS):
        import torch

        self._cuda = torch.cuda
        self._pool = [self._new_pair() for _ in range(pairs)]
        self._taken, self.pool_misses, self._read = 0, 0, False
        super().__init__(synchronise=torch.cuda.synchronize)

    def _new_pair(self) -> tuple[Any, Any]:
        return self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)

    def take_pair(self) -> tuple[Any, Any]:
        """Return the next free pair of events."""
        if self._taken == len(self._pool):
            self.pool_misses += 1
            self._pool.append(self._new_pair())
        self._taken += 1
        return self._pool[self._taken - 1]

    def start(self) -> None:
        """Forget earlier times, return every event to the pool, and set t0 on an idle device."""
        self._taken, self._read = 0, False
        super().start()
        self._phases = {name: _EventPhase(self) for name in PHASES}  # type: ignore[misc]

    def phase(self, name: str) -> Any:
        """Return the context manager that adds to phase `name`."""
        if name not in self._phases:
            self._phases[name] = _EventPhase(self)  # type: ignore[assignment]
        return self._phases[name]

    def phase_ms(self, name: str) -> float:
        """Return the summed device time of a phase."""
        if not self._read:
            self._cuda.synchronize()
            self._read = True
        phase = self._phases.get(name)
        return float(sum(start.elapsed_time(end) for start, end in phase.pairs)) if phase else 0.0  # type: ignore[attr-defined]


def clock_for(device_type: str) -> HostClock:
    """Return the clock that suits a torch device type."""
    if device_type == "cuda":
        return CudaEventClock()
    if device_type == "cpu":
        return HostClock()
    import torch

    synchronise = getattr(torch, device_type).synchronize

    def now() -> int:
        synchronise()
        return time.perf_counter_ns()

    return HostClock(now=now)
