"""The claims, answered: each for every suite that has the cells, *supported*, *not supported* or *cannot tell*.

A verdict needs its interval and, where scores decide, its p-value after Holm's adjustment over all claims of the
report. What is missing is named. Tests of "no worse" ask first whether the rival is worth being compared with (assay
sensitivity): a memory that does nothing is as good as another that does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flashmem_bench import stats
from flashmem_bench.claims import Claim, load_claims
from flashmem_bench.report import wording as say
from flashmem_bench.report.arms import Arm, Difference, arm_against, arms_of, difference, valid_score
from flashmem_bench.report.cells import VANILLA, Cell, refusal
from flashmem_bench.report.entropy_falls import fall
from flashmem_bench.report.measures import Record

SUPPORTED, NOT_SUPPORTED, CANNOT_TELL = "supported", "not supported", "cannot tell"
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Answer:
    """What a claim's test found on one suite."""

    verdict: str
    why: str
    b: str | None = None
    interval: stats.Interval = stats.NOTHING
    n: int | None = None
    seeds: int | None = None
    p_value: float | None = None
    where: Mapping[str, Any] = field(default_factory=dict)


def claim_records(
    cells: Sequence[Cell],
    latency: Sequence[Record] = (),
    margins: Mapping[str, float] | None = None,
    at: str | None = None,
) -> list[Record]:
    """One record for each claim and suite; every claim has at least one.

    Args:
        cells: the cells.
        latency: rows of the latency protocol.
        margins: those that the results folder was begun with, by claim.
        at: when it fixed them.
    """
    suites = list(dict.fromkeys(cell.suite for cell in cells))
    asked: list[tuple[Claim, str | None, Answer]] = []
    for stated in load_claims():
        claim = replace(stated, margin=(margins or {}).get(stated.id, stated.margin))
        if claim.test == "faster":
            asked += [(claim, None, answer) for answer in _faster(claim, latency)]
        else:
            asked += [(claim, suite, _answer(claim, suite, cells)) for suite in suites]
    return _settled(asked, at)


def _answer(claim: Claim, suite: str, cells: Sequence[Cell]) -> Answer:
    found = arms_of(cells, suite, claim.a)
    if not found:
        return Answer(CANNOT_TELL, f"no run of {claim.a}")
    tests = {"better": _better, "no-worse": _no_worse, "falls": _falls, "no-harm": _no_harm}
    # Of runs under several conditions the one that has its rivals beside it.
    whole = (arm for arm in found if all(arm_against(arm, cells, method) is not None for method in claim.b))
    return tests[claim.test](claim, next(whole, found[0]), cells)


def _better(claim: Claim, arm: Arm, cells: Sequence[Cell]) -> Answer:
    """Better than every b; the least favourable one is shown."""
    answers = [_better_than(claim, arm, method, cells) for method in claim.b]
    ranks = {NOT_SUPPORTED: 0, CANNOT_TELL: 1, SUPPORTED: 2}
    worst = min(answers, key=lambda answer: (ranks[answer.verdict], _or(answer.interval.low, -math.inf)))
    known = [answer.p_value for answer in answers if answer.p_value is not None]
    others = "; ".join(f"{answer.b} {_points(answer.interval)}" for answer in answers if answer is not worst)
    p_value = max(known) if len(known) == len(answers) else None
    return replace(worst, p_value=p_value, why=f"{worst.why}; {others}" if others else worst.why)


def _better_than(claim: Claim, arm: Arm, method: str, cells: Sequence[Cell]) -> Answer:
    found = _against(arm, method, cells)
    if isinstance(found, str):
        return Answer(CANNOT_TELL, found, method)
    interval = found.interval
    if interval.low > 0:
        verdict, why = SUPPORTED, "higher"
    elif interval.high < claim.margin:
        verdict, why = NOT_SUPPORTED, "worse" if interval.high < 0 else f"at most {say.share(claim.margin)} higher"
    else:
        verdict, why = CANNOT_TELL, "the interval holds 0"
    return Answer(verdict, f"{_scores(found)}: {why}", method, interval, found.n, found.seeds, found.p_value)


def _no_worse(claim: Claim, arm: Arm, cells: Sequence[Cell]) -> Answer:
    if claim.axis is not None:
        return _no_worse_point(claim, arm, cells)
    (method,) = claim.b
    rival = arm_against(arm, cells, method)
    found = _against(arm, method, cells)
    if rival is None or isinstance(found, str):
        return Answer(CANNOT_TELL, f"no run of {method} to compare with" if rival is None else str(found), method)
    return _within_margin(claim, arm, found, method, _assay(claim, rival, cells))


def _within_margin(claim: Claim, arm: Arm, found: Difference, method: str, doubt: str | None) -> Answer:
    """The verdict of a non-inferiority test whose rival may be in doubt."""
    interval = found.interval
    if doubt is not None:
        verdict, why = CANNOT_TELL, doubt
    elif interval.low > -claim.margin:
        verdict, why = SUPPORTED, f"no more than {say.share(claim.margin)} lower"
    elif interval.high < 0:
        verdict, why = NOT_SUPPORTED, "lower"
    else:
        verdict, why = CANNOT_TELL, f"the interval reaches below {say.points(-claim.margin)}"
    return Answer(verdict, f"{_scores(found)}: {why}", method, interval, found.n, found.seeds, found.p_value)


def _assay(claim: Claim, rival: Arm, cells: Sequence[Cell]) -> str | None:
    """Why being no worse than a rival would mean nothing here; None where it means something."""
    name = rival.first.method
    for place, method in enumerate(claim.assay):
        found = _against(rival, method, cells)
        if isinstance(found, str):
            return f"whether {name} does anything is open: {found}"
        if found.interval.low <= 0:
            return f"{name} has no effect here: {_points(found.interval)} against {method}"
        if place == 0 and claim.margin > found.interval.estimate / 2:
            return f"the margin is more than half of what {name} gains, {_points(found.interval)} against {method}"
    return None


def _no_worse_point(claim: Claim, arm: Arm, cells: Sequence[Cell]) -> Answer:
    """The reference point of an axis against its best other point."""
    marked = [cell for cell in cells if cell.suite == arm.first.suite and _marks(cell, claim)]
    reference = next((cell for cell in marked if _marks(cell, claim)[0].get("reference")), None)
    points = {
        _marks(cell, claim)[0]["value"]: cell
        for cell in marked
        if reference is not None and cell is not reference and refusal(reference, cell) is None
    }
    others = {
        value: found
        for value, cell in points.items()
        if reference is not None and (found := difference(_alone(reference), _alone(cell))) is not None
    }
    if reference is None or not others:
        return Answer(CANNOT_TELL, f"no ablation {claim.axis} on this suite")
    value = min(others, key=lambda key: others[key].interval.low)
    doubt = _assay(claim, _alone(points[value]), cells)
    answer = _within_margin(claim, _alone(reference), others[value], f"{claim.axis} {value}", doubt)
    return replace(answer, why=f"best other value of {len(others)}: {answer.why}")


def _marks(cell: Cell, claim: Claim) -> list[Record]:
    return [mark for mark in cell.ablation if mark["axis"] == claim.axis]


def _alone(cell: Cell) -> Arm:
    return Arm({cell.train_seed: cell})


def _falls(claim: Claim, arm: Arm, cells: Sequence[Cell]) -> Answer:
    (method,) = claim.b
    watch = arm_against(arm, cells, method)
    if watch is None:
        return Answer(CANNOT_TELL, f"no run of {method}, which shows what plain steps do", method)
    found = fall(arm.first, watch.first)
    if found is None:
        return Answer(CANNOT_TELL, "no sample has both a memory and a plain step that the rule selects", method)
    beside = [(name, other) for name in claim.beside if (other := arm_against(arm, cells, name)) is not None]
    shown = [
        f"{name} {say.interval(*x.interval)}" for name, o in beside if (x := fall(o.first, watch.first)) is not None
    ]
    verdict = SUPPORTED if found.interval.low > 0 else NOT_SUPPORTED if found.interval.high <= 0 else CANNOT_TELL
    why = f"falls by {say.number(found.memory)} nats after a memory, by {say.number(found.plain)} after plain steps"
    return Answer(verdict, "; ".join([why, *shown]), method, found.interval, found.n, None)


def _no_harm(claim: Claim, arm: Arm, cells: Sequence[Cell]) -> Answer:
    base = arm_against(arm, cells, VANILLA)
    if base is None:
        return Answer(CANNOT_TELL, "no run of vanilla", VANILLA)
    pairs = [
        (base.first.by_sample[name], run.by_sample[name])
        for run in arm.runs.values()
        for name in run.by_sample
        if name in base.first.by_sample
    ]
    worth = [(plain, row) for plain, row in pairs if (valid_score(plain) or 0) > 0 and valid_score(row) is not None]
    if not worth:
        return Answer(CANNOT_TELL, "plain decoding has no sample right", VANILLA)
    interval = _share_lost(worth)
    verdict = _below(interval, claim.margin)
    broken = sum(row["score"] < plain["score"] for plain, row in worth)
    moved = [row["first_kl_nats"] for _, row in worth if row.get("first_kl_nats") is not None]
    kl = f"; the first memory moves the next token by {say.number(sum(moved) / len(moved))} nats there" if moved else ""
    why = f"{broken} of {len(worth)} answers that had a score have a lower one{kl}"
    return Answer(verdict, why, VANILLA, interval, len({row["sample_id"] for _, row in worth}), arm.seeds)


def _share_lost(pairs: Sequence[tuple[Record, Record]]) -> stats.Interval:
    """The share of the plain score that is lost, nothing set off against it by what is gained elsewhere."""
    plain = [float(before["score"]) for before, _ in pairs]
    lost = [max(0.0, before["score"] - row["score"]) for before, row in pairs]
    if {*plain, *lost} <= {0.0, 1.0}:
        # A sample that several training seeds answered is one sample.
        return stats.score_interval(lost, [row.get("cluster") or row["sample_id"] for _, row in pairs])[0]
    return stats.ratio_of_sums(lost, plain)


def _below(interval: stats.Interval, margin: float) -> str:
    if interval.high <= margin:
        return SUPPORTED
    return NOT_SUPPORTED if interval.low > margin else CANNOT_TELL


def _faster(claim: Claim, latency: Sequence[Record]) -> list[Answer]:
    """One answer for each backbone and device that was timed."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in latency:
        if row.get("context") == claim.context and row["method"] in (claim.a, *claim.b):
            groups.setdefault((row["model"], row["device"], row["dtype"], row["exec"]), []).append(row)
    answers = [_faster_there(claim, rows) for rows in groups.values() if len({row["method"] for row in rows}) == 2]
    return answers or [Answer(CANNOT_TELL, f"not timed at {claim.context:,} tokens", claim.b[0])]


def _faster_there(claim: Claim, rows: Sequence[Record]) -> Answer:
    (method,) = claim.b
    ours = {row["run"]: row["e2e_ms"] for row in rows if row["method"] == claim.a}
    theirs = {row["run"]: row["e2e_ms"] for row in rows if row["method"] == method}
    runs = [run for run in ours if run in theirs]
    interval = stats.geometric_mean_ratio([theirs[run] for run in runs], [ours[run] for run in runs])
    where = {"model": rows[0]["model"], "device": rows[0]["device"]}
    ratio = claim.ratio or 1.0
    if rows[0]["device"] == "cpu":
        verdict, why = CANNOT_TELL, "CPU timing says nothing of a GPU"
    elif interval.low >= ratio:
        verdict, why = SUPPORTED, f"at least {say.times(ratio)}"
    elif interval.high < ratio:
        verdict, why = NOT_SUPPORTED, f"less than {say.times(ratio)}"
    else:
        verdict, why = CANNOT_TELL, f"the interval holds {say.times(ratio)}"
    return Answer(verdict, f"prefill included: {why}", method, interval, len(runs), None, where=where)


def _against(arm: Arm, method: str, cells: Sequence[Cell]) -> Difference | str:
    """How an arm differs from a method's; a sentence where that cannot be said."""
    other = arm_against(arm, cells, method)
    if other is None:
        return f"no run of {method} to compare with"
    return difference(arm, other) or f"{method} has no scored sample in common"


def _settled(asked: Sequence[tuple[Claim, str | None, Answer]], at: str | None) -> list[Record]:
    """Records, with the p-values of all claims that scores decide adjusted together."""
    raw = [math.nan if answer.p_value is None else answer.p_value for _, _, answer in asked]
    records = []
    for (claim, suite, answer), p_adjusted in zip(asked, stats.holm(raw), strict=True):
        verdict, why = answer.verdict, answer.why
        if verdict == SUPPORTED and claim.test == "better" and not p_adjusted < _SIGNIFICANT:
            verdict, why = CANNOT_TELL, f"{why}; p = {say.p_value(p_adjusted)} after adjustment"
        records.append(
            {
                "id": claim.id,
                "claim": claim.says,
                "source": claim.source,
                "test": claim.test,
                "suite": suite,
                **answer.where,
                "a": claim.a,
                "b": answer.b,
                "verdict": verdict,
                **{key: _known(value) for key, value in answer.interval._asdict().items()},
                "n": answer.n,
                "seeds": answer.seeds,
                "margin": claim.margin if claim.test in ("no-worse", "no-harm", "better") else None,
                "margin_fixed_at": at,
                "p_value": answer.p_value,
                "p_adjusted": _known(p_adjusted),
                "why": why,
            }
        )
    return records


def _scores(found: Difference) -> str:
    return f"{100 * found.a:.1f} against {100 * found.b:.1f} %"


def _points(interval: stats.Interval) -> str:
    return say.points(*interval)


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
