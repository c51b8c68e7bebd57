"""Methods in turns, until their ratios are known well enough.

Methods alternate (A B C C B A ...), so that a drift of the machine's speed falls on all of them; a ratio is taken run
by run. A context is measured until the 95 % interval of every ratio is narrower than the tolerance to either side, at
least `runs` and at most `most_runs` times, or until the time is up; which of the three it was is told.

Warm-up runs come first, until the last three medians of the gaps between tokens agree or half a minute, shared by the
methods, is over. Inside the timed region are the
prefill and the decode loop of the library, outside are tokenising and everything of the harness.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flashmem_bench.clock import HostClock, clock_for
from flashmem_bench.errors import UsageError
from flashmem_bench.floor import Floor, Shape, decode_floor
from flashmem_bench.latency.arms import Arm
from flashmem_bench.latency.machine import snapshot
from flashmem_bench.latency.protocol import Protocol
from flashmem_bench.latency.timing import Run, generate_once, row_of, timed_run
from flashmem_bench.stats import Interval, geometric_mean_ratio

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem_bench.ceilings import Ceilings

LEAST_RUNS = 5
_WARM_RUNS, _WARM_SECONDS, _STEADY = 2, 30.0, 0.02
_OBSERVER_RUNS, _OBSERVER_SECONDS = 5, 30.0


@dataclass(frozen=True)
class Stop:
    """When a context has been measured enough.

    Attributes:
        runs: Timed runs of each method at least.
        most_runs: And at most.
        tolerance: Half width of the 95 % interval of every ratio, as a share of the ratio.
        deadline: `time.monotonic` at which no new run begins; None is never.
    """

    runs: int = 5
    most_runs: int = 30
    tolerance: float = 0.02
    deadline: float | None = None

    def __post_init__(self) -> None:
        if self.runs < LEAST_RUNS:
            raise UsageError(f"--runs must be {LEAST_RUNS} or more, not {self.runs}: an interval needs that many")
        if self.most_runs < self.runs:
            raise UsageError(f"--most-runs must be at least --runs ({self.runs}), not {self.most_runs}")

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True)
class Comparison:
    """One method against another at one context.

    Attributes:
        a: The method.
        b: What it is compared with.
        decode_ratio: a / b without prefill, geometric mean over runs with its interval. MemGen as released has no
            prefill of its own: it encodes the prompt first with its first memory, inside the decode loop.
        e2e_ratio: a / b with prefill.
        floor: What no engine can go below, for flashmem against vanilla.
    """

    context: int
    runs: int
    a: str
    b: str
    decode_ratio: Interval
    e2e_ratio: Interval
    floor: Floor | None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **{key: getattr(self, key) for key in ("context", "runs", "a", "b")},
            "decode_ratio": list(self.decode_ratio),
            "e2e_ratio": list(self.e2e_ratio),
            "floor": asdict(self.floor) if self.floor else None,
        }


@dataclass(frozen=True)
class Block:
    """What a context gave.

    Attributes:
        rows: One a timed run.
        comparisons: Every method over plain decoding, and the rivals over flashmem.
        record: What belongs to the block as a whole: the machine before and after, warm-up, why it stopped, what
            observing costs.
    """

    rows: list[dict[str, Any]]
    comparisons: list[Comparison]
    record: dict[str, Any]


@dataclass
class Measured:
    """Runs so far, by method."""

    runs: dict[str, list[Run]] = field(default_factory=dict)

    def ratios(self, a: str, b: str) -> tuple[Interval, Interval]:
        """Ratios of the decode times and of the whole times."""
        ours, theirs = ([run.timing for run in self.runs[name]] for name in (a, b))
        found = [
            geometric_mean_ratio(
                [getattr(t, column) for t in ours], [getattr(t, column) for t in theirs], resamples=2000
            )
            for column in ("decode_ms", "e2e_ms")
        ]
        return found[0], found[1]


def measure_context(
    backbone: Backbone,
    make_arms: Callable[[list[int]], Sequence[Arm]],
    context: int,
    protocol: Protocol,
    stop: Stop,
    *,
    seed: int = 0,
    ceilings: Ceilings | None = None,
) -> Block:
    """Measure all methods at one context.

    Args:
        backbone: The model.
        make_arms: Makes the arms for a prompt, on which thresholds may depend.
        context: Prompt length, tokens.
        protocol: What a run does.
        stop: When it is enough.
        seed: Of the random prompt.
        ceilings: What the device can do; None leaves the shares null.

    Raises:
        UsageError: The context does not fit the backbone.
    """
    chance = random.Random(f"{seed}|{context}")
    prompt = [chance.randrange(len(backbone.tokenizer)) for _ in range(context)]
    arms = make_arms(prompt)
    refuse_too_long(backbone, arms, context, protocol)
    clock = clock_for(backbone.device.type)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    before = snapshot(str(backbone.device))
    share = _WARM_SECONDS / len(arms)
    warm = {arm.name: _warm_up(backbone, arm, protocol, prompt, clock, share) for arm in arms}
    measured, rows = Measured({arm.name: [] for arm in arms}), []
    pairs = compared([arm.name for arm in arms])
    with quiet_collector():
        for number in range(stop.most_runs):
            for arm in arms if number % 2 == 0 else list(arms)[::-1]:
                run = timed_run(backbone, arm, protocol, prompt, clock)
                measured.runs[arm.name].append(run)
                rows.append(row_of(backbone, arm, protocol, context, number, run, ceilings))
            reason = _enough(measured, pairs, number + 1, stop)
            if reason:
                break
        observed = {arm.name: observer_times(backbone, arm, protocol, prompt, clock) for arm in arms}
    _fill_peaks(backbone, arms, protocol, prompt, rows)
    found = [_compare(backbone, arms, context, a, b, measured, protocol) for a, b in pairs]
    record = {
        "context": context,
        "started_at": started,
        "seed": seed,
        "stopped": reason or f"{stop.most_runs} runs",
        "warm_up_runs": warm,
        "before": before,
        "after": snapshot(str(backbone.device)),
        "ceilings": asdict(ceilings) if ceilings else None,
        **_about_the_harness(rows, observed),
    }
    return Block(rows, found, record)


def _about_the_harness(
    rows: Sequence[dict[str, Any]], observed: Mapping[str, tuple[list[float], list[float]]]
) -> dict[str, Any]:
    """In which order the methods ran, what observing them cost, and how much of a run lay in no phase."""
    return {
        "order": [row["method"] for row in rows],
        "observer_ratio": {name: list(geometric_mean_ratio(*times)) for name, times in observed.items()},
        "observer_ratio_of_all": list(_pooled(list(observed.values()))),
        "largest_unaccounted_share": max(abs(row["unaccounted_share"]) for row in rows),
    }


def compared(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Everything against plain decoding, and all others against flashmem."""
    plain = [(name, "vanilla") for name in methods if name != "vanilla" and "vanilla" in methods]
    others = [name for name in methods if name not in ("vanilla", "flashmem")]
    return plain + [(name, "flashmem") for name in others if "flashmem" in methods]


def refuse_too_long(backbone: Backbone, arms: Sequence[Arm], context: int, protocol: Protocol) -> None:
    """Refuse a context that leaves no room for the run.

    Raises:
        UsageError: Prompt, text and latents exceed the backbone's positions.
    """
    most = protocol.text_tokens + max((arm.length * _memories(arm) for arm in arms), default=0)
    if context + most > backbone.max_positions:
        raise UsageError(
            f"context {context} and {most} more positions exceed the {backbone.max_positions} of {backbone.name}; "
            "choose a smaller --contexts"
        )


def _memories(arm: Arm) -> int:
    cap = arm.trigger.max_injections if arm.trigger is not None else 0
    return cap if cap is not None else 0


def _warm_up(
    backbone: Backbone, arm: Arm, protocol: Protocol, prompt: list[int], clock: HostClock, seconds: float
) -> int:
    """Run until the last three medians of the gaps between tokens agree, or the time is up; returns how often."""
    medians: list[float] = []
    began = time.monotonic()
    while len(medians) < _WARM_RUNS or (time.monotonic() - began < seconds and not _steady(medians)):
        gaps = timed_run(backbone, arm, protocol, prompt, clock).timing.itl_ms
        medians.append(statistics.median(gaps) if gaps else 0.0)
    return len(medians)


def _steady(medians: Sequence[float]) -> bool:
    last = medians[-3:]
    return len(last) == 3 and max(last) - min(last) <= _STEADY * max(last)


def _enough(measured: Measured, pairs: Sequence[tuple[str, str]], runs: int, stop: Stop) -> str | None:
    """Why it is enough; None while it is not."""
    if stop.late and runs >= 1:
        return f"time was up after {runs} runs"
    if runs < stop.runs or not pairs:
        return None if runs < stop.runs else f"{runs} runs"
    widths = [(r.high - r.low) / 2 / r.estimate for a, b in pairs for r in measured.ratios(a, b)]
    if max(widths) <= stop.tolerance:
        return f"every ratio is known within {stop.tolerance:.0%} after {runs} runs"
    return None


def observer_times(
    backbone: Backbone, arm: Arm, protocol: Protocol, prompt: list[int], clock: HostClock, runs: int = _OBSERVER_RUNS
) -> tuple[list[float], list[float]]:
    """Seconds of whole runs with the clock and without it, in turns: their ratio is what timing itself costs.

    Runs that take long are tried twice at least: the share that a clock costs is the smaller the longer a run takes.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    began = time.monotonic()
    for number in range(runs):
        if number >= 2 and time.monotonic() - began > _OBSERVER_SECONDS:
            break
        for watched in (True, False) if number % 2 == 0 else (False, True):
            _settle(backbone)
            start = time.perf_counter()
            if watched:
                clock.start()
            generate_once(backbone, arm, protocol, prompt, clock if watched else None)
            _settle(backbone)
            times[watched].append(time.perf_counter() - start)
    return times[True], times[False]


def _pooled(observed: Sequence[tuple[list[float], list[float]]]) -> Interval:
    """Of every pair of runs: the largest of many noisy ratios would say nothing but how many there are."""
    return geometric_mean_ratio(
        [second for watched, _ in observed for second in watched], [second for _, plain in observed for second in plain]
    )


def _settle(backbone: Backbone) -> None:
    if backbone.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def _fill_peaks(
    backbone: Backbone, arms: Sequence[Arm], protocol: Protocol, prompt: list[int], rows: Sequence[dict[str, Any]]
) -> None:
    """Peak memory in a run of its own: resetting and reading the counters would cost time in the others."""
    if backbone.device.type != "cuda":
        return
    import torch

    for arm in arms:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        generate_once(backbone, arm, protocol, prompt)
        peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        for row in rows:
            if row["method"] == arm.name:
                row["peak_alloc_bytes"], row["peak_reserved_bytes"] = peaks


def _compare(
    backbone: Backbone, arms: Sequence[Arm], context: int, a: str, b: str, measured: Measured, protocol: Protocol
) -> Comparison:
    memory = next(arm.memory for arm in arms if arm.name == a)
    decode, whole = measured.ratios(a, b)
    floor = None
    if (a, b) == ("flashmem", "vanilla") and memory is not None and protocol.name == "paper":
        floor = decode_floor(
            Shape.of(backbone.config),
            context=context,
            text_tokens=protocol.text_tokens,
            injections=protocol.cycles,
            length=memory.config.length,
            depth=memory.config.depth or backbone.num_layers,
            element_bytes=backbone.dtype.itemsize,
        )
    return Comparison(context, len(measured.runs[a]), a, b, decode, whole, floor)


@contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection inside timed runs."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def by_importance(contexts: Sequence[int], claimed: Sequence[int]) -> list[int]:
    """Contexts in the order in which a short budget should meet them: those that a claim names, then short ones."""
    return sorted(dict.fromkeys(contexts), key=lambda context: (context not in claimed, context))


def entropy_thresholds(
    backbone: Backbone, prompt: list[int], protocol: Protocol, percentiles: Mapping[str, float]
) -> dict[str, float]:
    """Thresholds of the free protocol by kind of trigger, nats: percentiles of the entropies of a plain run."""
    import numpy as np

    from flashmem.generation import generate

    (run,) = generate(backbone, [prompt], generation_config=protocol.generation(), trace=True)
    seen = {"attention-entropy": run.entropies, "output-entropy": run.output_entropies}
    return {kind: float(np.percentile(seen[kind], value)) for kind, value in percentiles.items()}
