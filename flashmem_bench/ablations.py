"""The ablation axes, as one table of data.

An axis is a setting and a row of values; each value is one cell of the method, and the cell that equals the method's
default is the reference. Where the setting is the method itself, each value is a cell of that method. Cells are
ordinary cells: one that exists already, from `run` or from another axis, is not run again, it only gets the mark of
the axis in its description.

Some axes change the memory itself: every value of these is trained first, on the suite alone, with the same minutes,
batches and seed (`flashmem_bench.ablation_training`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashmem_bench.errors import UnknownNameError, UsageError
from flashmem_bench.registry import get_method
from flashmem_bench.settings import check_value

DEFAULT_LIMIT = 100
# In nats no entropy comes near this (it is that of 485 million equal choices), so a larger number is a percentile.
_NO_ENTROPY = 20.0
METHOD, TRAIN = "method", "train."


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        name: Public name.
        summary: One line for `flashmem-bench list ablations`.
        key: The setting that it varies; `method` and `train.*` are none, and stand for themselves.
        values: Default values, as text.
        reference: The value that the others are compared with.
        tests: What question it answers.
        percentiles: `p85`, `85%` and 85 stand for a percentile of the calibrated entropies, a number below 20 for nats.
        also: Settings of every point, the reference included, without which the axis would have no effect.
        method: Whose cells it varies unless the user names others. Memories are compared at the prompt end, where all
            of them are used whatever the trigger would say.
        trains: Every value needs a memory of its own.
    """

    name: str
    summary: str
    key: str
    values: tuple[str, ...]
    reference: str
    tests: str
    percentiles: bool = False
    also: Mapping[str, Any] = field(default_factory=dict)
    method: str = "flashmem"
    trains: bool = False


_OPEN = "an open choice of the paper"
_PROMPT_END = "flashmem-prompt-end"
# With one block, which is copied from the last layer, its own layer is the last one.
_BLOCKS_FOR_ALL = {"all": "paired", "last": "last"}
_PLACEBOS = ("flashmem-random-memory", "flashmem-shuffled-memory", "flashmem-mean-memory", "flashmem-noop-memory")
_POLICIES = (
    "flashmem",
    "flashmem-random-trigger",
    "flashmem-matched-fixed",
    "flashmem-matched-output",
    "flashmem-output-entropy",
    "flashmem-fixed-trigger",
    "flashmem-no-monitor",
    "flashmem-prompt-end",
    "flashmem-literal",
)

WITHOUT_TRAINING: tuple[Axis, ...] = (
    Axis(
        "monitor-threshold",
        "tau, as a percentile of the calibrated entropies (p85) or in nats (1.25)",
        "trigger.threshold",
        ("p50", "p60", "p70", "p75", "p80", "p85", "p90", "p95", "p99"),
        "p85",
        "whether the paper's percentile matters",
        percentiles=True,
    ),
    Axis(
        "trigger",
        "who decides when; random and matched ones write as many memories as flashmem",
        METHOD,
        _POLICIES,
        "flashmem",
        "whether attention entropy knows the moments",
    ),
    Axis(
        "trigger-interval",
        "n of a memory every n text tokens, without a cooldown",
        "trigger.interval",
        ("8", "16", "32", "64", "128"),
        "32",
        "how often a memory should come when nothing decides",
        # The cooldown of 32 would turn every shorter interval into 32.
        also={"trigger.cooldown": 0},
        method="flashmem-fixed-trigger",
    ),
    Axis(
        "cooldown",
        "text tokens without a memory after one",
        "trigger.cooldown",
        ("0", "8", "16", "32", "64"),
        "32",
        "the operating point: quality against cost",
    ),
    Axis(
        "max-injections",
        "memories a sample at most",
        "trigger.max_injections",
        ("1", "2", "4", "8", "16", "none"),
        "8",
        "the operating point: quality against cost",
    ),
    Axis(
        "memory-source",
        "what is injected: the memory, or a placebo of the same cost",
        METHOD,
        ("flashmem", *_PLACEBOS),
        "flashmem",
        "whether the content does it",
    ),
    Axis("sink-tokens", "first tokens left out of the entropy", "monitor.sinks", ("0", "1", "2", "4", "8"), "4", _OPEN),
    Axis(
        "entropy-normalisation",
        "divide the entropy by the log of the positions",
        "monitor.normalise",
        ("false", "true"),
        "false",
        f"{_OPEN}: raw entropy grows with the context",
    ),
    Axis(
        "sampling-logits",
        "logits after the injection or before it",
        "sampling.logits",
        ("post", "pre"),
        "post",
        "Algorithm 1 read literally",
    ),
    Axis(
        "monitor-layer",
        "layer whose attention is watched, by number; none is the last full one",
        "monitor.layer",
        ("0", "1", "2", "3", "4", "none"),
        "none",
        "the paper's choice of the last layer",
    ),
)

WITH_TRAINING: tuple[Axis, ...] = (
    Axis(
        "encoder",
        "whose keys and values the memory reads",
        METHOD,
        ("flashmem-prompt-end", "flashmem-separate-encoder"),
        "flashmem-prompt-end",
        "what sharing the cache costs in quality",
        also={"trigger.kind": "prompt-end"},
        method=_PROMPT_END,
        trains=True,
    ),
    Axis(
        "memory-length",
        "K, latents a memory",
        "memory.length",
        ("1", "2", "4", "8", "16", "32"),
        "8",
        "the paper's K",
        method=_PROMPT_END,
        trains=True,
    ),
    Axis(
        "consolidator-depth",
        "L, copied layers",
        "memory.depth",
        ("1", "2", "3", "4", "6"),
        "1",
        "the paper's L",
        method=_PROMPT_END,
        trains=True,
    ),
    Axis(
        "kv-layer",
        "whose keys and values are read: one block its own layer's (paired), or a block for every layer its own (all) "
        "or the last one's (last)",
        "memory.kv_layer",
        ("paired", "last", "all"),
        "paired",
        _OPEN,
        method=_PROMPT_END,
        trains=True,
    ),
    Axis(
        "latent-attention",
        "latents see the cache alone, or earlier latents too",
        "memory.latent_attention",
        ("none", "earlier"),
        "none",
        _OPEN,
        method=_PROMPT_END,
        trains=True,
    ),
    Axis(
        "feedback",
        "what the next latent starts from",
        "memory.feedback",
        ("raw", "normed", "embedding"),
        "normed",
        _OPEN,
        method=_PROMPT_END,
        trains=True,
    ),
    Axis(
        "init",
        "blocks copied from the backbone, or random",
        "memory.init",
        ("inherited", "random"),
        "inherited",
        "what the copy gives",
        method=_PROMPT_END,
        trains=True,
    ),
    Axis(
        "output-map",
        "map to input embeddings",
        "memory.output_map",
        ("linear", "gate", "identity"),
        "linear",
        _OPEN,
        method=_PROMPT_END,
        trains=True,
    ),
    Axis(
        "insertion",
        "where memories stand in training",
        "train.insertion",
        ("prompt-end", "mixed", "firing"),
        "prompt-end",
        "whether training must know the moments",
        method=_PROMPT_END,
        trains=True,
    ),
    Axis(
        "training-targets",
        "trained on the data's answers, or on the backbone's own right ones",
        "train.targets",
        ("gold", "self"),
        "gold",
        "memory gain against teacher gain",
        method=_PROMPT_END,
        trains=True,
    ),
)

AXES = (*WITHOUT_TRAINING, *WITH_TRAINING)


@dataclass(frozen=True)
class Point:
    """One value of an axis.

    Attributes:
        text: As it is shown.
        settings: What makes it, as dotted keys.
        reference: Whether the others are compared with it.
        method: The method that it runs, where the axis is one of methods.
        train: What it changes about training, by name.
    """

    text: str
    settings: dict[str, Any]
    reference: bool
    method: str | None = None
    train: dict[str, Any] = field(default_factory=dict)


def get_axis(name: str) -> Axis:
    """Return the axis called `name`.

    Raises:
        UnknownNameError: No such axis; the message has the near misses.
    """
    by_name = {axis.name: axis for axis in AXES}
    if name not in by_name:
        raise UnknownNameError("ablation axis", name, by_name)
    return by_name[name]


def points(axis: Axis, values: Sequence[str] | None = None) -> list[Point]:
    """Return the points of an axis, the reference always among them.

    Raises:
        UsageError: A value that the setting does not take.
    """
    wanted = list(dict.fromkeys(values or axis.values))
    made = [_point(axis, text) for text in wanted]
    reference = _point(axis, axis.reference)
    return made if any(point.reference for point in made) else [reference, *made]


def _point(axis: Axis, text: str) -> Point:
    is_reference = text.lower() == axis.reference
    if axis.key == METHOD:
        return Point(text, dict(axis.also), is_reference, method=get_method(text).name)
    if axis.key.startswith(TRAIN):
        if text not in axis.values:
            raise UsageError(f"a value of {axis.name} is {' or '.join(axis.values)}, not {text!r}")
        return Point(text, dict(axis.also), is_reference, train={axis.key.removeprefix(TRAIN): text})
    if axis.name == "kv-layer" and text in _BLOCKS_FOR_ALL:
        return Point(text, {**axis.also, "memory.kv_layer": _BLOCKS_FOR_ALL[text], "memory.depth": None}, False)
    return _setting_point(axis, text)


def _setting_point(axis: Axis, text: str) -> Point:
    number = _percentile_of(axis, text)
    if number is not None:
        settings, shown = {"trigger.percentile": check_value("trigger.percentile", number)}, f"p{number:g}"
    else:
        settings, shown = {axis.key: check_value(axis.key, text)}, text.lower()
    if axis.percentiles and settings.get(axis.key, 0) is None:
        raise UsageError(f"a value of {axis.name} is a percentile such as p85 or a number of nats, not {text!r}")
    return Point(shown, {**axis.also, **settings}, shown == axis.reference)


def _percentile_of(axis: Axis, text: str) -> float | None:
    """Return the percentile that a value stands for; None for an absolute value."""
    if not axis.percentiles:
        return None
    marked = text[:1].lower() == "p"
    try:
        number = float(text[1:] if marked else text.removesuffix("%"))
    except ValueError:
        raise UsageError(f"a value of {axis.name} is a percentile such as p85 or a number, not {text!r}") from None
    return number if marked or text.endswith("%") or number >= _NO_ENTROPY else None
