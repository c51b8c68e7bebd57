"""The decode loop behind `flashmem.generation`: rows that decide, write, sample and leave, each on its own.

Each step brings one small tensor to the host: the proposed token of each row, the attention entropy and, where asked
for, the entropy of the next-token distribution. Policies then run on plain numbers. What a memory costs is paid by the
rows that take one: they are taken out of the batch for it, as a view where they are neighbours, and put back.

A row that has its last token leaves. The next prompt that waits takes its place; when nobody waits and half of the rows
have left, the others go on in a smaller batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from flashmem.backbone import Backbone
from flashmem.errors import ConfigError
from flashmem.generation import Clock, Generation, Request, Trigger
from flashmem.memory import MemoryContext, MemorySource, SampleContext
from flashmem.sampling import Plan, require_room, stream_of
from flashmem.state import DecodeState
from flashmem.trigger import ENTROPY_KINDS, PROMPT_END_KINDS, Gate, RowStep, TriggerConfig, build_gate

if TYPE_CHECKING:
    from flashmem.trace import TraceRecorder
    from flashmem.trigger_model import TriggerModel


@dataclass
class Row:
    """One sample.

    Attributes:
        number: its place among the prompts.
        gate: says when it takes a memory.
        stream: where its draws come from; None is greedy.
        tail: text of its newest token, where a trigger asks for it.
        token: what is sampled and not fed yet.
        earlier: latents that were in the cache before this call; only a state that somebody else prepared has any.
        predicted: whether there is a next-token distribution before its next memory; without a prefill there is none.
        divergences: of each memory, on the device until the row leaves; None where there was nothing before it.
    """

    number: int
    prompt: list[int]
    trigger: TriggerConfig
    gate: Gate
    result: Generation
    sample: SampleContext
    stream: torch.Generator | None
    tail: str = ""
    token: int | None = None
    earlier: int = 0
    predicted: bool = True
    divergences: list[Tensor | None] = field(default_factory=list)

    @property
    def spent(self) -> bool:
        """No memory may come any more."""
        cap = self.trigger.max_injections
        return cap is not None and self.gate.injections >= cap


class DecodeLoop:
    """State of one call; see `flashmem.generation.generate` for the arguments."""

    def __init__(
        self,
        backbone: Backbone,
        prompts: list[list[int]],
        generation_config: GenerationConfig,
        memory: MemorySource | None,
        triggers: Sequence[TriggerConfig],
        *,
        samples: list[SampleContext] | None,
        clock: Clock,
        seed: int | Sequence[int] | None = None,
        trace: bool = False,
        literal: bool = False,
        keep_memories: bool = False,
        prefill: Callable[[list[list[int]]], DecodeState] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.backbone, self.memory, self.clock = backbone, memory, clock
        self.engine = backbone.engine
        self.engine.paused = clock.paused
        self.literal, self.keep_memories = literal, keep_memories
        self.plan = Plan.of(generation_config, backbone, prompts)
        self.kind = triggers[0].kind if triggers else "never"
        self.watch_output = trace or self.kind == "output-entropy"
        self.watch_attention = trace or self.kind != "never"
        seeds = _seeds(seed, len(prompts)) if self.plan.do_sample else None
        rows = [
            self._arrive(
                number,
                prompt,
                triggers[number],
                samples[number] if samples else None,
                stream_of(*seeds[number], backbone.device) if seeds else None,
            )
            for number, prompt in enumerate(prompts)
        ]
        self.waiting: Iterator[Row] = iter(rows)
        self.width = min(batch_size or len(prompts), len(prompts))
        # Who sits in which row of the state; None is an empty seat.
        self.seats: list[Row | None] = []
        self.continues, self._prefill = prefill is not None, prefill or self._encode
        self.room = self._room(triggers)
        self.streamer: Any = None
        self.recorder: TraceRecorder | None = None

    def admit(self, requests: Iterator[Request], batch_size: int) -> None:
        """Let requests wait in the place of prompts; each is asked for when a seat is free."""
        self.waiting = (self._asked_for(number, request) for number, request in enumerate(requests))
        self.width = batch_size

    def _asked_for(self, number: int, request: Request) -> Row:
        require_room(self.backbone, len(request.prompt), self.plan.max_new_tokens)
        if request.trigger.kind != self.kind:
            raise ConfigError(f"A trigger {request.trigger.kind} among those of kind {self.kind}: they must be alike.")
        stream = None
        if self.plan.do_sample:
            seed = torch.seed() if request.seed is None else request.seed
            stream = stream_of(seed, 0, self.backbone.device)
        return self._arrive(number, request.prompt, request.trigger, request.sample, stream)

    def _arrive(
        self,
        number: int,
        prompt: list[int],
        trigger: TriggerConfig,
        sample: SampleContext | None,
        stream: torch.Generator | None,
    ) -> Row:
        # A nameless sample goes by its number, whatever row it comes to sit in.
        who = sample or SampleContext(str(number))
        gate = build_gate(trigger, who.sample_id)
        return Row(number, prompt, trigger, gate, Generation(prompt_tokens=len(prompt)), who, stream)

    def run(self) -> Iterator[tuple[int, Generation]]:
        """Yield the number and the record of each sample when it has its last token."""
        self.backbone.observe(self.watch_attention, clock=self.clock)
        try:
            state = self._seat(None)
            while self._rows():
                self._decide_and_sample(state)
                for seat, row in self._accept(state):
                    self.seats[seat] = None
                    yield row.number, self._close(row)
                state = self._seat(state)
                if any(row.token is not None for _, row in self._rows()):
                    with self.clock.phase("step"):
                        self._feed(state)
        finally:
            self.backbone.observe(False)
            if self.streamer is not None:
                self.streamer.end()

    def _rows(self) -> list[tuple[int, Row]]:
        """Who is under way, with the seats."""
        return [(seat, row) for seat, row in enumerate(self.seats) if row is not None]

    def _seat(self, state: DecodeState | None) -> DecodeState:
        """Give empty seats to those who wait, all in one prefill; without any, make the batch smaller."""
        empty = [seat for seat, row in enumerate(self.seats) if row is None] if self.seats else list(range(self.width))
        coming = list(islice(self.waiting, len(empty)))
        if state is None:
            self.seats = [None] * len(coming)
        if not coming:
            return self._shrink(state, empty) if state is not None and empty else _given(state)
        if self.streamer is not None:
            # As transformers does: a streamer with skip_prompt drops the first thing that it is given.
            self.streamer.put(torch.tensor([row.prompt for row in coming]))
        self.clock.begin([row.number for row in coming])
        with self.clock.phase("prefill"):
            fresh = self._open(coming)
        if self.continues:
            for row, count in zip(coming, fresh.latents.sum(1).tolist(), strict=True):
                row.earlier = count
        for seat, row in zip(empty, coming, strict=False):
            self.seats[seat] = row
        if state is None:
            return fresh
        state.put(empty[: len(coming)], fresh)
        return state

    def _shrink(self, state: DecodeState, empty: list[int]) -> DecodeState:
        """Nobody waits for an empty seat: it shall hold nothing, and half a batch goes on as one of its own."""
        staying = [seat for seat, _ in self._rows()]
        if not staying or self.recorder is not None or self.engine.static:
            return state
        if 2 * len(staying) <= len(self.seats):
            self.seats = [self.seats[seat] for seat in staying]
            return state.only(staying)
        for seat in empty:
            if state.lengths[seat]:
                state.release(seat)
        return state

    def _open(self, rows: Sequence[Row]) -> DecodeState:
        """Encode prompts. A source that drops the cache at the prompt end anyway gets them as they are."""
        for row in rows:
            row.predicted = not self._drops_at_once(row)
        parts = []
        for encode, predicted in ((self._prefill, True), (self.backbone.gather, False)):
            if places := [nth for nth, row in enumerate(rows) if row.predicted is predicted]:
                parts.append((places, encode([rows[nth].prompt for nth in places])))
        if len(parts) == 1:
            return parts[0][1]
        whole = parts[0][1].blank(len(rows))
        for places, part in parts:
            whole.put(places, part)
        return whole

    def _drops_at_once(self, row: Row) -> bool:
        """Whether what a prefill computes of a row is certain to be dropped before anyone looks at it."""
        drops = self.memory is not None and self.memory.drops_cache and self._asked() is None
        return drops and self.kind in PROMPT_END_KINDS and row.trigger.max_injections != 0

    def _encode(self, prompts: list[list[int]]) -> DecodeState:
        keep = self.memory is not None and self.memory.needs_history
        return self.backbone.prefill(prompts, keep_inputs=keep, room=self.room)

    def _room(self, triggers: Sequence[TriggerConfig]) -> int:
        """Positions that may come behind a prompt, as far as they are known beforehand."""
        caps = [config.max_injections for config in triggers if config.kind != "never"]
        latents = self.memory.config.length if self.memory is not None else 0
        return self.plan.max_new_tokens + latents * max((cap for cap in caps if cap is not None), default=0)

    def _feed(self, state: DecodeState) -> None:
        """One token a row through the backbone: one step, or everything again where the tail has no cache."""
        fed = [(seat, row) for seat, row in self._rows() if row.token is not None]
        ids = [self.plan.pad] * len(self.seats)
        for seat, row in fed:
            assert row.token is not None
            ids[seat], row.token = row.token, None
        anew = [seat for seat, row in fed if self.memory is not None and not self.memory.tail_cache and row.spent]
        if anew:
            part = state.rows(anew)
            tokens = torch.tensor([[ids[seat]] for seat in anew], device=self.backbone.device)
            self.backbone.reencode(part, self.backbone.embed(tokens))
            state.put(anew, part)
        stepping = {seat for seat, _ in fed} - set(anew)
        if stepping:
            self.engine.step(state, ids, [seat in stepping for seat in range(len(self.seats))])

    def _decide_and_sample(self, state: DecodeState) -> None:
        """One decision and one token a row; a second host copy is made only when an injection changed the logits."""
        with self.clock.phase("sample"):
            tokens, entropies, outputs = self._look(state)
        chosen = self._decide(state, entropies, outputs) if self.watch_attention else []
        proposed = list(tokens)
        if chosen:
            # A copy: a recorded pass writes to where they are.
            before = state.logits.clone()
            self._write(state, chosen, entropies, outputs)
            self._compare(before, state.logits, chosen)
            if not self.literal:
                with self.clock.phase("sample"):
                    again = self._sample(state.logits, chosen)
                for seat, token in zip(chosen, again.tolist(), strict=True):
                    tokens[seat] = token
            if self.recorder is not None:
                self.recorder.injected(chosen, before, state.logits, proposed, tokens)
        for seat, row in self._rows():
            row.token = tokens[seat]

    def _look(self, state: DecodeState) -> tuple[list[int], list[float], list[float]]:
        """Token proposals and entropies of all rows in one device-to-host copy."""
        known = self.engine.seen(state)
        if known is not None and not self.plan.processors and not self.plan.do_sample:
            tokens, entropies, outputs = known.tolist()
            return [int(token) for token in tokens], entropies, outputs
        columns = [self._sample(state.logits, None).float()]
        if self.watch_attention:
            columns.append(state.entropy)
        if self.watch_output:
            log_p = state.logits.log_softmax(-1)
            columns.append(-(log_p.exp() * log_p).sum(-1))
        # Token ids stay exact in float32 up to 2**24, far above any vocabulary.
        host = torch.stack(columns).tolist()
        blank = [0.0] * len(self.seats)
        entropies = host[1] if self.watch_attention else blank
        return [int(t) for t in host[0]], entropies, host[-1] if self.watch_output else blank

    def _asked(self) -> TriggerModel | None:
        """Who has the last word on a memory, if anyone: MemGen's trained trigger knows delimiters alone."""
        return self.memory.trigger_model if self.memory is not None and self.kind == "delimiter" else None

    def _ask(self, model: TriggerModel, state: DecodeState, seat: int, row: Row) -> bool:
        ids = row.prompt + row.result.token_ids
        row.result.verdicts.append((row.result.output_tokens, model.says(ids)))
        state.woven[seat] += len(ids)
        return row.result.verdicts[-1][1]

    def _decide(self, state: DecodeState, entropies: list[float], outputs: list[float]) -> list[int]:
        """The seats whose rows take a memory now."""
        chosen, model = [], self._asked()
        for seat, row in self._rows():
            row.result.entropies.append(entropies[seat])
            if self.watch_output:
                row.result.output_entropies.append(outputs[seat])
            output = outputs[seat] if self.watch_output else None
            step = RowStep(row.result.output_tokens, entropies[seat], output, row.tail)
            ask = partial(self._ask, model, state, seat, row) if model is not None else None
            if self.kind != "never" and row.gate.decide(step, ask):
                chosen.append(seat)
        if self.recorder is not None:
            self.recorder.decided(entropies, outputs, chosen, [row is not None for row in self.seats])
        return chosen

    def _write(self, state: DecodeState, chosen: list[int], entropies: list[float], outputs: list[float]) -> None:
        assert self.memory is not None
        rows = [row for seat in chosen if (row := self.seats[seat]) is not None]
        part = state.rows(chosen)
        with self.clock.phase("consolidate"):
            samples = [row.sample for row in rows]
            emitted = [row.result.output_tokens for row in rows]
            counts = [row.gate.injections - 1 for row in rows]
            context = MemoryContext(self.backbone, part, counts, samples, emitted)
            latents = self.engine.write(self.memory, context, state, chosen)
        for nth, (seat, row) in enumerate(zip(chosen, rows, strict=True)):
            self._note(row, latents[nth], entropies[seat], outputs[seat])
        if self.recorder is not None:
            self.recorder.wrote(part, latents, chosen)
        with self.clock.phase("inject"):
            if self.memory.drops_cache:
                self.backbone.reencode(part, latents, latents=True)
                state.put(chosen, part)
            else:
                self.engine.inject(state, part, latents, chosen)

    def _note(self, row: Row, latents: Tensor, entropy: float, output: float) -> None:
        """Record a memory `[K, d]` that is about to be injected."""
        result = row.result
        # Counted on the host: reading the device's position here would cost a synchronisation.
        position = row.earlier + result.prompt_tokens + result.output_tokens + result.latent_tokens
        known = output if self.watch_output else None
        result.triggers.append(Trigger(result.output_tokens, position, entropy, known, latents.shape[0]))
        if self.keep_memories:
            result.memories.append(latents.float().cpu())

    def _compare(self, before: Tensor, after: Tensor, chosen: list[int]) -> None:
        """What the memories change at once; nothing waits for it before the row leaves."""
        moved = _divergence(before[chosen], after[chosen])
        for nth, seat in enumerate(chosen):
            row = self.seats[seat]
            assert row is not None
            row.divergences.append(moved[nth] if row.predicted else None)
            row.predicted = True

    def _sample(self, logits: Tensor, seats: list[int] | None) -> Tensor:
        """Token ids `[n]` of some rows of `[B, V]`, or of all; an empty seat gets any token."""
        if not self.plan.processors and not self.plan.do_sample:
            return (logits if seats is None else logits[seats]).argmax(-1)
        scores = self.plan.scores(self._history, logits)
        wanted = range(len(self.seats)) if seats is None else seats
        if not self.plan.do_sample:
            return scores[list(wanted)].argmax(-1)
        nothing = torch.zeros(1, dtype=torch.long, device=logits.device)
        probabilities, drawn = scores.softmax(-1), []
        for seat in wanted:
            row = self.seats[seat]
            drawn.append(nothing if row is None else torch.multinomial(probabilities[seat], 1, generator=row.stream))
        return torch.cat(drawn)

    def _history(self) -> Tensor:
        """`[B, T]` prompt and text ids, for processors that look back."""
        rows = [row.prompt + row.result.token_ids if row is not None else [self.plan.pad] for row in self.seats]
        width = max(len(ids) for ids in rows)
        # Left padding repeats the row's first token: neutral for a repetition penalty.
        return torch.tensor([[ids[0]] * (width - len(ids)) + ids for ids in rows], device=self.backbone.device)

    def _accept(self, state: DecodeState) -> list[tuple[int, Row]]:
        """Record the tokens; returns those who have their last one, with their seats."""
        self.clock.token()
        finished = []
        for seat, row in self._rows():
            result, token = row.result, row.token
            assert token is not None
            result.token_ids.append(token)
            result.positions_encoded, result.positions_woven = state.encoded[seat], state.woven[seat]
            result.positions_reused, result.positions_evicted = state.reused[seat], state.evicted[seat]
            if self.kind == "delimiter":
                row.tail = self.backbone.tokenizer.decode([token])
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            if self._ended(result, token):
                finished.append((seat, row))
                self.clock.end(row.number)
        return finished

    def _ended(self, result: Generation, token: int) -> bool:
        if token in self.plan.eos:
            result.finish_reason = "eos"
        elif self.plan.stops(result.token_ids, self.backbone):
            result.finish_reason = "stop"
        else:
            return result.output_tokens >= self.plan.max_new_tokens
        return True

    def _close(self, row: Row) -> Generation:
        """Complete the record of a row that leaves; its divergences come to the host in one copy."""
        result = row.result
        result.text = self.plan.cut(self.backbone.decode(result.token_ids))
        result.above_threshold = row.gate.fired if self.kind in ENTROPY_KINDS else None
        known = [it for it in row.divergences if it is not None]
        values = iter(torch.stack(known).tolist() if known else [])
        result.triggers = [
            replace(trigger, divergence=None if it is None else next(values))
            for trigger, it in zip(result.triggers, row.divergences, strict=True)
        ]
        return result


def _given(state: DecodeState | None) -> DecodeState:
    assert state is not None
    return state


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """`[B, V]` logits before and behind a memory to `[B]` nats."""
    log_p, log_q = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)


def _seeds(seed: int | Sequence[int] | None, rows: int) -> list[tuple[int, int]]:
    """Of each row the seed and its offset."""
    if seed is None or isinstance(seed, int):
        base = torch.seed() if seed is None else seed
        return [(base, row) for row in range(rows)]
    return [(own, 0) for own in seed]
