"""The model, the device and the limits of one command."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import UsageError
from flashmem_bench.latency.interleave import Stop

if TYPE_CHECKING:
    from flashmem.backbone import Backbone

EXECUTIONS = ("eager", "compile", "graph")


@dataclass
class Setting:
    """What every check is given.

    Attributes:
        backbone: Our engine's model.
        model: What it was loaded from.
        shape: The named shape of random weights instead.
        stop: When a check has measured enough.
        contexts: Prompt lengths in the place of those of each check; empty leaves them.
        seed: Of prompts and untrained memories.
    """

    backbone: Backbone
    model: str
    shape: str | None
    stop: Stop
    contexts: tuple[int, ...] = ()
    seed: int = 0

    @property
    def device(self) -> str:
        """Type of the device: cpu, cuda."""
        return self.backbone.device.type

    @property
    def execution(self) -> str:
        """How the backbone is executed: eager, compile or graph."""
        return execution_of(self.backbone)

    @cached_property
    def clean(self) -> Any:
        """A transformers model with the same weights that this library never touched, under SDPA."""
        return clean_model(self)

    def lengths(self, own: tuple[int, ...], room: int) -> tuple[int, ...]:
        """Return the contexts of a check, its own unless the command gives others.

        Raises:
            UsageError: One leaves no room for the answer.
        """
        chosen = self.contexts or own
        if max(chosen) + room > self.backbone.max_positions:
            raise UsageError(
                f"context {max(chosen)} and {room} more positions exceed the {self.backbone.max_positions} of "
                f"{self.backbone.name}; choose a smaller --contexts"
            )
        return chosen


def execution_of(backbone: Backbone) -> str:
    """Return how a backbone is executed."""
    return backbone.execution


def set_execution(backbone: Backbone, value: str) -> None:
    """Have a backbone executed in one of the ways.

    Raises:
        UsageError: There is no such way.
        ConfigError: The device does not have it.
    """
    if value not in EXECUTIONS:
        raise UsageError(f"--exec is one of {', '.join(EXECUTIONS)}, not {value!r}")
    backbone.execution = value


def clean_model(setting: Setting) -> Any:
    """Load the weights of a setting once more, as a plain transformers model."""
    from flashmem.loading import load
    from flashmem_bench.latency.shapes import random_model
    from flashmem_bench.models import BUNDLED, bundled_weights

    backbone = setting.backbone
    dtype = str(backbone.dtype).removeprefix("torch.")
    if setting.shape is not None:
        model: Any = random_model(setting.shape, str(backbone.device), dtype, setting.seed)
    else:
        source = str(bundled_weights()) if setting.model == BUNDLED else setting.model
        model = load(source, dtype, False)[0].to(backbone.device)
    model.set_attn_implementation("sdpa")
    return model.eval().requires_grad_(False)
