"""Does an entropy know when help is due? Ranking of decision steps, without any memory.

The plain backbone answers greedily. Every decision step of its answers is a *moment* at which a memory could be
written, and a suite can say at which of them help is due: before a value that needs two links (`hops-list`), or
anywhere in a sample of a stratum that the backbone cannot solve (`hops`). A signal that knows it ranks those moments
above the others. Compared are the attention entropy of every full-attention layer, the entropy of the next-token
distribution, and chance.

Two numbers say how well a signal ranks. AUROC is the probability that a moment where help is due has the higher
value (0.5 is chance, below it the ranking is reversed). Precision at the same count takes as many of the highest
moments as there are moments where help is due, so precision equals recall, and random moments reach the base rate.
Intervals are bootstrapped over samples, since the moments of one sample are not independent.

Where one looks decides, so each contrast names the kind of position that it ranks:

* `all`: every decision step;
* `prompt-end`: the first decision of an answer;
* `value`: just before a value that follows its echoed key;
* `later`: every decision but the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.stats import Interval, ranking_intervals

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem_bench.session import Session
    from flashmem_bench.tasks import Sample, Suite

OUTPUT, RANDOM = "output-entropy", "random"
ALL, PROMPT_END, VALUE, LATER = "all", "prompt-end", "value", "later"
COLUMNS = (
    "suite", "model", "signal", "layer", "monitored", "positions", "due", "other", "samples", "mean_due_nats",
    "mean_other_nats", "auroc", "auroc_low", "auroc_high", "precision_at_count", "precision_low", "precision_high",
    "base_rate",
)  # fmt: skip
_BATCH = 16


@dataclass(frozen=True)
class Step:
    """One decision step: which sample, the kind of its position, and whether help is due there."""

    sample: int
    kind: str
    due: bool


@dataclass
class Moments:
    """All decision steps of a suite with the value that each signal has there (nats).

    Attributes:
        steps: the steps, sample after sample.
        signals: one value a step, by signal; attention entropy is named `layer<i>`.
        monitored: the signal that the backbone's monitor uses.
    """

    steps: list[Step]
    signals: dict[str, np.ndarray]
    monitored: str


def kind_of(written: str, first: bool) -> str:
    """Kind of the decision that follows `written`, the answer so far."""
    line = written.rsplit("\n", 1)[-1]
    if line.rstrip().endswith(":"):
        return VALUE
    return PROMPT_END if first else LATER


def is_due(suite: Suite, sample: Sample, written: str) -> bool:
    """Whether the suite says that help is due after `written`.

    With marked moments: the line so far is one of them. Otherwise: the sample belongs to a stratum at chance.
    """
    if sample.moments:
        return written.rsplit("\n", 1)[-1].strip() in {moment.strip() for moment in sample.moments}
    return sample.stratum in suite.strata.get("chance", ())


def check_suite(suite: Suite) -> None:
    """Raise UsageError for a suite that cannot say where help is due."""
    if not suite.strata.get("chance") and not suite.samples("test")[0].moments:
        raise UsageError(
            f"{suite.name} marks no moments and names no stratum at chance (metadata.flashmem.strata), so nobody knows "
            "where help is due; use hops-list or hops"
        )


def collect(session: Session, suite: Suite, limit: int | None, on_done: Callable[[int, int], None]) -> Moments:
    """Answer the first `limit` test samples plainly and read every signal at every decision step."""
    backbone = session.backbone
    layers = [i for i, kind in enumerate(backbone.layer_types) if kind == "full_attention"]
    every = suite.samples("test")
    samples = [every[index] for index in range(min(limit or len(every), len(every)))]
    steps: list[Step] = []
    signals: dict[str, list[float]] = {f"layer{layer}": [] for layer in layers} | {OUTPUT: []}
    for start in range(0, len(samples), _BATCH):
        batch = samples[start : start + _BATCH]
        prompts = [backbone.encode_chat(sample.prompt) for sample in batch]
        answers = _answers(session, suite, prompts)
        for place, (sample, answer) in enumerate(zip(batch, answers, strict=True)):
            steps += _steps(backbone, suite, sample, start + place, answer.token_ids)
            signals[OUTPUT] += answer.output_entropies[: len(answer.token_ids)]
        for layer in layers:
            signals[f"layer{layer}"] += _layer_entropies(backbone, layer, prompts, [a.token_ids for a in answers])
        on_done(min(start + _BATCH, len(samples)), len(samples))
    chance = np.random.default_rng(session.request.seed).random(len(steps))
    values = {name: np.asarray(series) for name, series in signals.items()} | {RANDOM: chance}
    return Moments(steps, values, f"layer{backbone.monitor_layer}")


def _answers(session: Session, suite: Suite, prompts: list[list[int]]) -> list[Any]:
    from transformers import GenerationConfig

    from flashmem.generation import generate
    from flashmem_bench.session import generation_arguments
    from flashmem_bench.settings import Settings

    arguments = generation_arguments(session.backbone, suite, Settings())
    greedy = GenerationConfig(**{**arguments, "do_sample": False, "temperature": None, "top_p": None})
    return generate(session.backbone, prompts, generation_config=greedy, trace=True)


def _steps(backbone: Backbone, suite: Suite, sample: Sample, number: int, tokens: Sequence[int]) -> Iterator[Step]:
    for count in range(len(tokens)):
        written = backbone.decode(list(tokens[:count]))
        yield Step(number, kind_of(written, count == 0), is_due(suite, sample, written))


def _layer_entropies(backbone: Backbone, layer: int, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """Attention entropy of one layer before each answer token, all rows one after the other."""
    from flashmem.training import target_entropies

    before = backbone.monitor
    backbone.monitor = replace(before, layer=layer)
    try:
        rows = target_entropies(backbone, prompts, [list(tokens) for tokens in answers])
    finally:
        backbone.monitor = before
    return [value for row in rows for value in row]


def contrasts(moments: Moments, marked: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The kinds of positions that are ranked, each with the places of its steps."""
    kinds = np.array([step.kind for step in moments.steps])
    yield ALL, np.arange(len(kinds))
    if marked:
        yield VALUE, np.flatnonzero(kinds == VALUE)
        return
    yield PROMPT_END, np.flatnonzero(kinds == PROMPT_END)
    yield LATER, np.flatnonzero(kinds == LATER)


def rank(moments: Moments, suite: str, model: str, *, marked: bool, seed: int = 0) -> list[dict[str, Any]]:
    """One record a signal and contrast, with the columns of `COLUMNS`.

    Raises:
        BenchError: no step where help is due, or none where it is not.
    """
    due = np.array([step.due for step in moments.steps])
    groups = np.array([step.sample for step in moments.steps])
    records = []
    for positions, places in contrasts(moments, marked):
        if not 0 < due[places].sum() < len(places):
            if positions == ALL:
                raise BenchError(f"{suite}: help is due at every decision step or at none; take more samples")
            continue
        for name, values in moments.signals.items():
            record = _record(values[places], due[places], groups[places], seed)
            layer = int(name[5:]) if name.startswith("layer") else None
            records.append({
                "suite": suite, "model": model, "signal": "attention-entropy" if layer is not None else name,
                "layer": layer, "monitored": name == moments.monitored, "positions": positions, **record,
            })  # fmt: skip
    return records


def _record(values: np.ndarray, due: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, Any]:
    area, found = ranking_intervals(values, due, groups, seed=seed)
    return {
        "due": int(due.sum()),
        "other": int((~due).sum()),
        "samples": len(np.unique(groups)),
        "mean_due_nats": float(values[due].mean()),
        "mean_other_nats": float(values[~due].mean()),
        **_interval("auroc", "auroc", area),
        **_interval("precision_at_count", "precision", found),
        "base_rate": float(due.mean()),
    }


def _interval(name: str, stem: str, interval: Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{stem}_low": interval.low, f"{stem}_high": interval.high}


def label(record: Mapping[str, Any]) -> str:
    """How a signal is named in tables and figures."""
    if record["signal"] != "attention-entropy":
        return str(record["signal"]).replace("-", " ")
    return f"attention, layer {record['layer']}{' (monitor)' if record['monitored'] else ''}"
