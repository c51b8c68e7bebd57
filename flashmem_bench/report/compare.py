"""Paired comparisons between cells, and the warnings that belong beside them.

Differences are taken sample by sample on what both cells have; a verdict needs the interval of the difference
and the test to agree, and is otherwise *cannot tell*. Pairs that may not be compared appear among the
warnings instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flashmem_bench import stats
from flashmem_bench.claims import primary_pairs
from flashmem_bench.report import wording as say
from flashmem_bench.report.cells import (
    FLASHMEM,
    PLACEBOS,
    VANILLA,
    Cell,
    partner,
    refusal,
    shared_samples,
    timed_pairs,
)
from flashmem_bench.report.measures import Record, clusters, mean, score_block, use_block

_MANY_TRUNCATED = 0.05
_SIGNIFICANT = 0.05


def comparison_records(cells: Sequence[Cell], *, unequal: bool = False) -> list[Record]:
    """Every headline cell against vanilla, flashmem against its placebos, and every comparison that a claim names.

    Args:
        cells: the cells.
        unequal: pair cells also where prompts, token budget, attention, dtype or other conditions differ; the record
            then says what does.
    """
    records = []
    wanted = primary_pairs()
    for cell in (cell for cell in cells if cell.is_main):
        if cell.method != VANILLA and (base := partner(cell, VANILLA, cells, unequal=unequal)):
            records.append(compare(cell, base, "baseline"))
        rival = (FLASHMEM, cell.method) in wanted and cell.method != VANILLA
        if (rival or cell.method in PLACEBOS) and (subject := partner(cell, FLASHMEM, cells, unequal=unequal)):
            records.append(compare(subject, cell, "placebo" if cell.method in PLACEBOS else "rival"))
    return adjusted(records)


def adjusted(records: Sequence[Record]) -> list[Record]:
    """Records with their p-values adjusted within their family, and the verdict that these allow."""
    families = {"primary": stats.holm, "other": stats.benjamini_hochberg}
    wanted = primary_pairs()
    named = ["primary" if (record["a"], record["b"]) in wanted else "other" for record in records]
    found = [dict(record) for record in records]
    for family, adjust in families.items():
        places = [place for place, name in enumerate(named) if name == family]
        raw = [math.nan if found[place].get("p_value") is None else found[place]["p_value"] for place in places]
        tests = sum(not math.isnan(value) for value in raw)
        for place, value in zip(places, adjust(raw), strict=True):
            known = None if math.isnan(value) else float(value)
            found[place] |= {"family": family, "tests": tests, "p_adjusted": known}
            found[place]["verdict"] = _verdict(found[place])
    return found


def _verdict(record: Record) -> str:
    p_value = record.get("p_adjusted")
    if p_value is None or p_value >= _SIGNIFICANT or record["low"] <= 0 <= record["high"]:
        return "cannot tell"
    return "better" if record["difference"] > 0 else "worse"


def compare(a: Cell, b: Cell, kind: str) -> Record:
    """Paired comparison of two cells on the samples that both have."""
    shared = shared_samples(a, b)
    pairs = [(a.by_sample[name], b.by_sample[name]) for name in shared]
    same = [a.texts.get(name, {}).get("text") == b.texts.get(name, {}).get("text") for name in shared]
    record = {
        "suite": a.suite,
        "kind": kind,
        "a": a.method,
        "b": b.method,
        "cell_a": a.cell_id,
        "cell_b": b.cell_id,
        "n": len(shared),
        "same_text_share": mean(same),
        "unequal": refusal(a, b),
        **_score_difference(pairs),
    }
    both_timed = timed_pairs(a, b)
    record["n_timed"] = len(both_timed)
    for name, column in (("time_ratio", "e2e_ms"), ("decode_time_ratio", "decode_ms")):
        timed = [(x[column], y[column]) for x, y in both_timed if x.get(column) and y.get(column)]
        ratio = stats.geometric_mean_ratio([x for x, _ in timed], [y for _, y in timed], resamples=2_000)
        record |= {name: ratio.estimate, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
    return record


def comparison_warnings(cells: Sequence[Cell]) -> list[str]:
    """What a reader must know before comparing: refused pairs and weak rows, one sentence each."""
    warnings = []
    for suite in sorted({cell.suite for cell in cells}):
        main = [cell for cell in cells if cell.suite == suite and cell.is_main]
        texts = sorted({cell.condition_text for cell in main})
        if len({cell.condition for cell in main}) > 1:
            shown = "; ".join(texts) if len(texts) > 1 else f"{texts[0]}, with different weights"
            warnings.append(
                f"{suite}: cells ran under different conditions and are never compared across them: {shown}."
            )
        warnings += [sentence for cell in main for sentence in _pair_warnings(cell, main)]
        warnings += _grouped(suite, main)
    return warnings


def _grouped(suite: str, main: Sequence[Cell]) -> list[str]:
    """The warnings of single cells, one sentence for all methods that it holds for."""
    methods: dict[str, list[str]] = {}
    for cell in main:
        for sentence in _cell_warnings(cell):
            names = methods.setdefault(sentence, [])
            if cell.method not in names:
                names.append(cell.method)
    everyone = {cell.method for cell in main}
    return [
        f"{suite}, {'every method' if len(names) == len(everyone) > 1 else ', '.join(names)}: {sentence}"
        for sentence, names in methods.items()
    ]


def _pair_warnings(cell: Cell, main: Sequence[Cell]) -> list[str]:
    vanilla = [other for other in main if other.method == VANILLA]
    if cell.method == VANILLA:
        return []
    if not vanilla:
        return [f"{cell.suite}, {cell.method}: no vanilla cell, so there is nothing to compare it with."]
    base = partner(cell, VANILLA, main)
    if base is None:
        return [f"{cell.suite}, {cell.method}: not compared with vanilla ({refusal(cell, vanilla[0])})."]
    shared = len(shared_samples(cell, base))
    if shared < max(len(cell.rows), len(base.rows)):
        return [
            f"{cell.suite}, {cell.method}: {len(cell.rows)} samples against {len(base.rows)} of vanilla; "
            f"differences use the {shared} that both have."
        ]
    return []


def _cell_warnings(cell: Cell) -> list[str]:
    use, score = use_block(cell.rows), score_block(cell.rows)
    attempts = {row.get("attempt") for row in cell.rows}
    found = []
    if cell.stopped:
        found.append(f"the last attempt was stopped; {len(cell.rows)} samples so far.")
    if use["error_rate"]:
        found.append(f"{say.share(use['error_rate'])} of the samples failed and have no score.")
    if (use["truncated_rate"] or 0) > _MANY_TRUNCATED:
        found.append(f"{say.share(use['truncated_rate'])} of the answers were cut at the token budget.")
    late = sum(row.get("parse_status") == "timeout" and row.get("score") is None for row in cell.rows)
    if late:
        found.append(f"{late} of the answers could not be graded in time and have no score.")
    if score["n_scored"] < score["n"] - late and any(row.get("score_valid") is False for row in cell.rows):
        found.append("scores of an untrained memory, or beyond the trained context, are left out.")
    timed, samples = len(cell.timed_rows), len(cell.rows)
    if timed < samples and len(attempts) > 1:
        found.append(
            f"times come from {timed} of {samples} samples, those of attempt {cell.timed_attempt} of {len(attempts)}; "
            "scores from all."
        )
    elif any(row.get("timing_valid") is False for row in cell.rows):
        found.append(f"times come from {timed} of {samples} samples; those of the others do not count.")
    return found


def _score_difference(pairs: Sequence[tuple[Record, Record]]) -> Record:
    valid = [
        (a, b)
        for a, b in pairs
        if None not in (a.get("score"), b.get("score")) and False not in (a.get("score_valid"), b.get("score_valid"))
    ]
    if not valid:
        return {}
    scored, labels = [(a["score"], b["score"]) for a, b in valid], clusters([a for a, _ in valid])
    first, second = [a for a, _ in scored], [b for _, b in scored]
    fixed, broken = sum(a > b for a, b in scored), sum(a < b for a, b in scored)
    p_value = stats.paired_p(first, second, labels)
    interval = stats.paired_difference(first, second, labels)
    return {
        "difference": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "fixed": fixed,
        "broken": broken,
        "p_value": p_value,
    }
