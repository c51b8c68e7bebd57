"""All contexts of one `latency` command, in the order in which a short budget should meet them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashmem_bench.claims import load_claims
from flashmem_bench.latency.arms import Arm, new_arm
from flashmem_bench.latency.interleave import (
    Block,
    Stop,
    by_importance,
    entropy_thresholds,
    measure_context,
    refuse_too_long,
)
from flashmem_bench.latency.protocol import Protocol

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem.memory import MemorySource
    from flashmem_bench.ceilings import Ceilings

_PERCENTILES = {"attention-entropy": 85.0, "output-entropy": 85.0}


@dataclass(frozen=True)
class Campaign:
    """What is timed.

    Attributes:
        methods: Names, in the order of the tables.
        protocol: What a run does.
        stop: When a context has been measured enough.
        trained: A trained memory for the methods whose shape it has; an untrained one costs the same.
        settings: Dotted settings laid over those of each method.
        ceilings: What the device can do.
    """

    methods: Sequence[str]
    protocol: Protocol = field(default_factory=Protocol)
    stop: Stop = field(default_factory=Stop)
    trained: MemorySource | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    ceilings: Ceilings | None = None

    def arms(self, backbone: Backbone, prompt: list[int]) -> list[Arm]:
        """Make the arms; in the free protocol their thresholds come from a plain run over the prompt."""
        thresholds: dict[str, float] = {}
        if self.protocol.name == "free":
            thresholds = entropy_thresholds(backbone, prompt, self.protocol, _PERCENTILES)
        return [
            new_arm(name, backbone, self.protocol, trained=self.trained, settings=self.settings, thresholds=thresholds)
            for name in self.methods
        ]


def measure(backbone: Backbone, campaign: Campaign, contexts: Sequence[int], seed: int = 0) -> Iterator[Block]:
    """Measure one context after the other, those that a claim names first; none begins once the time is up.

    Raises:
        UsageError: A context that does not fit the backbone, or a method that cannot be timed.
    """
    # One arm each before anything is timed: a mistake in the last context must not cost the first ones.
    checked = campaign.arms(backbone, [0] * 16)
    for context in contexts:
        refuse_too_long(backbone, checked, context, campaign.protocol)
    del checked
    claimed = [claim.context for claim in load_claims() if claim.context is not None]
    for context in by_importance(contexts, claimed):
        if campaign.stop.late:
            return
        yield measure_context(
            backbone,
            lambda prompt: campaign.arms(backbone, prompt),
            context,
            campaign.protocol,
            campaign.stop,
            seed=seed,
            ceilings=campaign.ceilings,
        )
