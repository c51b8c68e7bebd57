"""Two methods on one suite, compared for a person: scores, samples fixed and broken, time, and "no worse than"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flashmem_bench import stats
from flashmem_bench.errors import BenchError
from flashmem_bench.report.arms import Arm, arms_of, difference, share_memory, valid_score
from flashmem_bench.report.cells import Cell, refusal


def find_pair(cells: Sequence[Cell], suite: str, a: str, b: str) -> tuple[Arm, Arm]:
    """The two arms that a comparison is about: the first that may be compared, else those that stand for the names.

    Args:
        cells: all cells.
        suite: name of the suite.
        a: a method, or the beginning of a cell's id.
        b: the same of the other.

    Raises:
        BenchError: nothing, or more than one cell, goes by one of the names.
    """
    ours, theirs = find_arms(cells, suite, a), find_arms(cells, suite, b)
    pairs = ((one, other) for one in ours for other in theirs if refusal(one.first, other.first) is None)
    return next(pairs, (ours[0], theirs[0]))


def find_arms(cells: Sequence[Cell], suite: str, name: str) -> list[Arm]:
    """The arms of a method, the one that stands for it first, or the one cell whose id begins so.

    Raises:
        BenchError: nothing, or more than one cell, goes by that name.
    """
    arms = arms_of(cells, suite, name)
    if arms:
        return arms
    found = [cell for cell in cells if cell.suite == suite and cell.cell_id.startswith(name)]
    if len(found) == 1:
        return [Arm({found[0].train_seed: found[0]})]
    if found:
        raise BenchError(f"{len(found)} cells of {suite} begin with {name!r}; give more of the id")
    raise BenchError(
        f"there is no run of {name} on {suite}; make it with flashmem-bench run --suite {suite} --method {name}, "
        "or see flashmem-bench list runs"
    )


def compare_arms(a: Arm, b: Arm, margin: float | None = None, *, unequal: bool = False) -> dict[str, Any]:
    """Everything that a paired comparison tells, as JSON values.

    Args:
        a: the arm whose gain is asked.
        b: the other.
        margin: of a non-inferiority test; None makes none.
        unequal: compare even where conditions differ.

    Raises:
        BenchError: the two may not be compared, or share no scored sample.
    """
    reason = refusal(a.first, b.first)
    if reason is not None and not unequal:
        raise BenchError(
            f"{a.first.method} and {b.first.method} cannot be compared: {reason}; run one of them as the other was, or "
            "compare them all the same with --allow-unequal"
        )
    found = difference(a, b)
    if found is None:
        raise BenchError(f"{a.first.method} and {b.first.method} have no scored sample in common")
    samples = _sample_pairs(a, b)
    pairs = [(run.by_sample[name], other.by_sample[name]) for run, other, name in samples]
    changed = [valid_score(x) - valid_score(y) for x, y in pairs]  # type: ignore[operator]
    clocks = ((run.timed_by_sample.get(name), other.timed_by_sample.get(name)) for run, other, name in samples)
    timed = [(x, y) for x, y in clocks if x is not None and y is not None]
    discordant = sum(change != 0 for change in changed) / len(changed)
    document = {
        "suite": a.first.suite,
        "a": a.first.method,
        "b": b.first.method,
        "cells_a": [cell.cell_id for cell in a.runs.values()],
        "cells_b": [cell.cell_id for cell in b.runs.values()],
        "unequal": reason,
        "n": found.n,
        "seeds_a": a.seeds,
        "seeds_b": b.seeds,
        "score_a": found.a,
        "score_b": found.b,
        "difference": list(found.interval),
        "p_value": found.p_value,
        "fixed": sum(change > 0 for change in changed),
        "broken": sum(change < 0 for change in changed),
        "pairs": len(changed),
        "same_text": sum(_same_text(*sample) for sample in samples),
        "minimum_detectable": stats.minimum_detectable_difference(found.n, discordant) if discordant else None,
        "timed_pairs": len(timed),
        "time_ratio": _ratio(timed, "e2e_ms"),
        "decode_time_ratio": _ratio(timed, "decode_ms"),
        "device": a.first.rows[0].get("device"),
        "batch_size": a.first.rows[0].get("batch_size"),
        "exec": a.first.rows[0].get("exec"),
    }
    if margin is not None:
        needed = stats.samples_for_margin(margin, discordant) if discordant and margin > 0 else None
        document |= {"margin": margin, "no_worse": found.interval.low > -margin, "samples_for_margin": needed}
    return document


def _sample_pairs(a: Arm, b: Arm) -> list[tuple[Cell, Cell, str]]:
    """Scored samples, run by run: by training seed where both have the same memories, else with b's first."""
    twins = share_memory(a, b)
    partners = [(run, b.runs.get(seed) if twins else b.first) for seed, run in a.runs.items()]
    return [
        (run, other, name)
        for run, other in partners
        if other is not None
        for name, row in run.by_sample.items()
        if name in other.by_sample and None not in (valid_score(row), valid_score(other.by_sample[name]))
    ]


def _same_text(run: Cell, other: Cell, name: str) -> bool:
    return run.texts[name]["text"] == other.texts[name]["text"]


def _ratio(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], column: str) -> list[float]:
    timed = [(x[column], y[column]) for x, y in pairs if x.get(column) and y.get(column)]
    return list(stats.geometric_mean_ratio([x for x, _ in timed], [y for _, y in timed], resamples=2000))
