"""What a `GenerationConfig` says about one call: how long, where to stop, and what is done to the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flashmem.errors import ConfigError, PromptTooLongError

if TYPE_CHECKING:
    from flashmem.backbone import Backbone


@dataclass
class Plan:
    """A `GenerationConfig` resolved for one call.

    Attributes:
        max_new_tokens: text tokens of an answer at most, the EOS counted.
        eos: ids that end an answer.
        pad: what is fed where nothing is.
        do_sample: draw instead of taking the likeliest token.
        processors: what is done to the logits before, as transformers does it.
        stop_strings: texts that end an answer and are cut off it.
    """

    max_new_tokens: int
    eos: frozenset[int]
    pad: int
    do_sample: bool
    processors: LogitsProcessorList
    stop_strings: tuple[str, ...]

    @classmethod
    def of(cls, config: GenerationConfig, backbone: Backbone, prompts: list[list[int]]) -> Plan:
        """Resolve a configuration for a backbone and its prompts.

        Raises:
            ConfigError: beams, or nothing to generate.
            PromptTooLongError: a prompt and the answer exceed the backbone's positions.
        """
        if (config.num_beams or 1) > 1:
            raise ConfigError("Beam search is not supported: latents belong to one sequence. Set num_beams=1.")
        longest = max((len(p) for p in prompts), default=0)
        new = config.max_new_tokens or ((config.max_length or 0) - longest)
        if new < 1:
            raise ConfigError("Nothing to generate: set max_new_tokens to 1 or more.")
        require_room(backbone, longest, new)
        stops = config.stop_strings or ()
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        eos = _eos_ids(config, backbone)
        pad = config.pad_token_id if config.pad_token_id is not None else backbone.tokenizer.pad_token_id
        return cls(
            max_new_tokens=new,
            eos=eos,
            pad=pad if pad is not None else next(iter(eos), 0),
            do_sample=bool(config.do_sample),
            processors=_processors(config),
            stop_strings=stops,
        )

    def scores(self, history: Callable[[], Tensor], logits: Tensor) -> Tensor:
        """Logits `[B, V]` after the processors; `history` gives the ids `[B, T]` so far, for those that look back."""
        return self.processors(history(), logits) if self.processors else logits

    def cut(self, text: str) -> str:
        """A text up to its first stop string."""
        cuts = [text.find(stop) for stop in self.stop_strings if stop in text]
        return text[: min(cuts)] if cuts else text

    def stops(self, token_ids: list[int], backbone: Backbone) -> bool:
        """True when the newest token completed a stop string."""
        if not self.stop_strings:
            return False
        # A token is at least one byte: no stop string can reach back further than this.
        reach = max(len(stop.encode()) for stop in self.stop_strings) + 4
        tail = backbone.decode(token_ids[-reach:])
        return any(stop in tail for stop in self.stop_strings)


def require_room(backbone: Backbone, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a prompt behind which its answer has no room.

    Raises:
        PromptTooLongError: they exceed the backbone's positions.
    """
    if prompt_tokens + new_tokens > backbone.max_positions:
        raise PromptTooLongError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the {backbone.max_positions} positions of "
            f"{backbone.name}: shorten the prompt, or truncate it (--truncate left or middle)."
        )


def _eos_ids(config: GenerationConfig, backbone: Backbone) -> frozenset[int]:
    named = config.eos_token_id
    if named is None:
        named = backbone.model.generation_config.eos_token_id
    if named is None:
        named = backbone.tokenizer.eos_token_id
    if named is None:
        return frozenset()
    return frozenset(named if isinstance(named, (list, tuple)) else [int(named)])


def _processors(config: GenerationConfig) -> LogitsProcessorList:
    """The processors that transformers would use, in its order."""
    chosen = LogitsProcessorList()
    if config.repetition_penalty not in (None, 1.0):
        chosen.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if not config.do_sample:
        return chosen
    if config.temperature not in (None, 1.0):
        chosen.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        chosen.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        chosen.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        chosen.append(MinPLogitsWarper(config.min_p))
    return chosen


def look(logits: Tensor, entropy: Tensor) -> Tensor:
    """What the host has to know of a step, in one tensor.

    Args:
        logits: `[B, V]`.
        entropy: `[B]` of the monitored attention, nats.

    Returns:
        `[3, B]`: the likeliest token, that entropy, and the entropy of the next-token distribution, nats. Token ids
        stay exact in float32 up to 2**24, far above any vocabulary.
    """
    log_p = logits.log_softmax(-1)
    return torch.stack([logits.argmax(-1).float(), entropy, -(log_p.exp() * log_p).sum(-1)])


def stream_of(seed: int, row: int, device: torch.device) -> torch.Generator:
    """The random stream of one row of a call."""
    return torch.Generator(device=device).manual_seed((seed + 1_000_003 * row) % 2**63)
