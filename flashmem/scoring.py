"""Log-likelihoods of given continuations behind one prompt, with a memory at its end where the trigger says so.

The prompt goes through the backbone once. At its end, and nowhere else, the trigger decides, as it does before the
first token of a generated answer; what it writes stands between the prompt and every continuation. The continuations
then share that state: a few at a time where copies of the cache are small, else one after the other on the one cache,
which forgets each before the next. The first token of a continuation costs nothing, and its last is never encoded.

Sums are those of a full pass over [prompt, latents, continuation]. Nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from flashmem.backbone import Backbone
from flashmem.decode_loop import DecodeLoop, Row
from flashmem.errors import ConfigError
from flashmem.generation import Clock, Generation, NullClock, SampleContext
from flashmem.memory import MemorySource
from flashmem.state import DecodeState
from flashmem.trigger import TriggerConfig

# Positions that the copies of one pass may hold together: beyond it the continuations take turns on one cache.
_COPIED_POSITIONS = 8_192


@dataclass
class Scores:
    """What the backbone thinks of some continuations.

    Attributes:
        log_likelihoods: natural log of the probability of each continuation, summed over its tokens.
        greedy: whether each continuation is what greedy decoding would write.
        generation: the record of the prompt and its memory, without text; `positions_encoded` counts everything.
    """

    log_likelihoods: list[float]
    greedy: list[bool]
    generation: Generation


@torch.inference_mode()
def score(
    backbone: Backbone,
    prompt: list[int],
    continuations: Sequence[list[int]],
    *,
    tail: int = 0,
    memory: MemorySource | None = None,
    trigger: TriggerConfig | None = None,
    sampling_logits: Literal["post", "pre"] = "post",
    sample: SampleContext | None = None,
    clock: Clock | None = None,
    prefill: Callable[[list[list[int]]], DecodeState] | None = None,
) -> Scores:
    """Score continuations of a prompt.

    Args:
        backbone: the model.
        prompt: token ids.
        continuations: token ids, one list each, none empty.
        tail: so many last tokens of the prompt count as the beginning of every continuation: their log-probability is
            added, and a memory still comes behind them.
        memory: who writes; needed as soon as the trigger can fire.
        trigger: whether to write at the prompt end; None or kind "never" writes nothing.
        sampling_logits: with "pre" the first token is judged by the logits from before the memory.
        sample: who the prompt is, for placebos.
        clock: times the phases; its one token is the moment at which all sums are known.
        prefill: encodes the prompt in the place of `Backbone.prefill`.

    Raises:
        ConfigError: no continuation, an empty one, or a trigger without a memory.
        PromptTooLongError: the prompt and its longest continuation exceed the backbone's positions.
    """
    config = trigger or TriggerConfig(kind="never")
    if not continuations or not all(continuations):
        raise ConfigError("Nothing to score: give continuations of at least one token each.")
    if not 0 <= tail < len(prompt):
        raise ConfigError(f"tail is {tail}; it must leave at least one of the prompt's {len(prompt)} tokens.")
    if config.kind != "never" and memory is None:
        raise ConfigError("A trigger without a memory source: pass memory=, or the trigger kind never.")
    length = GenerationConfig(max_new_tokens=max(map(len, continuations)), do_sample=False)
    samples = [sample] if sample is not None else None
    run = _Scoring(
        backbone,
        [prompt],
        length,
        memory,
        [config],
        samples=samples,
        clock=clock or NullClock(),
        literal=sampling_logits == "pre",
        prefill=prefill,
    )
    return run.score(continuations, tail)


class _Scoring(DecodeLoop):
    """One `score` call: the decode loop up to its first decision, then the continuations."""

    def score(self, continuations: Sequence[list[int]], tail: int) -> Scores:
        self.backbone.observe(self.watch_attention, clock=self.clock)
        try:
            # A source that drops the cache at the prompt end encodes the prompt with its memory, not before.
            with self.backbone.collecting() if tail else nullcontext([]) as seen:
                state = self._seat(None)
                before = state.logits
                self._decide_and_sample(state)
        finally:
            self.backbone.observe(False)
        first = before if self.literal else state.logits
        # Nothing re-encodes the history any more.
        state.cache.inputs = None
        with self.clock.phase("step"):
            sums, hits = self._judge(state, first, continuations)
            if tail:
                likely, hit = self._judge_tail(torch.cat(seen, 1), tail)
                sums, hits = sums + likely, hits & hit
            values, greedy = sums.tolist(), hits.tolist()
        self.clock.token()
        return Scores(values, greedy, self._record(state))

    def _judge(self, state: DecodeState, first: Tensor, continuations: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Sums of log-probabilities `[M]` and whether all tokens are the likeliest `[M]`, on the device."""
        heads = torch.tensor([tokens[0] for tokens in continuations], device=self.backbone.device)
        sums = first[0].log_softmax(-1)[heads]
        hits = heads == first[0].argmax(-1)
        for place, hidden in self._behind(state, continuations):
            likely, hit = _along(self.backbone.logits(hidden), continuations[place][1:])
            sums[place] += likely
            hits[place] &= hit
        return sums, hits

    def _behind(self, state: DecodeState, continuations: Sequence[list[int]]) -> Iterator[tuple[int, Tensor]]:
        """Yield `(continuation, states [n - 1, d] after all its tokens but the last)` of those longer than one."""
        longer = [place for place, tokens in enumerate(continuations) if len(tokens) > 1]
        if not longer:
            return
        length = state.length + max(len(continuations[place]) for place in longer)
        rows = max(1, min(len(longer), _COPIED_POSITIONS // length))
        if rows > 1:
            state.repeat(rows)
        for start in range(0, len(longer), rows):
            places = longer[start : start + rows]
            fed = [continuations[place][:-1] for place in places] + [[]] * (rows - len(places))
            hidden = self._extend(state, fed)
            for row, place in enumerate(places):
                yield place, hidden[row, : len(fed[row])]

    def _extend(self, state: DecodeState, fed: list[list[int]]) -> Tensor:
        """One pass over a row of tokens each, forgotten again; shorter rows get holes behind them."""
        backbone, width = self.backbone, max(map(len, fed))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in fed], device=backbone.device)
        before = list(state.lengths)
        hidden = backbone.extend(state, backbone.embed(ids), counts=[len(row) for row in fed])
        state.crop(before)
        return hidden

    def _judge_tail(self, hidden: Tensor, tail: int) -> tuple[Tensor, Tensor]:
        """The same of the prompt's last tokens, from the states `[1, T, d]` of the pass that encoded it."""
        prompt = self._row().prompt
        end = len(prompt) - 1
        return _along(self.backbone.logits(hidden[0, end - tail : end]), prompt[-tail:])

    def _record(self, state: DecodeState) -> Generation:
        row = self._row()
        result = row.result
        result.positions_encoded, result.positions_woven = sum(state.encoded), sum(state.woven)
        result.positions_evicted = state.evicted[0]
        self._close(row)
        result.finish_reason = "scored"
        return result

    def _row(self) -> Row:
        return self._rows()[0][1]


def _along(logits: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of tokens under `[n, V]` logits, and whether each is the likeliest."""
    wanted = torch.tensor(tokens, device=logits.device)
    likely = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()
    return likely, (logits.argmax(-1) == wanted).all()
