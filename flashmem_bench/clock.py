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

In a batch all rows share one clock. `result` gives the times of the call, for an answer of n tokens; `timing_of` those
of one sample: t0 is when it took its seat, prefill_ms the one prefill that it was in, the other phases are what passed
while it was under way, for the sake of any row. These are latencies under that load, not those of a sample alone.

What the harness does between two steps of a batch, to grade a sample that is finished or to encode the prompt of the
next one, belongs to no sample: while the clock is `paused` it stands still for all of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

    def mark(self) -> int:
        """Where the phase stands, for `between`."""
        return self.total_ns

    def between(self, first: int, last: int) -> float:
        """Milliseconds between two marks."""
        return (last - first) / 1e6

    def __enter__(self) -> _HostPhase:
        self._starts.append(self._now())
        return self

    def __exit__(self, *exc: object) -> None:
        self.total_ns += self._now() - self._starts.pop()


@dataclass
class _Span:
    """One sample of a batch: when it began, and where the phases stood then, at its first token, and at its last."""

    t0: int
    first: int
    begun: dict[str, int]
    prefilled: int | None = None
    last: int | None = None
    ended: dict[str, int] = field(default_factory=dict)


class HostClock:
    """Times with the host's `perf_counter_ns`.

    Args:
        synchronise: Called before t0 so that the device is idle; needed where kernels run asynchronously.
        now: The time source in nanoseconds.
    """

    def __init__(self, synchronise: Callable[[], None] | None = None, now: Callable[[], int] = time.perf_counter_ns):
        self._source, self._synchronise, self._stood_still = now, synchronise, 0
        self._phases: dict[str, _HostPhase] = {}
        self._seen: list[int] = []
        self._spans: dict[int, _Span] = {}
        # Those whose first token is still to come.
        self._fresh: list[_Span] = []
        self._t0 = self._now()

    def _now(self) -> int:
        return self._source() - self._stood_still

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still during the block."""
        before = self._now()
        try:
            yield
        finally:
            self._stood_still += self._now() - before

    def start(self) -> None:
        """Forget earlier times and set t0."""
        self._phases = {name: _HostPhase(self._now) for name in PHASES}
        self._seen, self._spans, self._fresh = [], {}, []
        if self._synchronise:
            self._synchronise()
        self._t0 = self._now()

    def phase(self, name: str) -> Any:
        """Return the context manager that adds to phase `name`."""
        if name not in self._phases:
            self._phases[name] = _HostPhase(self._now)
        return self._phases[name]

    def token(self) -> None:
        """Note that a sampled token of every sample under way is known on the host now."""
        self._seen.append(self._now())
        for span in self._fresh:
            span.prefilled = self._marks()["prefill"]
        self._fresh.clear()

    def begin(self, samples: Sequence[int]) -> None:
        """Note that samples take their seats; the first ones have the t0 of the call."""
        t0 = self._now() if self._spans else self._t0
        for sample in samples:
            self._spans[sample] = _Span(t0, len(self._seen), self._marks())
            self._fresh.append(self._spans[sample])

    def end(self, sample: int) -> None:
        """Note that a sample has its last token."""
        span = self._spans[sample]
        span.last, span.ended = len(self._seen), self._marks()

    def _marks(self) -> dict[str, int]:
        return {name: phase.mark() for name, phase in self._phases.items()}

    def phase_ms(self, name: str) -> float:
        """Return the summed time of a phase; read it only when the generation has ended."""
        phase = self._phases.get(name)
        return phase.total_ns / 1e6 if phase else 0.0

    def result(self, output_tokens: int) -> Timing:
        """Return the times of the generation that ended, for `output_tokens` text tokens with EOS."""
        return _timing(self._t0, self._seen, output_tokens, self.phase_ms)

    def timing_of(self, sample: int, output_tokens: int) -> Timing:
        """Return the times of one sample of the call, which has ended, for `output_tokens` text tokens with EOS."""
        self._settle()
        span = self._spans[sample]

        def spent(name: str) -> float:
            if name not in span.ended:
                return 0.0
            last = span.prefilled if name == "prefill" and span.prefilled is not None else span.ended[name]
            return self._phases[name].between(span.begun.get(name, 0), last)

        return _timing(span.t0, self._seen[span.first : span.last], output_tokens, spent)

    def _settle(self) -> None:
        """Have every time known that was begun."""


def _timing(t0: int, seen: Sequence[int], output_tokens: int, phase_ms: Callable[[str], float]) -> Timing:
    prefill = phase_ms("prefill")
    ttft = (seen[0] - t0) / 1e6 if seen else None
    e2e = (seen[-1] - t0) / 1e6 if seen else None
    decode = None if e2e is None else e2e - prefill
    tpot = (e2e - ttft) / (output_tokens - 1) if e2e is not None and ttft is not None and output_tokens > 1 else None
    return Timing(
        prefill_ms=prefill,
        ttft_ms=ttft,
        decode_ms=decode,
        e2e_ms=e2e,
        tpot_ms=tpot,
        sample_ms=phase_ms("sample"),
        monitor_ms=phase_ms("monitor"),
        consolidate_ms=phase_ms("consolidate"),
        inject_ms=phase_ms("inject"),
        step_ms=phase_ms("step"),
        itl_ms=tuple((b - a) / 1e6 for a, b in itertools.pairwise(seen)),
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
    """Records a pair of events around each occurrence; what was read is kept as sums, and its events are free again."""

    def __init__(self, clock: CudaEventClock):
        self._clock = clock
        self._open: list[tuple[Any, Any]] = []
        self._pairs: list[tuple[Any, Any]] = []
        # Milliseconds up to each occurrence that was read.
        self._sums = [0.0]

    def begin_again(self) -> None:
        """Count what is under way from now on; what it took before was next to nothing."""
        for pair in self._open:
            pair[0].record()

    @property
    def unread(self) -> bool:
        """Whether something was recorded and not read."""
        return bool(self._pairs)

    def mark(self) -> int:
        """Where the phase stands, for `between`."""
        return len(self._sums) - 1 + len(self._pairs)

    def between(self, first: int, last: int) -> float:
        """Milliseconds between two marks; `read` must have been called since."""
        return self._sums[last] - self._sums[first]

    def read(self) -> None:
        """Read what was recorded; the device must have got there."""
        for pair in self._pairs:
            self._sums.append(self._sums[-1] + pair[0].elapsed_time(pair[1]))
            self._clock.give_back(pair)
        self._pairs.clear()

    def __enter__(self) -> _EventPhase:
        pair = self._clock.take_pair()
        pair[0].record()
        self._open.append(pair)
        return self

    def __exit__(self, *exc: object) -> None:
        pair = self._open.pop()
        pair[1].record()
        self._pairs.append(pair)


class CudaEventClock(HostClock):
    """Times phases with CUDA events on the current stream, and tokens with the host, which sees them after a copy.

    The events come from a pool that exists before t0; should a generation need more, the pool grows and
    `pool_misses` counts it. One synchronise when times are read, none in the loop.

    Args:
        pairs: Event pairs allocated beforehand.
    """

    def __init__(self, pairs: int = _EVENT_PAIRS):
        import torch

        self._cuda = torch.cuda
        self._all = [self._new_pair() for _ in range(pairs)]
        self._free = list(self._all)
        self.pool_misses = 0
        super().__init__(synchronise=torch.cuda.synchronize)

    def _new_pair(self) -> tuple[Any, Any]:
        return self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)

    def take_pair(self) -> tuple[Any, Any]:
        """Return a free pair of events."""
        if not self._free:
            self.pool_misses += 1
            self._all.append(self._new_pair())
            return self._all[-1]
        return self._free.pop()

    def give_back(self, pair: tuple[Any, Any]) -> None:
        """Take a pair that was read."""
        self._free.append(pair)

    def start(self) -> None:
        """Forget earlier times, return every event to the pool, and set t0 on an idle device."""
        self._free = list(self._all)
        super().start()
        self._phases = {name: _EventPhase(self) for name in PHASES}  # type: ignore[misc]

    def phase(self, name: str) -> Any:
        """Return the context manager that adds to phase `name`."""
        if name not in self._phases:
            self._phases[name] = _EventPhase(self)  # type: ignore[assignment]
        return self._phases[name]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still during the block; a phase around it begins anew, since events go on."""
        with super().paused():
            yield
        for phase in self._phases.values():
            phase.begin_again()  # type: ignore[attr-defined]

    def phase_ms(self, name: str) -> float:
        """Return the summed device time of a phase."""
        self._settle()
        phase = self._phases.get(name)
        return phase.between(0, phase.mark()) if phase else 0.0

    def _settle(self) -> None:
        phases: list[Any] = [phase for phase in self._phases.values() if phase.unread]  # type: ignore[attr-defined]
        if phases:
            self._cuda.synchronize()
        for phase in phases:
            phase.read()


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
