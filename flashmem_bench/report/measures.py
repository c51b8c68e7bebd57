"""What is measured of one group of samples: score, outcomes, cost, phases.

Each function takes sample rows and returns a part of a table row. A mean runs over the rows that have the
value; a value that no row has is null. Nothing here knows of cells or compares anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flashmem_bench import stats

Record = dict[str, Any]

OVERHEAD = ("monitor_ms", "consolidate_ms", "inject_ms")


def score_block(rows: Sequence[Record]) -> Record:
    """Count and mean score with its interval; null without a valid score."""
    valid = [row for row in rows if row.get("score") is not None and row.get("score_valid") is not False]
    scores = [row["score"] for row in valid]
    interval, kind = stats.score_interval(scores, clusters(valid))
    return {
        "n": len(rows),
        "n_scored": len(scores),
        "score": interval.estimate if scores else None,
        "score_low": interval.low if scores else None,
        "score_high": interval.high if scores else None,
        "score_interval": kind if scores else None,
    }


def use_block(rows: Sequence[Record]) -> Record:
    """Rates of bad outcomes and what the method did."""
    counted = [row for row in rows if row.get("triggers") is not None and row.get("output_tokens") is not None]
    rate = stats.ratio_of_sums([row["triggers"] for row in counted], [1 + row["output_tokens"] for row in counted])
    return {
        "no_answer_rate": mean([row.get("parse_status") == "no_answer" for row in rows]),
        "truncated_rate": mean(values(rows, "truncated")),
        "error_rate": mean([row.get("error") is not None for row in rows]),
        "triggers_mean": mean(values(rows, "triggers")),
        "latents_mean": mean(values(rows, "latent_tokens")),
        "trigger_rate": rate.estimate,
        "trigger_rate_low": rate.low,
        "trigger_rate_high": rate.high,
        "above_tau_rate": mean(values(rows, "above_tau_rate")),
        "threshold": mean(values(rows, "threshold")),
    }


def cost_block(rows: Sequence[Record]) -> Record:
    """Time per token with and without prefill, and per sample, with intervals."""
    block: Record = {}
    for name, column in (("ms_per_token", "e2e_ms"), ("decode_ms_per_token", "decode_ms")):
        timed = [row for row in rows if row.get(column) is not None and row.get("output_tokens")]
        interval = stats.ratio_of_sums(values(timed, column), values(timed, "output_tokens"))
        block |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
    median = stats.median_interval(values(rows, "e2e_ms"))
    return block | {"e2e_ms_median": median.estimate, "e2e_ms_low": median.low, "e2e_ms_high": median.high}


def phase_block(rows: Sequence[Record], clocked: Sequence[Record]) -> Record:
    """Where the time went, tails of its distribution, and peak memory.

    Args:
        rows: all samples.
        clocked: those whose times count.
    """
    timed = [row for row in clocked if row.get("e2e_ms") is not None and row.get("prefill_ms") is not None]
    overhead = sum(row.get(name) or 0 for row in timed for name in OVERHEAD)
    after_prefill = sum(row["e2e_ms"] - row["prefill_ms"] for row in timed)
    harness = sum(values(timed, "harness_ms"))
    wall = sum(row["e2e_ms"] for row in timed) + harness
    plain = [row["e2e_ms"] - row["prefill_ms"] - sum(row.get(name) or 0 for name in OVERHEAD) for row in timed]
    return {
        "trigger_precision": mean(values(rows, "trigger_precision")),
        "trigger_recall": mean(values(rows, "trigger_recall")),
        "prompt_tokens_mean": mean(values(rows, "prompt_tokens")),
        "output_tokens_mean": mean(values(rows, "output_tokens")),
        "positions_encoded_mean": mean(values(rows, "positions_encoded")),
        "reused_share": reused_share(rows),
        "e2e_ms_p95": stats.percentile(values(clocked, "e2e_ms"), 95),
        "e2e_ms_p99": stats.percentile(values(clocked, "e2e_ms"), 99),
        "ttft_ms_median": stats.percentile(values(clocked, "ttft_ms"), 50),
        "tpot_ms_median": stats.percentile(values(clocked, "tpot_ms"), 50),
        "prefill_ms_mean": mean(values(timed, "prefill_ms")),
        "plain_ms_mean": mean(plain),
        **{f"{name}_mean": mean(values(timed, name)) for name in OVERHEAD},
        "overhead_share": overhead / after_prefill if after_prefill > 0 else None,
        "harness_share": harness / wall if wall > 0 else None,
        "peak_alloc_bytes": max(values(rows, "peak_alloc_bytes"), default=None),
    }


def reused_share(rows: Sequence[Record]) -> float | None:
    """Share of the positions of sessions that a kept history spared; null where no sample belongs to one."""
    asked = [row for row in rows if row.get("session_id") is not None and row.get("positions_encoded") is not None]
    reused = sum(row["positions_reused"] for row in asked)
    return reused / (reused + sum(row["positions_encoded"] for row in asked)) if asked else None


def clusters(rows: Sequence[Record]) -> list[Any]:
    """A label for each row: equal ones share a document; a row without one stands alone."""
    return [row.get("cluster") or number for number, row in enumerate(rows)]


def values(rows: Iterable[Record], name: str) -> list[Any]:
    """The values of a column that are not null."""
    return [row[name] for row in rows if row.get(name) is not None]


def mean(numbers: Sequence[Any]) -> float | None:
    """Arithmetic mean, null of nothing."""
    return sum(numbers) / len(numbers) if numbers else None
