"""Can the times of this machine be trusted? The harness measured with itself: what `doctor --timing` prints.

Three questions. Do the phases of a run add up to the whole? Does observing change what is observed: by count, the calls
of the clock in a run done again with nothing between them, and by whole runs with and without a clock? And is a method
as fast as itself: its runs are dealt to two names in turns, as the runs of two methods would be, and the 95 % interval
of the ratio has to hold 1, nearly always. A machine on which it does not gives intervals that are too narrow for what
else runs there.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmem_bench.clock import clock_for
from flashmem_bench.latency.interleave import observer_times, quiet_collector
from flashmem_bench.latency.timing import INCONSISTENT, Run, generate_once, timed_run
from flashmem_bench.stats import Interval, geometric_mean_ratio

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem_bench.clock import HostClock
    from flashmem_bench.latency.arms import Arm
    from flashmem_bench.latency.protocol import Protocol

REPEATS, RUNS = 20, 6
# Of 20 intervals at 95 %, fewer than 17 hold the truth in less than two of a hundred campaigns.
_LEAST_COVERED = 0.85
# A run that the system interrupts between two phases is not the harness's fault.
_LEAST_CONSISTENT = 0.95
_OBSERVER_RUNS, _OBSERVER_LIMIT, _REPLAYS = 20, 0.03, 9


@dataclass(frozen=True)
class SelfCheck:
    """What the harness found about itself with one method.

    Attributes:
        method: Its name.
        context: Prompt length, tokens.
        gaps: Share of each run that lay in no phase.
        clock_share: Share of a run that its calls of the clock take by themselves.
        observer: Time with the clock over time without it.
        ratios: The method against itself, one interval for each interleaved run of the comparison.
    """

    method: str
    context: int
    gaps: Sequence[float]
    clock_share: float
    observer: Interval
    ratios: Sequence[Interval]

    @property
    def covered(self) -> int:
        """Intervals that hold 1."""
        return sum(not ratio.excludes(1.0) for ratio in self.ratios)

    def findings(self) -> Iterator[tuple[str, bool]]:
        """Sentences, and whether each is as it has to be."""
        inside = sum(gap <= INCONSISTENT for gap in self.gaps)
        yield (
            f"phases add up within {INCONSISTENT:.0%} in {inside} of {len(self.gaps)} runs "
            f"(median {statistics.median(self.gaps):.2%}, largest {max(self.gaps):.2%})",
            inside >= _LEAST_CONSISTENT * len(self.gaps),
        )
        text = "{:+.2%} [{:+.2%}, {:+.2%}]".format(*(value - 1 for value in self.observer))
        # Whole runs differ by more than the clock costs; they can only show that it costs too much.
        fine = self.clock_share < _OBSERVER_LIMIT and not self.observer.low - 1 > _OBSERVER_LIMIT
        yield f"the clock's own calls take {self.clock_share:.2%} of a run; with and without it: {text}", fine
        wide = max((ratio.high - ratio.low) / 2 / ratio.estimate for ratio in self.ratios)
        share = self.covered / len(self.ratios)
        yield (
            f"against itself: {self.covered} of {len(self.ratios)} intervals hold 1 (half width {wide:.1%} at most)",
            share >= _LEAST_COVERED,
        )

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "method": self.method,
            "context": self.context,
            "gaps": list(self.gaps),
            "clock_share": self.clock_share,
            "observer": list(self.observer),
            "ratios": [list(ratio) for ratio in self.ratios],
            "covered": self.covered,
            "findings": [{"found": text, "ok": ok} for text, ok in self.findings()],
        }


def check_harness(
    backbone: Backbone,
    arm: Arm,
    protocol: Protocol,
    context: int,
    *,
    repeats: int = REPEATS,
    runs: int = RUNS,
    seed: int = 0,
) -> SelfCheck:
    """Measure the harness with one method.

    Args:
        backbone: The model.
        arm: The method.
        protocol: What a run does.
        context: Prompt length, tokens.
        repeats: Interleaved runs of the comparison with itself.
        runs: Timed runs of each of the two names.
        seed: Of the random prompt.
    """
    chance = random.Random(f"{seed}|{context}")
    prompt = [chance.randrange(len(backbone.tokenizer)) for _ in range(context)]
    clock = clock_for(backbone.device.type)
    with quiet_collector():
        for _ in range(2):
            timed_run(backbone, arm, protocol, prompt, clock)
        pairs = [_in_turns(lambda: timed_run(backbone, arm, protocol, prompt, clock), runs) for _ in range(repeats)]
        observer = geometric_mean_ratio(*observer_times(backbone, arm, protocol, prompt, clock, _OBSERVER_RUNS))
    runs_of_all = [run for a, b in pairs for run in (*a, *b)]
    share = _calls_alone(backbone, arm, protocol, prompt, clock) / statistics.median(map(_whole, runs_of_all))
    gaps = [abs(run.timing.unaccounted_share or 0.0) for run in runs_of_all]
    ratios = [geometric_mean_ratio([_whole(run) for run in a], [_whole(run) for run in b]) for a, b in pairs]
    return SelfCheck(arm.name, context, gaps, share, observer, ratios)


class _Counter:
    """Counts the calls of a clock and times nothing."""

    def __init__(self) -> None:
        self.phases, self.tokens = 0, 0

    def phase(self, name: str) -> Any:
        """See `flashmem.generation.Clock`."""
        self.phases += 1
        return nullcontext()

    def token(self) -> None:
        """See `flashmem.generation.Clock`."""
        self.tokens += 1

    def begin(self, samples: Sequence[int]) -> None:
        """See `flashmem.generation.Clock`."""

    def end(self, sample: int) -> None:
        """See `flashmem.generation.Clock`."""

    def paused(self) -> Any:
        """See `flashmem.generation.Clock`."""
        return nullcontext()


def _calls_alone(backbone: Backbone, arm: Arm, protocol: Protocol, prompt: list[int], clock: HostClock) -> float:
    """Milliseconds that the clock's calls of one run take with nothing between them."""
    counter = _Counter()
    generate_once(backbone, arm, protocol, prompt, counter)
    times = []
    for _ in range(_REPLAYS):
        clock.start()
        begun = time.perf_counter()
        for _ in range(counter.phases):
            with clock.phase("step"):
                pass
        for _ in range(counter.tokens):
            clock.token()
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


def _in_turns(timed: Any, runs: int) -> tuple[list[Run], list[Run]]:
    """Runs dealt to two names as `measure_context` deals them: A B B A ..."""
    first: list[Run] = []
    second: list[Run] = []
    for number in range(runs):
        for name in (first, second) if number % 2 == 0 else (second, first):
            name.append(timed())
    return first, second


def _whole(run: Run) -> float:
    return run.timing.e2e_ms or 0.0
