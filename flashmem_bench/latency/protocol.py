"""What one timed run does: how many tokens, and when memories come.

*paper*: 256 text tokens in 8 cycles of 8 latents and 32 text tokens at a fixed context. The trigger is a clock, so
every run of every method does the same work; the monitor watches every step all the same, as it does in use.

*free*: 256 text tokens, and each method's own trigger decides. Thresholds are percentiles of the entropies that the
backbone shows in a plain run over the same prompt.

In both the EOS is ignored, and prompts are random token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from flashmem.trigger import TriggerConfig

CYCLES, CYCLE_TEXT = 8, 32
PROTOCOLS = ("paper", "free")


@dataclass(frozen=True)
class Protocol:
    """A schedule.

    Attributes:
        name: paper or free.
        cycles: memories of a run of the paper's protocol.
        cycle_text: text tokens of a cycle.
    """

    name: Literal["paper", "free"] = "paper"
    cycles: int = CYCLES
    cycle_text: int = CYCLE_TEXT

    @property
    def text_tokens(self) -> int:
        """Text tokens of a run."""
        return self.cycles * self.cycle_text

    def generation(self, sampled: bool = False) -> Any:
        """The transformers generation configuration: a fixed number of tokens, no EOS."""
        from transformers import GenerationConfig

        return GenerationConfig(max_new_tokens=self.text_tokens, do_sample=sampled, eos_token_id=[-1])

    def clocked(self) -> TriggerConfig:
        """The trigger of the paper's protocol: a memory at the beginning of each cycle."""
        from flashmem.trigger import TriggerConfig

        return TriggerConfig(
            kind="every", interval=self.cycle_text, cooldown=self.cycle_text, max_injections=self.cycles
        )
