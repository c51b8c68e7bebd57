"""The decode loop: one loop for every latent-memory method.

    prefill(prompts)
    before every token:  look (monitor) -> maybe write a memory and inject it -> sample -> feed the token

Which source writes, which policy decides, and from which logits one samples right after an injection are parameters;
an ablation is a different part, not a different loop. Without a trigger this is plain decoding, token for token what
`transformers` generates.

Each step brings one small tensor to the host: the proposed token, the attention entropy and, where asked for, the
entropy of the next-token distribution. Policies then run on plain numbers. A row that is finished is fed padding, as
`transformers` does; it takes no more injections.

What this loop does not do: beams, assisted decoding, continuous batching.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

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

from flashmem.backbone import Backbone, DecodeState
from flashmem.errors import ConfigError, PromptTooLongError
from flashmem.memory import MemoryContext, MemorySource, SampleContext
from flashmem.trigger import ENTROPY_KINDS, PROMPT_END_KINDS, Gate, RowStep, TriggerConfig, build_gate

if TYPE_CHECKING:
    from flashmem.trace import TraceRecorder
    from flashmem.trigger_model import TriggerModel

__all__ = ["Clock", "Generation", "SampleContext", "Trigger", "generate"]


class Clock(Protocol):
    """What the loop tells a clock. Phases: prefill, step, monitor, consolidate, inject, sample; they may nest."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times the block under a name."""
        ...

    def token(self) -> None:
        """A sampled token is known on the host now."""
        ...


class NullClock:
    """Times nothing."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """See `Clock.phase`."""
        return nullcontext()

    def token(self) -> None:
        """See `Clock.token`."""


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


@torch.inference_mode()
def generate(
    backbone: Backbone,
    prompts: list[list[int]],
    *,
    generation_config: GenerationConfig,
    memory: MemorySource | None = None,
    trigger: TriggerConfig | None = None,
    sampling_logits: Literal["post", "pre"] = "post",
    samples: list[SampleContext] | None = None,
    clock: Clock | None = None,
    streamer: Any = None,
    seed: int | None = None,
    keep_memories: bool = False,
    trace: bool = False,
    recorder: TraceRecorder | None = None,
    prefill: Callable[[list[list[int]]], DecodeState] | None = None,
) -> list[Generation]:
    """Generate from a frozen backbone, with memory where the trigger says so.

    Args:
        backbone: the model.
        prompts: token ids, one list a row (see `Backbone.encode_chat`); they are left-padded.
        generation_config: length, EOS ids, stop strings, temperature, top-k, top-p, min-p, repetition penalty.
        memory: who writes; needed as soon as a trigger can fire.
        trigger: when; None or kind "never" is plain decoding.
        sampling_logits: after an injection sample from the logits after the last latent ("post", as in training) or
            from those before it ("pre", the paper's Algorithm 1 read literally).
        samples: who the rows are, for placebos and for per-sample random streams.
        clock: times the phases.
        streamer: a transformers streamer (`put`, `end`); one row only.
        seed: for sampling; row i draws from a stream of its own.
        keep_memories: keep what was written in `Generation.memories`.
        trace: record both entropies at every step even where the trigger does not need them.
        prefill: encodes the prompts in the place of `Backbone.prefill` and returns a state with a row for each. The
            state may come from a fork and hold latents of earlier memories; it moves on in place.
        recorder: keeps what every memory attended to, says and changes (see `flashmem.trace`); implies `trace`.

    Returns:
        One `Generation` a prompt, in order.

    Raises:
        ConfigError: settings that do not fit together.
        PromptTooLongError: prompt and answer budget exceed the backbone's positions.
    """
    config = trigger or TriggerConfig(kind="never")
    if config.kind != "never" and memory is None:
        raise ConfigError("A trigger without a memory source: pass memory=, or the trigger kind never.")
    if streamer is not None and len(prompts) != 1:
        raise ConfigError("Streaming works for one prompt at a time.")
    trace = trace or recorder is not None
    loop = _Loop(backbone, prompts, generation_config, memory, config, samples, clock or NullClock(), seed, trace)
    loop.literal = sampling_logits == "pre"
    loop.streamer, loop.keep_memories, loop.recorder = streamer, keep_memories, recorder
    loop.prefill, loop.continues = prefill or loop.prefill, prefill is not None
    if recorder is None:
        return loop.run()
    with recorder.watching(backbone, prompts, memory, config, sampling_logits):
        results = loop.run()
    recorder.finish(results)
    return results


class _Loop:
    """State of one `generate` call."""

    def __init__(
        self,
        backbone: Backbone,
        prompts: list[list[int]],
        generation_config: GenerationConfig,
        memory: MemorySource | None,
        trigger: TriggerConfig,
        samples: list[SampleContext] | None,
        clock: Clock,
        seed: int | None,
        trace: bool,
    ) -> None:
        self.backbone, self.memory, self.trigger, self.clock = backbone, memory, trigger, clock
        self.prompts, self.samples = prompts, samples
        self.plan = _Plan.of(generation_config, backbone, prompts)
        self.active_trigger = trigger.kind != "never"
        self.watch_output = trace or trigger.kind == "output-entropy"
        self.watch_attention = trace or self.active_trigger
        names = [s.sample_id for s in samples] if samples else [str(i) for i in range(len(prompts))]
        self.gates: list[Gate] = [build_gate(trigger, name) for name in names]
        self.results = [Generation(prompt_tokens=len(p)) for p in prompts]
        self.tails = [""] * len(prompts)
        self.running = [True] * len(prompts)
        self.streams = _streams(len(prompts), seed, backbone.device) if self.plan.do_sample else None
        self.literal, self.keep_memories, self.streamer = False, False, None
        # Latents that were in the cache before this call; only a state that somebody else prepared has any.
        self.continues, self.earlier = False, [0] * len(prompts)
        # Whether there is a next-token distribution before the next memory; without a prefill there is none.
        self.predicted = True
        self.divergences: list[tuple[list[bool], Tensor | None]] = []
        self.recorder: TraceRecorder | None = None
        keep = memory is not None and memory.needs_history
        self.prefill: Callable[[list[list[int]]], DecodeState] = partial(backbone.prefill, keep_inputs=keep)

    def run(self) -> list[Generation]:
        self.backbone.observe(self.watch_attention, clock=self.clock)
        if self.streamer is not None:
            # As transformers does: a streamer with skip_prompt drops the first thing that it is given.
            self.streamer.put(torch.tensor(self.prompts))
        try:
            with self.clock.phase("prefill"):
                state = self._open()
            if self.continues:
                self.earlier = state.latents.sum(1).tolist()
            for index in range(self.plan.max_new_tokens):
                tokens = self._decide_and_sample(state)
                if not self._accept(tokens, state) or index + 1 == self.plan.max_new_tokens:
                    break
                with self.clock.phase("step"):
                    self._feed(state, torch.tensor(tokens, device=self.backbone.device))
        finally:
            self.backbone.observe(False)
        return self._finish()

    def _open(self) -> DecodeState:
        """Encode the prompts. A source that drops the cache at the prompt end anyway gets them as they are."""
        drops = self.memory is not None and self.memory.drops_cache
        certain = self.trigger.kind in PROMPT_END_KINDS and self.trigger.max_injections != 0
        if drops and certain and self._asked() is None:
            self.predicted = False
            return self.backbone.gather(self.prompts)
        return self.prefill(self.prompts)

    def _feed(self, state: DecodeState, tokens: Tensor) -> None:
        """One token a row through the backbone: one step, or everything again where the tail has no cache."""
        cap = self.trigger.max_injections
        if self.memory is None or self.memory.tail_cache or cap is None:
            self.backbone.step(state, tokens)
        elif all(gate.injections >= cap for gate, on in zip(self.gates, self.running, strict=True) if on):
            self.backbone.reencode(state, self.backbone.embed(tokens[:, None]))
        else:
            self.backbone.step(state, tokens)

    def _decide_and_sample(self, state: DecodeState) -> list[int]:
        """One decision and one token a row; a second host copy is made only when an injection changed the logits."""
        with self.clock.phase("sample"):
            tokens, entropies, outputs = self._look(state)
        if not self.watch_attention:
            return tokens
        chosen = self._decide(state, entropies, outputs)
        if not any(chosen):
            return tokens
        before, proposed = state.logits, tokens
        self._write(state, chosen, entropies, outputs)
        self.divergences.append((chosen, _divergence(before, state.logits) if self.predicted else None))
        self.predicted = True
        if not self.literal:
            with self.clock.phase("sample"):
                again = self._sample(state.logits).tolist()
            tokens = [new if hit else old for new, old, hit in zip(again, proposed, chosen, strict=True)]
        if self.recorder is not None:
            self.recorder.injected(chosen, before, state.logits, proposed, tokens)
        return tokens

    def _look(self, state: DecodeState) -> tuple[list[int], list[float], list[float]]:
        """Token proposals and entropies of all rows in one device-to-host copy."""
        columns = [self._sample(state.logits).float()]
        if self.watch_attention:
            columns.append(state.entropy)
        if self.watch_output:
            log_p = state.logits.log_softmax(-1)
            columns.append(-(log_p.exp() * log_p).sum(-1))
        # Token ids stay exact in float32 up to 2**24, far above any vocabulary.
        host = torch.stack(columns).tolist()
        blank = [0.0] * len(self.prompts)
        entropies = host[1] if self.watch_attention else blank
        return [int(t) for t in host[0]], entropies, host[-1] if self.watch_output else blank

    def _asked(self) -> TriggerModel | None:
        """Who has the last word on a memory, if anyone: MemGen's trained trigger knows delimiters alone."""
        return self.memory.trigger_model if self.memory is not None and self.trigger.kind == "delimiter" else None

    def _ask(self, model: TriggerModel, state: DecodeState, row: int) -> bool:
        result = self.results[row]
        ids = self.prompts[row] + result.token_ids
        result.verdicts.append((result.output_tokens, model.says(ids)))
        state.woven[row] += len(ids)
        return result.verdicts[-1][1]

    def _decide(self, state: DecodeState, entropies: list[float], outputs: list[float]) -> list[bool]:
        chosen, model = [], self._asked()
        for row, result in enumerate(self.results):
            if not self.running[row]:
                chosen.append(False)
                continue
            result.entropies.append(entropies[row])
            if self.watch_output:
                result.output_entropies.append(outputs[row])
            output = outputs[row] if self.watch_output else None
            step = RowStep(result.output_tokens, entropies[row], output, self.tails[row])
            ask = partial(self._ask, model, state, row) if model is not None else None
            chosen.append(self.active_trigger and self.gates[row].decide(step, ask))
        if self.recorder is not None:
            self.recorder.decided(entropies, outputs, chosen, self.running)
        return chosen

    def _write(self, state: DecodeState, chosen: list[bool], entropies: list[float], outputs: list[float]) -> None:
        assert self.memory is not None
        counts = [gate.injections - hit for gate, hit in zip(self.gates, chosen, strict=True)]
        with self.clock.phase("consolidate"):
            emitted = [result.output_tokens for result in self.results]
            latents = self.memory(MemoryContext(self.backbone, state, counts, self.samples, emitted))
        for row in [r for r, hit in enumerate(chosen) if hit]:
            result = self.results[row]
            # Counted on the host: reading the device's position here would cost a synchronisation.
            position = self.earlier[row] + result.prompt_tokens + result.output_tokens + result.latent_tokens
            output = outputs[row] if self.watch_output else None
            result.triggers.append(Trigger(result.output_tokens, position, entropies[row], output, latents.shape[1]))
            if self.keep_memories:
                result.memories.append(latents[row].float().cpu())
        if self.recorder is not None:
            self.recorder.wrote(state, latents, chosen)
        with self.clock.phase("inject"):
            rows = None if all(chosen) else torch.tensor(chosen, device=self.backbone.device)
            if self.memory.drops_cache:
                self.backbone.reencode(state, latents, rows, latents=True)
            else:
                self.backbone.inject(state, latents, rows)

    def _sample(self, logits: Tensor) -> Tensor:
        """`[B, V]` to `[B]` token ids."""
        scores = logits
        if self.plan.processors:
            scores = self.plan.processors(self._history(), logits)
        if self.streams is None:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        draws = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, self.streams, strict=True)]
        return torch.cat(draws)

    def _history(self) -> Tensor:
        """`[B, T]` prompt and text ids, for processors that look back."""
        rows = [p + r.token_ids for p, r in zip(self.prompts, self.results, strict=True)]
        width = max(len(r) for r in rows)
        # Left padding repeats the row's first token: neutral for a repetition penalty.
        return torch.tensor([[r[0]] * (width - len(r)) + r for r in rows], device=self.backbone.device)

    def _accept(self, tokens: list[int], state: DecodeState) -> bool:
        """Record the tokens (a finished row's becomes padding, in place); False when every row is done."""
        self.clock.token()
        for row, token in enumerate(tokens):
            if not self.running[row]:
                tokens[row] = self.plan.pad
                continue
            result = self.results[row]
            result.token_ids.append(token)
            # A row that waits for others is fed padding later on: its count is taken while it runs.
            result.positions_encoded, result.positions_woven = state.encoded[row], state.woven[row]
            result.positions_reused, result.positions_evicted = state.reused[row], state.evicted[row]
            if self.trigger.kind == "delimiter":
                self.tails[row] = self.backbone.tokenizer.decode([token])
            if token in self.plan.eos:
                result.finish_reason, self.running[row] = "eos", False
            elif self.plan.stops(result.token_ids, self.backbone):
                result.finish_reason, self.running[row] = "stop", False
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens))
        return any(self.running)

    def _finish(self) -> list[Generation]:
        if self.streamer is not None:
            self.streamer.end()
        for row, result in enumerate(self.results):
            text = self.backbone.decode(result.token_ids)
            cuts = [text.find(stop) for stop in self.plan.stop_strings if stop in text]
            result.text = text[: min(cuts)] if cuts else text
            result.above_threshold = self.gates[row].fired if self.trigger.kind in ENTROPY_KINDS else None
        self._tell_divergences()
        return self.results

    def _tell_divergences(self) -> None:
        """Bring the divergences to the host, after the last token: nothing waits for them before."""
        values = [(chosen, None if found is None else found.tolist()) for chosen, found in self.divergences]
        for row, result in enumerate(self.results):
            own = [None if value is None else value[row] for chosen, value in values if chosen[row]]
            result.triggers = [replace(t, divergence=d) for t, d in zip(result.triggers, own, strict=True)]


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """`[B, V]` logits before and behind a memory to `[B]` nats."""
    log_p, log_q = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)


@dataclass
class _Plan:
    """A `GenerationConfig` resolved for one call."""

    max_new_tokens: int
    eos: frozenset[int]
    pad: int
    do_sample: bool
    processors: LogitsProcessorList
    stop_strings: tuple[str, ...]

    @classmethod
    def of(cls, config: GenerationConfig, backbone: Backbone, prompts: list[list[int]]) -> _Plan:
        if (config.num_beams or 1) > 1:
            raise ConfigError("Beam search is not supported: latents belong to one sequence. Set num_beams=1.")
        longest = max((len(p) for p in prompts), default=0)
        new = config.max_new_tokens or ((config.max_length or 0) - longest)
        if new < 1:
            raise ConfigError("Nothing to generate: set max_new_tokens to 1 or more.")
        if longest + new > backbone.max_positions:
            raise PromptTooLongError(
                f"{longest} prompt tokens and {new} new ones exceed the {backbone.max_positions} positions of "
                f"{backbone.name}: shorten the prompt, or truncate it (--truncate left or middle)."
            )
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

    def stops(self, token_ids: list[int], backbone: Backbone) -> bool:
        """True when the newest token completed a stop string."""
        if not self.stop_strings:
            return False
        # A token is at least one byte: no stop string can reach back further than this.
        reach = max(len(stop.encode()) for stop in self.stop_strings) + 4
        tail = backbone.decode(token_ids[-reach:])
        return any(stop in tail for stop in self.stop_strings)


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


def _streams(rows: int, seed: int | None, device: torch.device) -> list[torch.Generator]:
    base = torch.seed() if seed is None else seed
    return [torch.Generator(device=device).manual_seed((base + 1_000_003 * row) % 2**63) for row in range(rows)]
