"""The one engine behind every latent-memory method: Backbone x MemorySource x trigger, one decode loop.

The method files differ only in the settings that they fix and in the memory source that they put in; what they share
is here: turning settings into the library's configurations, loading the trained memory, and generating. Nothing is
measured here; the clock is handed through to the library.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import BenchError
from flashmem_bench.methods.base import BuildContext, Entry

if TYPE_CHECKING:
    from flashmem.generation import Generation, Request
    from flashmem.memory import MemorySource
    from flashmem.scoring import Scores
    from flashmem.state import DecodeState
    from flashmem.trace import TraceRecorder
    from flashmem.trigger import TriggerConfig
    from flashmem_bench.clock import HostClock
    from flashmem_bench.settings import Settings
    from flashmem_bench.tasks import Sample

_WARM_UP_TOKENS = 16
# Groups of settings that change what a latent-memory method answers.
USES = ("trigger", "memory", "monitor", "sampling", "exec")


class LatentMethod:
    """Answers with a memory source under a trigger.

    Args:
        context: What the runner found for the cell.
        memory: The memory source; None decodes plainly.
        trigger_for: Trigger of one sample; by default the settings' trigger with the threshold of its stratum.
    """

    # Encodes prompts in the place of the backbone's own prefill.
    prefill: Callable[[list[list[int]]], DecodeState] | None = None

    def __init__(
        self,
        context: BuildContext,
        memory: MemorySource | None,
        trigger_for: Callable[[Sample], TriggerConfig] | None = None,
    ):
        from transformers import GenerationConfig

        self._context, self.memory, self.backbone = context, memory, context.backbone
        self._trigger_for = trigger_for or self._trigger
        self._generation_config = GenerationConfig(**context.generation)
        context.backbone.monitor = monitor_config(context)

    @property
    def reuses_prefix(self) -> bool:
        """Whether an answer may go on from a cache that holds the beginning of the prompt."""
        return self.memory is None or not self.memory.drops_cache

    def batch_key(self, sample: Sample) -> object:
        """Return the trigger: the library runs a batch under one."""
        return self._trigger_for(sample)

    def warm_up(self, prompt: list[int], sample: Sample) -> None:
        """Generate a few tokens of one sample."""
        full = self._generation_config
        budget = min(_WARM_UP_TOKENS, self._context.generation["max_new_tokens"])
        self._generation_config = type(full)(**{**self._context.generation, "max_new_tokens": budget})
        try:
            self.generate([prompt], [sample], None, 0)
        finally:
            self._generation_config = full

    def generate(
        self,
        prompts: Sequence[list[int]],
        samples: Sequence[Sample],
        clock: HostClock | None,
        seed: int,
        keep_memories: bool = False,
        recorder: TraceRecorder | None = None,
        prefill: Callable[[list[list[int]]], DecodeState] | None = None,
    ) -> list[Generation]:
        """Answer a batch whose samples have the same `batch_key`."""
        from flashmem.generation import generate
        from flashmem.memory import SampleContext

        return generate(
            self.backbone,
            list(prompts),
            memory=self.memory,
            trigger=self._trigger_for(samples[0]) if self.memory is not None else None,
            generation_config=self._generation_config,
            sampling_logits=self._context.settings.sampling.logits,
            clock=clock,
            seed=seed,
            samples=[SampleContext(sample.sample_id, sample.answer) for sample in samples],
            keep_memories=keep_memories,
            recorder=recorder,
            prefill=prefill,
        )

    def stream(
        self, entries: Iterable[Entry], clock: HostClock | None, batch_size: int
    ) -> Generator[tuple[int, Generation]]:
        """Answer samples as seats become free, each under its own trigger; see `Method`."""
        from flashmem.generation import generate_stream

        yield from generate_stream(
            self.backbone,
            (self._request(entry) for entry in entries),
            memory=self.memory,
            generation_config=self._generation_config,
            sampling_logits=self._context.settings.sampling.logits,
            clock=clock,
            batch_size=batch_size,
        )

    def _request(self, entry: Entry) -> Request:
        from flashmem.generation import Request
        from flashmem.memory import SampleContext
        from flashmem.trigger import TriggerConfig

        trigger = TriggerConfig(kind="never")
        if self.memory is not None:
            trigger = self._trigger_for(entry.sample)
            if trigger.kind == "never" != self._context.settings.trigger.kind:
                # No moment was drawn for this sample, and the others of its stream have schedules.
                trigger = replace(trigger, kind="schedule", positions=())
        who = SampleContext(entry.sample.sample_id, entry.sample.answer)
        return Request(entry.prompt, trigger, who, entry.seed)

    def score(
        self,
        prompt: list[int],
        continuations: Sequence[list[int]],
        sample: Sample,
        clock: HostClock | None,
        *,
        tail: int = 0,
        plain: bool = False,
    ) -> Scores:
        """Judge given answers behind a prompt; see `flashmem.scoring.score`. `plain` writes no memory."""
        from flashmem.memory import SampleContext
        from flashmem.scoring import score

        memory = None if plain else self.memory
        return score(
            self.backbone,
            prompt,
            continuations,
            tail=tail,
            memory=memory,
            trigger=self._trigger_for(sample) if memory is not None else None,
            sampling_logits=self._context.settings.sampling.logits,
            sample=SampleContext(sample.sample_id, sample.answer),
            clock=clock,
            prefill=self.prefill,
        )

    def _trigger(self, sample: Sample) -> TriggerConfig:
        return trigger_config(self._context, threshold=self._context.threshold(sample.stratum))


def trigger_config(context: BuildContext, **changes: Any) -> TriggerConfig:
    """Return the library's trigger for the settings, with `changes` laid over them."""
    from flashmem.trigger import TriggerConfig

    return TriggerConfig(**{**context.settings.trigger.model_dump(), "seed": context.seed, **changes})


def monitor_config(context: BuildContext) -> Any:
    """Return the library's monitor configuration for the settings."""
    from flashmem.monitor import MonitorConfig

    return MonitorConfig(**context.settings.monitor.model_dump())


def memory_config(settings: Settings) -> Any:
    """Return the library's memory configuration for the settings of a memory that is not trained yet."""
    from flashmem.memory import MemoryConfig

    values = settings.memory.model_dump()
    return MemoryConfig(**{entry.name: values[entry.name] for entry in fields(MemoryConfig) if entry.name in values})


def trained_memory(context: BuildContext) -> MemorySource:
    """Load the trained memory of the cell, or make an untrained one where the settings ask for it."""
    import torch

    from flashmem.memory import load_memory, new_memory

    if context.memory is None:
        torch.manual_seed(context.seed)
        return new_memory(memory_config(context.settings), context.backbone).eval()
    return load_memory(context.memory, context.backbone)


def build_latent(context: BuildContext) -> LatentMethod:
    """Build a method that differs from `flashmem` in its settings alone."""
    return LatentMethod(context, trained_memory(context))


def bank_of(context: BuildContext) -> Any:
    """Return the bank of other samples' memories that the runner must have prepared."""
    if context.bank is None:
        raise BenchError("this method replaces memories by those of other samples, and no bank was prepared")
    return context.bank
