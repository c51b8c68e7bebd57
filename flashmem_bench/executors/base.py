"""What the runner asks of whoever answers samples.

The runner owns the results folder: it opens cells, counts attempts and stores rows. An executor owns the backbone: it
finds what a cell needs, answers its samples and yields finished rows, in any order. Between the two pass only plain
values, so that an executor may be this process, several of this machine, or a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flashmem_bench.answers import Finished
from flashmem_bench.interrupts import Stop
from flashmem_bench.prepare import CellPlan, Reference


def joined(summaries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return what several workers say of one cell; where they differ, all that they say."""
    told: dict[str, list[Any]] = {}
    for summary in summaries:
        for key, value in summary.items():
            told.setdefault(key, []).extend([value] if value is not None else [])
    return {key: "; ".join(dict.fromkeys(map(str, values))) or None for key, values in told.items()}


def unheard(indices: Sequence[int], warming: bool) -> None:
    """Nobody is told which samples begin."""


@dataclass(frozen=True)
class Work:
    """The samples of a cell that are still missing.

    Attributes:
        plan: The cell.
        batches: Indices of samples, in the suite's order; those of one batch go through `generate` together.
        wanted: The indices among them whose rows are missing.
        stop: Whether the user asked to stop; those under way are finished then.
        began: Told the indices of samples that are begun together, and whether that is only to warm up. One that is
            begun anew is told again.
    """

    plan: CellPlan
    batches: list[list[int]]
    wanted: frozenset[int]
    stop: Stop
    began: Callable[[Sequence[int], bool], None] = unheard


class Executor(Protocol):
    """Answers the samples of cells.

    Attributes:
        name: What the manifest calls it.
        workers: How many processes answer.
    """

    name: str
    workers: int

    def plan(self, suite: str, method: str, reference: Reference | None, note: Callable[[str], None]) -> CellPlan:
        """Find what a method needs on a suite and name the cell; see `prepare.prepare` for what it raises."""
        ...

    def environment(self) -> dict[str, Any]:
        """Return what the timings of an attempt depend on."""
        ...

    def answers(self, work: Work, note: Callable[[str], None]) -> Generator[Finished]:
        """Build what answers, and return an iterator that yields each sample when it is done.

        Raises:
            FlashMemError: The method cannot be built; nothing has begun then.
        """
        ...

    def summary(self) -> dict[str, Any]:
        """Return what the summary of the cell answered last should say of the way in which that was done."""
        ...

    def close(self) -> None:
        """Let go of what was started."""
        ...
