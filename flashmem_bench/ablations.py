"""The ablation axes that need no training, as one table of data.

An axis is a setting and a row of values; each value is one cell of the method, and the cell that equals the method's
default is the reference. Cells are ordinary cells: one that exists already, from `run` or from another axis, is not
run again, it only gets the mark of the axis in its description.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashmem_bench.errors import UnknownNameError, UsageError
from flashmem_bench.settings import check_value

DEFAULT_LIMIT = 100
# In nats no entropy comes near this (it is that of 485 million equal choices), so a larger number is a percentile.
_NO_ENTROPY = 20.0


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        name: Public name.
        summary: One line for `flashmem-bench list ablations`.
        key: The setting that it varies.
        values: Default values, as text.
        reference: The value that the others are compared with.
        percentiles: `p85`, `85%` and 85 stand for a percentile of the calibrated entropies, a number below 20 for nats.
        also: Settings of every point, the reference included, without which the axis would have no effect.
    """

    name: str
    summary: str
    key: str
    values: tuple[str, ...]
    reference: str
    percentiles: bool = False
    also: Mapping[str, Any] = field(default_factory=dict)


AXES: tuple[Axis, ...] = (
    Axis(
        "monitor-threshold",
        "tau, as a percentile of the calibrated entropies (p85) or in nats (1.25)",
        "trigger.threshold",
        ("p50", "p60", "p70", "p75", "p80", "p85", "p90", "p95", "p99"),
        "p85",
        percentiles=True,
    ),
    Axis(
        "trigger-interval",
        "n of a memory every n text tokens, without a cooldown",
        "trigger.interval",
        ("8", "16", "32", "64", "128"),
        "32",
        # The cooldown of 32 would turn every shorter interval into 32.
        also={"trigger.cooldown": 0},
    ),
    Axis("cooldown", "text tokens without a memory after one", "trigger.cooldown", ("0", "8", "16", "32", "64"), "32"),
    Axis(
        "max-injections", "memories a sample at most", "trigger.max_injections", ("1", "2", "4", "8", "16", "none"), "8"
    ),
    Axis("sink-tokens", "first tokens left out of the entropy", "monitor.sinks", ("0", "1", "2", "4", "8"), "4"),
    Axis("sampling-logits", "logits after the injection or before it", "sampling.logits", ("post", "pre"), "post"),
)

# Axes whose setting the default method does not read are shown on the method that does.
DEFAULT_METHOD = {"trigger-interval": "flashmem-fixed-trigger"}


@dataclass(frozen=True)
class Point:
    """One value of an axis: its text, the settings that make it, and whether it is the reference."""

    text: str
    settings: dict[str, Any]
    reference: bool


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
