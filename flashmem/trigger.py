"""Trigger policies: the moments at which a memory is written.

A policy looks at one row of one decision step and says yes or no. Decisions are taken before every token, the first one
at prompt end (paper Alg. 1). Whatever the policy says passes the same gate: a cooldown in text tokens and a cap on the
injections of a sample, so that policies can be compared at the same cost.

The literal algorithm has neither (`cooldown=0, max_injections=None`). The default, 32 text tokens and 8 injections,
makes the paper's timed schedule of 8 x (32 text tokens + 8 latents) the worst case over 256 tokens.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from flashmem.errors import ConfigError

TriggerKind = Literal[
    "attention-entropy",
    "output-entropy",
    "never",
    "always",
    "every",
    "random",
    "delimiter",
    "prompt-end",
    "schedule",
]
KINDS: tuple[str, ...] = TriggerKind.__args__  # type: ignore[attr-defined]
ENTROPY_KINDS = ("attention-entropy", "output-entropy")
# These write at prompt end whatever the backbone computed there.
PROMPT_END_KINDS = ("always", "every", "delimiter", "prompt-end")
DELIMITERS = (",", ".", "\n")


@dataclass(frozen=True)
class TriggerConfig:
    """When to write a memory.

    Attributes:
        kind: the policy. "attention-entropy" is the paper's; "output-entropy" watches the next-token distribution;
            "every" fires at text tokens 0, n, 2n, ...; "random" at each step with probability `rate`; "delimiter" at
            prompt end and after text that ends in a comma, a full stop or a newline; "schedule" at given text tokens.
        threshold: tau in nats, for the entropy kinds.
        percentile: the percentile of the calibration entropies that `threshold` was taken at (a record).
        interval: n of "every".
        rate: probability a step, for "random".
        cooldown: text tokens that must lie between two injections; 0 is none.
        max_injections: cap a sample; None is none.
        seed: of "random".
        positions: text-token indices of "schedule"; 0 is prompt end.
    """

    kind: TriggerKind = "attention-entropy"
    threshold: float | None = None
    percentile: float = 85.0
    interval: int = 32
    rate: float = 0.05
    cooldown: int = 32
    max_injections: int | None = 8
    seed: int = 0
    positions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"trigger.kind is {self.kind!r}; use one of {', '.join(KINDS)}.")
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ConfigError(f"trigger.threshold is {self.threshold}; it must be a finite number of nats, 0 or more.")
        if not 0 <= self.percentile <= 100:
            raise ConfigError(f"trigger.percentile is {self.percentile}; it must be from 0 to 100.")
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"trigger.rate is {self.rate}; it must be from 0 to 1.")
        if self.interval < 1 or self.cooldown < 0 or (self.max_injections is not None and self.max_injections < 0):
            raise ConfigError("trigger.interval must be 1 or more, cooldown and max_injections 0 or more.")


@dataclass
class RowStep:
    """One row at one decision step, on the host.

    Attributes:
        text_tokens: text tokens emitted so far; 0 at prompt end.
        entropy: attention entropy of the newest position, nats.
        output_entropy: entropy of the next-token distribution, nats; None unless it was asked for.
        text_tail: text of the last token emitted.
    """

    text_tokens: int
    entropy: float
    output_entropy: float | None = None
    text_tail: str = ""


class TriggerPolicy(Protocol):
    """Says whether a row should take a memory now."""

    def fires(self, step: RowStep) -> bool:
        """True to trigger. Called once a step, in order."""
        ...


@dataclass
class EntropyTrigger:
    """H > tau, on attention or on output entropy."""

    threshold: float
    on_output: bool = False

    def fires(self, step: RowStep) -> bool:
        """See `TriggerPolicy.fires`."""
        value = step.output_entropy if self.on_output else step.entropy
        return value is not None and value > self.threshold


@dataclass
class ConstantTrigger:
    """Always or never."""

    answer: bool

    def fires(self, step: RowStep) -> bool:
        """See `TriggerPolicy.fires`."""
        return self.answer


@dataclass
class EveryTrigger:
    """At text tokens 0, n, 2n, ..."""

    interval: int

    def fires(self, step: RowStep) -> bool:
        """See `TriggerPolicy.fires`."""
        return step.text_tokens % self.interval == 0


@dataclass
class RandomTrigger:
    """Each step with the same probability; one stream a sample, so the order of samples does not matter."""

    rate: float
    stream: random.Random

    def fires(self, step: RowStep) -> bool:
        """See `TriggerPolicy.fires`."""
        return self.stream.random() < self.rate


@dataclass
class DelimiterTrigger:
    """At prompt end and after a delimiter, as MemGen's released scripts do."""

    def fires(self, step: RowStep) -> bool:
        """See `TriggerPolicy.fires`."""
        return step.text_tokens == 0 or step.text_tail.rstrip(" ").endswith(DELIMITERS)


@dataclass
class ScheduleTrigger:
    """At given text tokens."""

    positions: frozenset[int]

    def fires(self, step: RowStep) -> bool:
        """See `TriggerPolicy.fires`."""
        return step.text_tokens in self.positions


@dataclass
class Gate:
    """A policy under a cooldown and a cap, for one row.

    Attributes:
        injections: how many this row has taken.
        fired: how often the policy said yes, whatever the gate said.
    """

    policy: TriggerPolicy
    cooldown: int
    max_injections: int | None
    injections: int = 0
    fired: int = 0
    _last: int | None = field(default=None, repr=False)

    def decide(self, step: RowStep, ask: Callable[[], bool] | None = None) -> bool:
        """True when the row takes a memory now; counts it.

        Args:
            step: the row as it is.
            ask: has the last word where policy, cap and cooldown allow a memory; not called elsewhere.
        """
        if not self.policy.fires(step):
            return False
        self.fired += 1
        if self.max_injections is not None and self.injections >= self.max_injections:
            return False
        if self._last is not None and step.text_tokens - self._last < self.cooldown:
            return False
        if ask is not None and not ask():
            return False
        self.injections, self._last = self.injections + 1, step.text_tokens
        return True


def build_gate(config: TriggerConfig, sample_id: str = "") -> Gate:
    """The gated policy of one row.

    Raises:
        ConfigError: an entropy policy without a threshold, or a schedule without positions.
    """
    if config.kind in ENTROPY_KINDS and config.threshold is None:
        raise ConfigError(f"The trigger {config.kind} needs a threshold: calibrate one, or set trigger.threshold.")
    if config.kind == "schedule" and config.positions is None:
        raise ConfigError("The trigger schedule needs positions.")
    policy = _policy(config, sample_id)
    return Gate(policy, config.cooldown, config.max_injections)


def _policy(config: TriggerConfig, sample_id: str) -> TriggerPolicy:
    match config.kind:
        case "attention-entropy" | "output-entropy":
            return EntropyTrigger(float(config.threshold or 0.0), on_output=config.kind == "output-entropy")
        case "every":
            return EveryTrigger(config.interval)
        case "random":
            digest = hashlib.sha256(f"{config.seed}|{sample_id}".encode()).digest()
            return RandomTrigger(config.rate, random.Random(int.from_bytes(digest[:8], "big")))
        case "delimiter":
            return DelimiterTrigger()
        case "schedule":
            return ScheduleTrigger(frozenset(config.positions or ()))
        case "prompt-end":
            return ScheduleTrigger(frozenset({0}))
        case "always" | "never":
            return ConstantTrigger(config.kind == "always")
