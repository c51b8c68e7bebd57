"""Runs of one method that differ in the training seed of its memory alone: how much of a score is luck of training.

Two spreads are kept apart. The *within-run* standard error says how far a run's mean would move with other samples;
the *between-seed* standard deviation how far it moves with another training seed on the same samples. An interval
for the method as a whole draws seeds and samples together, so both are in it. With three seeds it is a lower bound
on the doubt that training adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flashmem_bench import stats
from flashmem_bench.report.arms import alike
from flashmem_bench.report.cells import VANILLA, Cell, partner, refusal
from flashmem_bench.report.measures import clusters


def seed_records(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One record for each method of a suite that was run with several training seeds, on the samples all runs share."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if cell.is_main and cell.train_seed is not None:
            groups.setdefault(alike(cell), []).append(cell)
    found = [_record(peers, cells) for peers in groups.values() if len({_seed(peer) for peer in peers}) > 1]
    return [record for record in found if record]


def _seed(cell: Cell) -> int:
    return int(cell.train_seed or 0)


def _record(peers: Sequence[Cell], cells: Sequence[Cell]) -> dict[str, Any]:
    runs = {_seed(peer): peer for peer in peers}
    first = peers[0]
    base = partner(first, VANILLA, cells)
    against = [*runs.values(), *([base] if base is not None and refusal(first, base) is None else [])]
    shared = [name for name in first.by_sample if all(_score(cell, name) is not None for cell in against)]
    if len(shared) < 2:
        return {}
    scores = np.array([[_score(cell, name) for name in shared] for cell in runs.values()], dtype=float)
    plain = np.array([_score(base, name) for name in shared], dtype=float) if base in against else None
    together = clusters([first.by_sample[name] for name in shared])
    whole = stats.seeds_and_samples(scores, together)
    gain = stats.seeds_and_samples(scores - plain, together) if plain is not None else stats.NOTHING
    return {
        "suite": first.suite,
        "method": first.method,
        "model": first.rows[0].get("model"),
        "checkpoint_scope": first.rows[0].get("checkpoint_scope"),
        "train_seeds": ",".join(str(seed) for seed in sorted(runs)),
        "n": len(shared),
        "seed_scores": ",".join(f"{mean:.4f}" for _, mean in sorted(zip(runs, scores.mean(1), strict=True))),
        "score": whole.estimate,
        "score_low": whole.low,
        "score_high": whole.high,
        "within_run_se": float(np.sqrt(np.mean([_standard_error(run, together) ** 2 for run in scores]))),
        "between_seed_sd": float(scores.mean(1).std(ddof=1)),
        "delta_vanilla": gain.estimate,
        "delta_low": gain.low,
        "delta_high": gain.high,
    }


def _standard_error(scores: np.ndarray, together: Sequence[Any]) -> float:
    if stats.share_clusters(together):
        return stats.clustered_standard_error(scores, together)
    return float(scores.std(ddof=1) / np.sqrt(len(scores)))


def _score(cell: Cell, name: str) -> float | None:
    row = cell.by_sample.get(name)
    return None if row is None else row.get("score")
