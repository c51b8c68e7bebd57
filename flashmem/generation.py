"""Generation with latent memory: one loop for every method, and the record that it leaves of each sample.

    prefill(prompts)
    before every token:  look (monitor) -> maybe write a memory and inject it -> sample -> feed the token

Which source writes, which policy decides, and from which logits one samples right after an injection are parameters;
an ablation is a different part, not a different loop. Without a trigger this is plain decoding, token for token what
`transformers` generates.

Rows of a batch are on their own: each has its prompt, its trigger, its length and its random stream, takes a memory
when its own gate says so, and leaves when it is finished. With `batch_size` a row that has left is replaced by the next
prompt that waits. The loop itself is in `flashmem.decode_loop`.

What is not done: beams and assisted decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from flashmem.backbone import Backbone
from flashmem.engine import Engine
from flashmem.errors import ConfigError
from flashmem.memory import MemorySource, SampleContext
from flashmem.state import DecodeState
from flashmem.trigger import TriggerConfig

if TYPE_CHECKING:
    from flashmem.trace import TraceRecorder

__all__ = [
    "Clock",
    "Generation",
    "Request",
    "SampleContext",
    "Trigger",
    "generate",
    "generate_each",
    "generate_stream",
]


class Clock(Protocol):
    """What the loop tells a clock. Phases: prefill, step, monitor, consolidate, inject, sample; they may nest."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times the block under a name."""
        ...

    def token(self) -> None:
        """A sampled token of every sample under way is known on the host now."""
        ...

    def begin(self, samples: Sequence[int]) -> None:
        """Samples, by their number in the call, are under way from now on; their prefill comes next."""
        ...

    def end(self, sample: int) -> None:
        """A sample has its last token."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """What happens inside belongs to no sample: a pass is recorded."""
        ...


class NullClock:
    """Times nothing."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """See `Clock.phase`."""
        return nullcontext()

    def token(self) -> None:
        """See `Clock.token`."""

    def begin(self, samples: Sequence[int]) -> None:
        """See `Clock.begin`."""

    def end(self, sample: int) -> None:
        """See `Clock.end`."""

    def paused(self) -> AbstractContextManager[None]:
        """See `Clock.paused`."""
        return nullcontext()


@dataclass(frozen=True)
class Trigger:
    """One injection.

    Attributes:
        text_index: text tokens emitted before it; 0 is prompt end.
        position: position of its first latent in the sequence.
        entropy: attention entropy at the decision, nats.
        output_entropy: entropy of the next-token distribution there, nats, or None.
        latents: K.
        divergence: Kullback-Leibler divergence of the next-token distribution behind the memory from the one before it,
            nats: what the memory changes at once. None where the distribution before it was never computed.
    """

    text_index: int
    position: int
    entropy: float
    output_entropy: float | None
    latents: int
    divergence: float | None = None


@dataclass
class Generation:
    """What one sample produced.

    Attributes:
        token_ids: text tokens with the EOS, never latents.
        text: decoded, special tokens left out, cut before the first stop string.
        finish_reason: "eos", "stop" (a stop string) or "length"; "scored" where given answers were judged and nothing
            was generated (see `flashmem.scoring`).
        positions_encoded: positions through the backbone: prompt + fed outputs + latents; more where the cache was
            dropped.
        positions_reused: positions that were in the cache before this call, encoded for something else (`prefill=`).
        positions_woven: positions through further models of the memory source.
        positions_evicted: positions of the prompt whose keys and values were dropped.
        triggers: the injections, in order.
        entropies: attention entropy at each decision step (prompt end, then after each token but the last), nats;
            empty for plain decoding without a trace.
        output_entropies: the same of the next-token distribution, where it was watched.
        above_threshold: decision steps at which the policy said yes, whatever cooldown and cap said; None without one.
        verdicts: what a trained trigger said: text tokens emitted before, and whether it wanted a memory there.
        candidates: texts of all answers that were drawn, where this one won a vote; else empty.
        drawn_tokens: text tokens of all of them; None where there was no vote.
        memories: the `[K, d]` written, only if they were asked for.
    """

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: Literal["eos", "stop", "length", "scored"] = "length"
    positions_encoded: int = 0
    positions_reused: int = 0
    positions_woven: int = 0
    positions_evicted: int = 0
    triggers: list[Trigger] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    output_entropies: list[float] = field(default_factory=list)
    above_threshold: int | None = None
    verdicts: list[tuple[int, bool]] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)
    drawn_tokens: int | None = None
    memories: list[Tensor] = field(default_factory=list)

    @property
    def output_tokens(self) -> int:
        """Text tokens with the EOS."""
        return len(self.token_ids)

    @property
    def latent_tokens(self) -> int:
        """Latents injected."""
        return sum(t.latents for t in self.triggers)


@dataclass(frozen=True)
class Request:
    """One prompt of a stream.

    Attributes:
        prompt: token ids.
        trigger: when it takes memories; of the same kind as those of the other requests.
        sample: who it is, for placebos and for random triggers.
        seed: what its draws come from; None is another one each time.
    """

    prompt: list[int]
    trigger: TriggerConfig = field(default_factory=lambda: TriggerConfig(kind="never"))
    sample: SampleContext | None = None
    seed: int | None = None


@torch.inference_mode()
def generate(
    backbone: Backbone,
    prompts: list[list[int]],
    *,
    generation_config: GenerationConfig,
    memory: MemorySource | None = None,
    trigger: TriggerConfig | Sequence[TriggerConfig] | None = None,
    sampling_logits: Literal["post", "pre"] = "post",
    samples: list[SampleContext] | None = None,
    clock: Clock | None = None,
    streamer: Any = None,
    seed: int | Sequence[int] | None = None,
    keep_memories: bool = False,
    trace: bool = False,
    recorder: TraceRecorder | None = None,
    prefill: Callable[[list[list[int]]], DecodeState] | None = None,
    batch_size: int | None = None,
) -> list[Generation]:
    """Generate from a frozen backbone, with memory where the trigger says so.

    Args:
        backbone: the model.
        prompts: token ids, one list a row (see `Backbone.encode_chat`), of any lengths.
        generation_config: length, EOS ids, stop strings, temperature, top-k, top-p, min-p, repetition penalty.
        memory: who writes; needed as soon as a trigger can fire.
        trigger: when; one for all, or one for each prompt. None or kind "never" is plain decoding.
        sampling_logits: after an injection sample from the logits after the last latent ("post", as in training) or
            from those before it ("pre", the paper's Algorithm 1 read literally).
        samples: who the rows are, for placebos and for per-sample random streams.
        clock: times the phases.
        streamer: a transformers streamer (`put`, `end`); one row only.
        seed: for sampling; one for all, of which row i makes a stream of its own, or one for each prompt, with which it
            draws what it would draw alone.
        keep_memories: keep what was written in `Generation.memories`.
        trace: record both entropies at every step even where the trigger does not need them.
        prefill: encodes the prompts in the place of `Backbone.prefill` and returns a state with a row for each. The
            state may come from a fork and hold latents of earlier memories; it moves on in place.
        recorder: keeps what every memory attended to, says and changes (see `flashmem.trace`); implies `trace`.
        batch_size: rows that are decoded at once; None is all. A row that is finished is replaced by the next prompt.

    Returns:
        One `Generation` a prompt, in order.

    Raises:
        ConfigError: settings that do not fit together.
        PromptTooLongError: prompt and answer budget exceed the backbone's positions.
    """
    from flashmem.decode_loop import DecodeLoop

    triggers = _triggers(trigger, len(prompts))
    _check(prompts, triggers, memory, streamer, recorder, batch_size)
    loop = DecodeLoop(
        backbone,
        prompts,
        generation_config,
        memory,
        triggers,
        samples=samples,
        clock=clock or NullClock(),
        seed=seed,
        trace=trace or recorder is not None,
        literal=sampling_logits == "pre",
        keep_memories=keep_memories,
        prefill=prefill,
        batch_size=batch_size,
    )
    loop.streamer, loop.recorder = streamer, recorder
    if recorder is None:
        return _in_order(loop.run())
    # It reads along inside the passes, and a recorded pass tells nobody anything.
    loop.engine = Engine(backbone)
    with recorder.watching(backbone, prompts, memory, triggers[0], sampling_logits):
        results = _in_order(loop.run())
    recorder.finish(results)
    return results


@torch.inference_mode()
def generate_each(
    backbone: Backbone,
    prompts: list[list[int]],
    *,
    generation_config: GenerationConfig,
    batch_size: int,
    memory: MemorySource | None = None,
    trigger: TriggerConfig | Sequence[TriggerConfig] | None = None,
    sampling_logits: Literal["post", "pre"] = "post",
    samples: list[SampleContext] | None = None,
    clock: Clock | None = None,
    seed: int | Sequence[int] | None = None,
    prefill: Callable[[list[list[int]]], DecodeState] | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Generate as `generate` does and yield each prompt's number and answer as soon as it is finished.

    Nothing else may use the backbone while the iterator is open.
    """
    from flashmem.decode_loop import DecodeLoop

    triggers = _triggers(trigger, len(prompts))
    _check(prompts, triggers, memory, None, None, batch_size)
    yield from DecodeLoop(
        backbone,
        prompts,
        generation_config,
        memory,
        triggers,
        samples=samples,
        clock=clock or NullClock(),
        seed=seed,
        literal=sampling_logits == "pre",
        prefill=prefill,
        batch_size=batch_size,
    ).run()


@torch.inference_mode()
def generate_stream(
    backbone: Backbone,
    requests: Iterable[Request],
    *,
    generation_config: GenerationConfig,
    batch_size: int,
    memory: MemorySource | None = None,
    sampling_logits: Literal["post", "pre"] = "post",
    clock: Clock | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Generate as `generate_each` does for requests that need not exist before there is a seat for them.

    The next request is asked for when a row is free, so no more than `batch_size` of them are held. When no more come,
    those under way are finished. An error, such as a prompt that is too long, ends the whole stream: look before.

    Args:
        backbone: the model; nothing else may use it while the iterator is open.
        requests: asked for one at a time, in order.
        generation_config: as for `generate`; it must say `max_new_tokens`.
        batch_size: rows that are decoded at once.
        memory: who writes; needed as soon as a trigger can fire.
        sampling_logits: as for `generate`.
        clock: times the phases.

    Yields:
        The number of a request, counted from 0, and its answer, as soon as it is finished.

    Raises:
        ConfigError: settings that do not fit together.
        PromptTooLongError: prompt and answer budget exceed the backbone's positions.
    """
    from flashmem.decode_loop import DecodeLoop

    waiting = iter(requests)
    first = next(waiting, None)
    if first is None:
        return
    if not generation_config.max_new_tokens:
        raise ConfigError("A stream does not know its longest prompt: set max_new_tokens.")
    _check([first.prompt], [first.trigger], memory, None, None, batch_size)
    loop = DecodeLoop(
        backbone,
        [],
        generation_config,
        memory,
        [first.trigger],
        samples=None,
        clock=clock or NullClock(),
        literal=sampling_logits == "pre",
    )
    loop.admit(chain([first], waiting), batch_size)
    yield from loop.run()


def _triggers(trigger: TriggerConfig | Sequence[TriggerConfig] | None, prompts: int) -> list[TriggerConfig]:
    if trigger is None or isinstance(trigger, TriggerConfig):
        return [trigger or TriggerConfig(kind="never")] * prompts
    if len(trigger) != prompts:
        raise ConfigError(f"{len(trigger)} triggers for {prompts} prompts: give one, or one for each.")
    if len({config.kind for config in trigger}) > 1:
        raise ConfigError("The triggers of one call must be of one kind: call generate once for each kind.")
    return list(trigger)


def _check(
    prompts: list[list[int]],
    triggers: list[TriggerConfig],
    memory: MemorySource | None,
    streamer: Any,
    recorder: Any,
    batch_size: int | None,
) -> None:
    if memory is None and any(config.kind != "never" for config in triggers):
        raise ConfigError("A trigger without a memory source: pass memory=, or the trigger kind never.")
    if streamer is not None and len(prompts) != 1:
        raise ConfigError("Streaming works for one prompt at a time.")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more.")
    if recorder is not None and batch_size is not None and batch_size < len(prompts):
        raise ConfigError("A recorder follows all rows at once: leave batch_size away.")


def _in_order(finished: Iterator[tuple[int, Generation]]) -> list[Generation]:
    return [generation for _, generation in sorted(finished, key=lambda pair: pair[0])]
