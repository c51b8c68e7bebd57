"""A method's runs on a suite as one arm: the same settings under several training seeds, on the samples that all have.

Two arms are compared on the samples that all of their runs share. Where both use the same trained memory, as a method
and its placebo do, run is paired with run by training seed; otherwise the seeds of each are drawn on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmem.errors import FlashMemError
from flashmem_bench import stats
from flashmem_bench.registry import get_method
from flashmem_bench.report.cells import Cell, closeness, refusal
from flashmem_bench.report.measures import clusters
from flashmem_bench.settings import resolve

# What a training seed may change about a cell.
_FOLLOWS_THE_SEED = ("memory",)


@dataclass(frozen=True)
class Arm:
    """Runs of one method on one suite that differ in the training seed alone, by that seed."""

    runs: dict[int | None, Cell]

    @property
    def first(self) -> Cell:
        """The run with the lowest seed."""
        return next(iter(self.runs.values()))

    @property
    def seeds(self) -> int | None:
        """How many training seeds; None where nothing was trained."""
        return None if None in self.runs else len(self.runs)


@dataclass(frozen=True)
class Difference:
    """How two arms differ.

    Attributes:
        interval: mean of a - b with its 95 % interval.
        p_value: two-sided.
        n: samples that all runs have.
        a: mean score of a over seeds and samples.
        b: mean score of b.
        seeds: training seeds of a that entered; None where nothing was trained.
    """

    interval: stats.Interval
    p_value: float
    n: int
    a: float
    b: float
    seeds: int | None


def alike(cell: Cell) -> tuple[Any, ...]:
    """What two runs of one arm have in common: everything but the memory that the training seed made."""
    kept = tuple(sorted((k, repr(v)) for k, v in cell.settings.items() if k.split(".")[0] not in _FOLLOWS_THE_SEED))
    return cell.suite, cell.method, cell.scope, cell.condition, kept


def arms_of(cells: Sequence[Cell], suite: str, method: str) -> list[Arm]:
    """The arms of a method on a suite, the one that stands for it first.

    Those come first whose settings are the method's own, then memories of the suite's own, then more seeds, then more
    samples.
    """
    groups: dict[tuple[Any, ...], dict[int | None, Cell]] = {}
    for cell in cells:
        if (cell.suite, cell.method) == (suite, method) and cell.is_main:
            groups.setdefault(alike(cell), {})[cell.train_seed] = cell
    found = [Arm(dict(sorted(runs.items(), key=lambda item: item[0] or 0))) for runs in groups.values()]
    return sorted(found, key=_rank)


def _rank(arm: Arm) -> tuple[int, bool, int, int]:
    return _changed_settings(arm.first), arm.first.scope != "suite", -len(arm.runs), -len(arm.first.rows)


def _changed_settings(cell: Cell) -> int:
    """How many settings are not the method's own; those of a memory come with its checkpoint."""
    try:
        spec = get_method(cell.method)
    except FlashMemError:
        return 0
    own = resolve({}, fixed=spec.fixed, defaults=spec.defaults, method=spec.name).flat()
    there = {
        key.removeprefix("settings."): value for key, value in cell.settings.items() if key.startswith("settings.")
    }
    return sum(value != own[key] for key, value in there.items() if key in own and not key.startswith("memory."))


def arm_against(arm: Arm, cells: Sequence[Cell], method: str) -> Arm | None:
    """The arm of another method that an arm is best compared with, None where none may be."""
    found = [other for other in arms_of(cells, arm.first.suite, method) if refusal(arm.first, other.first) is None]
    return max(found, key=lambda other: closeness(arm.first, other.first), default=None)


def share_memory(a: Arm, b: Arm) -> bool:
    """Whether both use the same trained memories, so that their runs belong together seed by seed."""
    names = {_memory_of(arm.first.method) for arm in (a, b)}
    return len(names) == 1 and None not in names and a.first.scope == b.first.scope


def _memory_of(method: str) -> str | None:
    try:
        return get_method(method).memory_of
    except FlashMemError:
        # Results may come from a plugin that is not installed here.
        return None


def difference(a: Arm, b: Arm, value: Callable[[dict[str, Any]], float | None] | None = None) -> Difference | None:
    """Compare two arms, None where they share no scored sample.

    Args:
        a: the arm whose gain is asked.
        b: the other.
        value: of a row; by default its score where that is valid.
    """
    of = value or valid_score
    paired = share_memory(a, b)
    runs_a, runs_b = list(a.runs.values()), list(b.runs.values())
    if paired:
        seeds = [seed for seed in a.runs if seed in b.runs]
        runs_a, runs_b = [a.runs[seed] for seed in seeds], [b.runs[seed] for seed in seeds]
    if not runs_a or not runs_b:
        return None
    shared = [name for name in runs_a[0].by_sample if all(_has(run, name, of) for run in (*runs_a, *runs_b))]
    if not shared:
        return None
    first, second = _matrix(runs_a, shared, of), _matrix(runs_b, shared, of)
    labels = clusters([runs_a[0].by_sample[name] for name in shared])
    if len(runs_a) == len(runs_b) == 1:
        interval = stats.paired_difference(first[0], second[0], labels)
        p_value = stats.paired_p(first[0], second[0], labels)
    else:
        interval, p_value = stats.seed_difference(first, second, labels, paired=paired)
    seeds_a = None if None in a.runs else len(runs_a)
    return Difference(interval, p_value, len(shared), float(first.mean()), float(second.mean()), seeds_a)


def valid_score(row: dict[str, Any]) -> float | None:
    """The score of a row that counts."""
    return None if row.get("score_valid") is False else row.get("score")


def _has(run: Cell, name: str, of: Callable[[dict[str, Any]], float | None]) -> bool:
    row = run.by_sample.get(name)
    return row is not None and of(row) is not None


def _matrix(
    runs: Sequence[Cell], names: Sequence[str], of: Callable[[dict[str, Any]], float | None]
) -> NDArray[np.float64]:
    """`[r, n]` values."""
    return np.array([[of(run.by_sample[name]) for name in names] for run in runs], dtype=np.float64)
