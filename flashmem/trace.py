"""A memory's story: what a generation saw, decided, wrote and changed, one record a sample.

Pass a `TraceRecorder` to `flashmem.generate` and read its `samples` afterwards. For every decision step it keeps both
entropies and what the trigger said; for every injection the places of the history that each latent attended to, the
vocabulary tokens that each latent is nearest to, and the next-token distribution on either side of it.

The attention is the consolidator's own: its queries against the cached keys that it reads, with its mask and scale,
scored once more in float32. A method with a trigger computes the same numbers in the same way while a recorder reads
along; it only takes longer. Plain decoding has its monitor switched on, which changes its tokens at exact ties alone.
Without a recorder none of this runs.

A latent has two readings. As an *embedding* it is compared by cosine with the input embeddings: what it looks like to
the backbone's first layer. As a *state* (before the output map it is a post-norm last hidden state) it goes through
the LM head: what the backbone would say there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashmem import monitor
from flashmem.backbone import Backbone
from flashmem.consolidator import Consolidator
from flashmem.encoder import SeparateEncoderMemory
from flashmem.memory import ConstantMemory, MemorySource
from flashmem.placebo import Placebo
from flashmem.state import DecodeState
from flashmem.trigger import ENTROPY_KINDS, TriggerConfig

if TYPE_CHECKING:
    from flashmem.generation import Generation

# Up to so many positions of the history are kept one by one; beyond, the heaviest of each latent and the rest's total.
DENSE_POSITIONS = 4096
TOP_POSITIONS = 64
NEIGHBOURS = 5
NEXT_TOKENS = 10
# Rows of the embedding table that are compared at once: 8,192 x 4,096 in float32 are 128 MiB.
_CHUNK = 8192
# Bytes of the longest UTF-8 character: no more tokens than that wait for one another.
_LONGEST_CHARACTER = 4


@dataclass(frozen=True)
class Scored:
    """A token of the vocabulary with its cosine or its probability."""

    token: int
    text: str
    value: float


@dataclass(frozen=True)
class Shift:
    """A token before and after an injection: probability, and rank among all tokens from 1."""

    token: int
    text: str
    before: float
    after: float
    rank_before: int
    rank_after: int


@dataclass
class LayerAttention:
    """What one consolidator block attended to.

    Attributes:
        layer: backbone layer whose cached keys it read.
        weights: one list a latent; over every position of the history, or over those in `positions`.
        positions: which positions, one list a latent, heaviest first; None where all T are kept.
        rest: weight on the positions of the history that are not kept, one number a latent.
        own: weight on latents of the same memory (`latent_attention="earlier"`), one number a latent.
    """

    layer: int
    weights: list[list[float]]
    positions: list[list[int]] | None
    rest: list[float]
    own: list[float]


@dataclass
class NextToken:
    """The next-token distribution on either side of an injection, at temperature 1 and unprocessed.

    Attributes:
        tokens: the ten likeliest before and the ten likeliest after, joined, likeliest after the injection first.
        kl: Kullback-Leibler divergence of after from before, nats.
        proposed: what would have been chosen without the injection.
        sampled: what was chosen.
    """

    tokens: list[Shift]
    kl: float
    proposed: Shift
    sampled: Shift


@dataclass
class InjectionTrace:
    """One injection.

    Attributes:
        text_index: text tokens emitted before it; 0 is prompt end.
        position: position of its first latent, which is also the length T of the history that it could attend to.
        latents: K.
        latent_positions: positions of the history that hold earlier latents.
        attention: one entry a consolidator block; empty where nothing is known, and `attention_note` says why.
        attention_note: what a reader must know about the attention; empty for the backbone's own cache.
        nearest: for each latent the nearest input embeddings, cosines.
        spoken: for each latent its state before the output map through the LM head, probabilities; empty without one.
        next_token: what it changed.
    """

    text_index: int
    position: int
    latents: int
    latent_positions: list[int]
    attention: list[LayerAttention]
    attention_note: str
    nearest: list[list[Scored]]
    spoken: list[list[Scored]]
    next_token: NextToken | None = None


@dataclass(frozen=True)
class StepTrace:
    """One decision step: entropies in nats, whether the watched one was above tau, whether a memory was injected.

    `above_tau` is None under a trigger that has no tau.
    """

    entropy: float
    output_entropy: float
    above_tau: bool | None
    fired: bool


@dataclass
class SampleTrace:
    """One sample. `prompt` and `answer` are text pieces, one a token; a character of several tokens is in the last.

    Attributes:
        trigger: kind of the policy.
        tau: its threshold in nats, None without one.
        sampling_logits: "post" or "pre", as in `generate`.
        sinks: positions at the start that the monitor leaves out.
        monitor_layer: layer whose attention entropy is watched.
        steps: prompt end first, then one after each answer token but the last.
    """

    prompt_ids: list[int]
    prompt: list[str]
    trigger: str
    tau: float | None
    sampling_logits: str
    sinks: int
    monitor_layer: int
    answer_ids: list[int] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    steps: list[StepTrace] = field(default_factory=list)
    injections: list[InjectionTrace] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, strings and numbers of six significant digits."""
        return _plain(asdict(self))


class TraceRecorder:
    """Records one `generate` call, every row of the batch.

    Args:
        dense_positions: longest history of which every position is kept.
        top_positions: positions kept for each latent of a longer one.

    Attributes:
        samples: one record a row, in order, after the call.
    """

    def __init__(self, *, dense_positions: int = DENSE_POSITIONS, top_positions: int = TOP_POSITIONS) -> None:
        self.dense_positions, self.top_positions = dense_positions, top_positions
        self.samples: list[SampleTrace] = []
        self._trigger = TriggerConfig(kind="never")
        self._note, self._blocks, self._states = "", [], []
        self._backbone: Backbone

    @contextmanager
    def watching(
        self,
        backbone: Backbone,
        prompts: list[list[int]],
        memory: MemorySource | None,
        trigger: TriggerConfig,
        sampling_logits: str,
    ) -> Iterator[None]:
        """Read along with the memory source's consolidator while the block runs."""
        self._backbone, self._trigger = backbone, trigger
        tau = trigger.threshold if trigger.kind in ENTROPY_KINDS else None
        self.samples = [
            SampleTrace(
                prompt_ids=list(prompt),
                prompt=text_pieces(backbone, prompt),
                trigger=trigger.kind,
                tau=tau,
                sampling_logits=sampling_logits,
                sinks=backbone.monitor.sinks,
                monitor_layer=backbone.monitor_layer,
            )
            for prompt in prompts
        ]
        consolidator, self._note = _consolidator(memory)
        self._blocks, self._states = [], []
        if consolidator is None:
            yield
            return
        hook = consolidator.norm.register_forward_hook(lambda _module, _args, output: self._states.append(output))
        try:
            for block, layer in zip(consolidator.blocks, consolidator.reads, strict=True):
                tap = monitor.attach(block.self_attn)
                tap.rows, tap.kept = 0, []
                self._blocks.append((layer, tap.kept))
            yield
        finally:
            hook.remove()
            for block in consolidator.blocks:
                monitor.detach(block.self_attn)

    def decided(self, entropies: list[float], outputs: list[float], chosen: list[int], running: list[bool]) -> None:
        """One decision step of all rows; `chosen` are those that take a memory."""
        tau = self._trigger.threshold
        for row, sample in enumerate(self.samples):
            if not running[row]:
                continue
            above = None
            if sample.tau is not None and tau is not None:
                above = (outputs if self._trigger.kind == "output-entropy" else entropies)[row] > tau
            sample.steps.append(StepTrace(entropies[row], outputs[row], above, row in chosen))

    def wrote(self, state: DecodeState, latents: Tensor, chosen: list[int]) -> None:
        """Memories `[n, K, d]` were written over a state of the chosen rows and are about to be injected there."""
        states = torch.cat(self._states, 1) if self._states else None
        marks, slots = state.latents, state.length
        for nth, row in enumerate(chosen):
            sample, length = self.samples[row], state.lengths[nth]
            held = marks[nth, :length].nonzero().flatten().tolist()
            attention = [
                self._layer(layer, [weights[nth] for weights in kept], length, slots)
                for layer, kept in self._blocks
                if kept
            ]
            sample.injections.append(
                InjectionTrace(
                    text_index=len(sample.steps) - 1,
                    position=length,
                    latents=latents.shape[1],
                    latent_positions=held,
                    attention=attention,
                    attention_note=self._note,
                    nearest=nearest_tokens(self._backbone, latents[nth]),
                    spoken=[] if states is None else spoken_tokens(self._backbone, states[nth]),
                )
            )
        self._states.clear()
        for _, kept in self._blocks:
            kept.clear()

    def injected(
        self, chosen: list[int], before: Tensor, after: Tensor, proposed: list[int], sampled: list[int]
    ) -> None:
        """The logits `[B, V]` on either side of the injection that `wrote` announced, and the tokens chosen."""
        for row in chosen:
            shift = next_token(self._backbone, before[row], after[row], proposed[row], sampled[row])
            self.samples[row].injections[-1].next_token = shift

    def finish(self, generations: list[Generation]) -> None:
        """Take over what was generated."""
        for sample, generation in zip(self.samples, generations, strict=True):
            sample.answer_ids = list(generation.token_ids)
            sample.answer = text_pieces(self._backbone, generation.token_ids)
            sample.text, sample.finish_reason = generation.text, generation.finish_reason

    def _layer(self, layer: int, rows: list[Tensor], length: int, slots: int) -> LayerAttention:
        """K rows over the slots of the cache, and behind them the memory's own latents, to positions."""
        own = [float(row[slots:].sum()) for row in rows]
        history = torch.stack([row[:length] for row in rows])
        if history.shape[1] <= self.dense_positions:
            return LayerAttention(layer, history.tolist(), None, [0.0] * len(rows), own)
        weights, positions = history.topk(min(self.top_positions, history.shape[1]), dim=-1)
        rest = (history.sum(-1) - weights.sum(-1)).clamp_min(0.0)
        return LayerAttention(layer, weights.tolist(), positions.tolist(), rest.tolist(), own)


def nearest_tokens(backbone: Backbone, latents: Tensor, count: int = NEIGHBOURS) -> list[list[Scored]]:
    """The input embeddings nearest to each of `[K, d]` latents by cosine, rows that no token has left out."""
    table = backbone.model.get_input_embeddings().weight
    named = min(table.shape[0], len(backbone.tokenizer))
    directions = torch.nn.functional.normalize(latents.float(), dim=-1)
    cosines = torch.cat(
        [
            directions @ torch.nn.functional.normalize(table[start : min(start + _CHUNK, named)].float(), dim=-1).T
            for start in range(0, named, _CHUNK)
        ],
        -1,
    )
    return _top(backbone, cosines, count)


def spoken_tokens(backbone: Backbone, states: Tensor, count: int = NEIGHBOURS) -> list[list[Scored]]:
    """The likeliest tokens of each of `[K, d]` post-norm states under the LM head."""
    return _top(backbone, backbone.logits(states).softmax(-1), count)


def next_token(backbone: Backbone, before: Tensor, after: Tensor, proposed: int, sampled: int) -> NextToken:
    """Compare the logits `[V]` on either side of an injection."""
    # On the host: not every device has float64.
    logs = [logits.cpu().double().log_softmax(-1) for logits in (before, after)]
    first, second = (log.exp() for log in logs)
    change = torch.where(second > 0, second * (logs[1] - logs[0]), 0.0)
    count = min(NEXT_TOKENS, before.shape[0])
    union = sorted({*first.topk(count).indices.tolist(), *second.topk(count).indices.tolist()})

    def shift(token: int) -> Shift:
        ranks = [int((p > p[token]).sum()) + 1 for p in (first, second)]
        return Shift(token, _text(backbone, token), float(first[token]), float(second[token]), *ranks)

    tokens = sorted((shift(token) for token in union), key=lambda entry: (-entry.after, entry.token))
    return NextToken(tokens, max(0.0, float(change.sum())), shift(proposed), shift(sampled))


def text_pieces(backbone: Backbone, token_ids: list[int]) -> list[str]:
    """The text that each token adds to those before it, special tokens shown; the pieces join to the whole text.

    A token is decoded beside its neighbours, because some tokenizers drop the space in front of a lone one.
    """
    pieces: list[str] = []
    start = done = 0
    for end in range(1, len(token_ids) + 1):
        whole = _decode(backbone, token_ids[start:end])
        unfinished = whole.endswith("\ufffd") and end - done < _LONGEST_CHARACTER and end < len(token_ids)
        if unfinished:
            pieces.append("")
            continue
        pieces.append(whole[len(_decode(backbone, token_ids[start:done])) :])
        start, done = done, end
    return pieces


def _consolidator(memory: MemorySource | None) -> tuple[Consolidator | None, str]:
    """Whose attention belongs to the latents, and what a reader must know about it."""
    if memory is None or isinstance(memory, ConstantMemory):
        return None, "A learned constant: it attends to nothing."
    if isinstance(memory, Placebo):
        kind = type(memory).__name__
        return None, f"A placebo ({kind}): the consolidator ran, but these latents are not what it wrote."
    found = next((module for module in memory.modules() if isinstance(module, Consolidator)), None)
    if found is None:
        return None, f"{type(memory).__name__} has no consolidator: what it attended to is not known."
    if isinstance(memory, SeparateEncoderMemory):
        return found, "Over the keys of its own encoder, not over the backbone's cache."
    return found, ""


def _top(backbone: Backbone, values: Tensor, count: int) -> list[list[Scored]]:
    best = values.topk(min(count, values.shape[-1]), dim=-1)
    return [
        [Scored(token, _text(backbone, token), value) for token, value in zip(tokens, row, strict=True)]
        for tokens, row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _text(backbone: Backbone, token: int) -> str:
    return _decode(backbone, [token])


def _decode(backbone: Backbone, token_ids: list[int]) -> str:
    return str(backbone.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)) if token_ids else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
