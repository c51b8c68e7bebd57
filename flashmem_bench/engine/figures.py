"""A measured ratio, the bound that it is held against, and the verdict.

A bound is stated for one device, one model and one context; measured anywhere else a figure is shown without a
verdict. Where the 95 % interval holds the bound the verdict is "cannot tell".
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from flashmem_bench.stats import Interval

MET, MISSED, OPEN, NONE = "met", "missed", "cannot tell", "no bound"


@dataclass(frozen=True)
class Bound:
    """What a figure is held against, "at most" or "at least" a value."""

    relation: Literal["at most", "at least"]
    value: float

    def judge(self, low: float | None, high: float | None) -> str:
        """Return the verdict on an interval; without both of its ends there is none."""
        if low is None or high is None:
            return OPEN
        ends = (low, high)
        good = [end <= self.value if self.relation == "at most" else end >= self.value for end in ends]
        return MET if all(good) else OPEN if any(good) else MISSED

    def __str__(self) -> str:
        return f"{self.relation} {self.value:.3f}"


@dataclass(frozen=True)
class Figure:
    """One number of a check.

    Attributes:
        name: What is divided by what.
        estimate: The number; a geometric mean of ratios where there were pairs.
        low: Lower end of its 95 % interval; None where it is a count and not a timing.
        high: Upper end.
        pairs: Pairs of runs behind it.
        context: Prompt length, tokens; None where prompts are of mixed lengths.
        expected: What is computed without measuring, a floor for example.
        bound: What the figure is held against here; None where no bound is stated.
        note: What a reader has to know.
        counted: It is a count, such as bytes, and needs no interval.
    """

    name: str
    estimate: float
    low: float | None = None
    high: float | None = None
    pairs: int = 1
    context: int | None = None
    expected: float | None = None
    bound: Bound | None = None
    note: str = ""
    counted: bool = False

    @classmethod
    def of(cls, name: str, interval: Interval, pairs: int, **more: Any) -> Figure:
        """Make a figure of an estimate with its interval; undefined ends are left out."""
        ends = [float(end) if math.isfinite(end) else None for end in (interval.low, interval.high)]
        return cls(name, float(interval.estimate), ends[0], ends[1], pairs, **more)

    @property
    def verdict(self) -> str:
        """Met, missed, cannot tell, or no bound."""
        if self.bound is None:
            return NONE
        # One pair of timings has no interval, and says nothing about a bound.
        ends = (self.estimate,) * 2 if self.counted else (self.low, self.high)
        return self.bound.judge(*ends)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        found = asdict(self) | {"bound": str(self.bound) if self.bound else None, "verdict": self.verdict}
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in found.items()}  # fmt: skip


@dataclass
class Outcome:
    """What a check found.

    Attributes:
        check: Its name.
        figures: Its numbers; none where the gate did not hold.
        gate: What was held equal before anything was timed.
        correct: Whether that held.
        skipped: Why the check did not run; None where it did.
        notes: Sentences for the reader.
        details: Everything else, as JSON values.
    """

    check: str
    figures: list[Figure] = field(default_factory=list)
    gate: str = ""
    correct: bool = True
    skipped: str | None = None
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def holds(self, *gates: Any) -> bool:
        """Write down what was held equal, and return whether all of it was; without that no figure stays."""
        self.gate = "; ".join([*([self.gate] if self.gate else []), *map(str, gates)])
        self.correct = self.correct and all(gate.holds for gate in gates)
        if not self.correct:
            self.figures.clear()
        return self.correct

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "check": self.check,
            "figures": [figure.plain() for figure in self.figures],
            **{name: getattr(self, name) for name in ("gate", "correct", "skipped", "notes", "details")},
        }
