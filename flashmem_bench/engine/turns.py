"""Contestants in turns, and the ratio of every pair of runs.

A pass takes every contestant over every item, in turns (A B B A ...), and adds up what each took: one pass is one
pair. Warm-up passes come first and are thrown away, no garbage is collected while the clock runs, and the device is
idle before a contestant begins. A check goes on until the 95 % interval of every watched ratio is narrower than the
tolerance to either side, for at least `runs` and at most `most_runs` passes, or until the time is up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashmem_bench.latency.interleave import quiet_collector
from flashmem_bench.stats import Interval, geometric_mean_ratio

if TYPE_CHECKING:
    from flashmem_bench.latency.interleave import Stop

# Takes an item, gives what it took of each measure: seconds, tokens, ...
Contestant = Callable[[Any], Mapping[str, float]]
WARM_PASSES = 2


@dataclass(frozen=True)
class Ratio:
    """A measure of one contestant over the same measure of another.

    Attributes:
        above: Whose measure is divided.
        below: By whose.
        measure: What, such as seconds.
        per: Another measure that each is divided by first, such as seconds for a rate.
    """

    above: str
    below: str
    measure: str
    per: str | None = None


@dataclass
class Turns:
    """The passes of one interleaved run.

    Attributes:
        totals: By contestant, what each pass took of each measure.
        order: The contestants of the first pass, in the order in which they ran.
        stopped: Why it was enough.
    """

    totals: dict[str, list[dict[str, float]]]
    order: list[str] = field(default_factory=list)
    stopped: str = ""

    @property
    def pairs(self) -> int:
        """Passes."""
        return min(len(passes) for passes in self.totals.values())

    def of(self, name: str, measure: str, per: str | None = None) -> list[float]:
        """What each pass of a contestant took of a measure, as a rate where it is asked for."""
        return [total[measure] / (total[per] if per else 1.0) for total in self.totals[name]]

    def ratio(self, wanted: Ratio) -> Interval:
        """The geometric mean of the ratio over passes, with its 95 % interval."""
        above, below = (self.of(name, wanted.measure, wanted.per) for name in (wanted.above, wanted.below))
        return geometric_mean_ratio(above, below, resamples=2000)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {"passes": self.totals, "first_order": self.order, "stopped": self.stopped}


def take_turns(
    contestants: Mapping[str, Contestant],
    watched: Sequence[Ratio],
    stop: Stop,
    items: Sequence[Any] = (None,),
    warm: int = WARM_PASSES,
) -> Turns:
    """Let contestants take turns until the watched ratios are known.

    Args:
        contestants: By name; each settles the device itself before and after what it times.
        watched: Ratios that decide when it is enough.
        stop: When it is enough.
        items: What a pass goes over; everybody takes every item.
        warm: Passes that do not count.
    """
    turns = Turns({name: [] for name in contestants})
    names = list(contestants)
    with quiet_collector():
        for _ in range(warm):
            _one_pass(contestants, names, items, [])
        for number in range(stop.most_runs):
            order = names if number % 2 == 0 else names[::-1]
            for name, total in _one_pass(contestants, order, items, turns.order if number == 0 else []).items():
                turns.totals[name].append(total)
            turns.stopped = _enough(turns, watched, stop)
            if turns.stopped:
                break
    turns.stopped = turns.stopped or f"{stop.most_runs} passes"
    return turns


def _one_pass(
    contestants: Mapping[str, Contestant], order: Sequence[str], items: Sequence[Any], taken: list[str]
) -> dict[str, dict[str, float]]:
    totals: dict[str, dict[str, float]] = {name: {} for name in order}
    for place, item in enumerate(items):
        for name in order if place % 2 == 0 else list(order)[::-1]:
            taken.append(name)
            for measure, value in contestants[name](item).items():
                totals[name][measure] = totals[name].get(measure, 0.0) + float(value)
    return totals


def _enough(turns: Turns, watched: Sequence[Ratio], stop: Stop) -> str:
    """Why it is enough; empty while it is not."""
    if stop.late:
        return f"time was up after {turns.pairs} passes"
    if turns.pairs < stop.runs:
        return ""
    found = [turns.ratio(ratio) for ratio in watched]
    widths = [(interval.high - interval.low) / 2 / interval.estimate for interval in found]
    if widths and max(widths) <= stop.tolerance:
        return f"every ratio is known within {stop.tolerance:.1%} after {turns.pairs} passes"
    return ""
