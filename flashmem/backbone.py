"""A frozen Hugging Face causal LM behind a few verbs: prefill, step, append, inject, extend.

This is the file that runs the model: it makes the positions and masks of each pass, and takes what its newest positions
leave behind. What a batch under way is lies in `flashmem.state`, its keys and values in `flashmem.kv_cache`.

Rows of a batch may disagree: some take an injection while others do not, and prompts are as long as they are. A pass
is Q positions wide for all rows, and the first `counts` of them count for a row; the rest is behind that row's end,
where nobody looks. Long passes are cut into chunks, so that the memory that a pass takes does not grow with a prompt.

Invariant: the history goes through the backbone once. `DecodeState.encoded` counts every position that did, and a fork
of a state counts anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmem import monitor as monitoring
from flashmem import weights
from flashmem.engine import Engine, new_engine
from flashmem.errors import ConfigError, FlashMemError, PromptTooLongError
from flashmem.kv_cache import RaggedCache
from flashmem.loading import load, require_supported
from flashmem.masks import pass_mask
from flashmem.monitor import MonitorConfig
from flashmem.slots import Slots
from flashmem.state import FORMAT, DecodeState, behind, new_state

# These models take one mask per layer type; the others take one tensor.
_MASK_PER_TYPE = frozenset({"qwen2", "qwen3", "gemma2", "gemma3_text"})
_FULL, _SLIDING = "full_attention", "sliding_attention"
_CACHED = ("keys", "values")
# Positions a row that are never cut: many short rows are one pass.
_LEAST_CHUNK = 256


@dataclass
class Backbone:
    """A frozen causal LM with a monitored layer.

    Attributes:
        name: what the model was loaded from (the last path component for a local folder).
        model: the transformers model, in eval mode, no parameter requires a gradient.
        tokenizer: its tokenizer.
        monitor: where the Cognitive Monitor looks; assign a new `MonitorConfig` to change it.
        chunk: positions, over all rows, that go through the model at once; longer passes are cut.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    chunk: int | None = 2048

    def __post_init__(self) -> None:
        require_supported(self.model.config)
        self.model.set_attn_implementation(monitoring.register())
        self.model.eval().requires_grad_(False)
        self.tap: monitoring.AttentionTap | None = None
        self._own_tap = monitoring.AttentionTap()
        self._collected: list[Tensor] | None = None
        self._fingerprint: str | None = None
        self._mask_kinds = sorted(set(self.layer_types))
        # Where the weights are and of what type is asked for in every step, and the model looks among all of them; this
        # one is moved and converted with the others.
        self._weight = next(it for it in self.model.parameters() if it.is_floating_point())
        self.execution = "eager"
        self.observe(False)

    @property
    def execution(self) -> str:
        """How decoding is run: "eager", "compile" or "graph" (see `flashmem.engine`); assign to change it.

        Raises:
            ConfigError: no such mode, or one that the device does not have.
        """
        return self._execution

    @execution.setter
    def execution(self, execution: str) -> None:
        self.engine: Engine = new_engine(self, execution)
        self._execution = execution

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        trust_remote_code: bool = False,
        device_map: str | dict[str, Any] | None = None,
    ) -> Backbone:
        """Load a backbone from a local folder or a hub id.

        Args:
            name_or_path: folder with a transformers model, or a hub id.
            device: torch device.
            dtype: name of a floating torch dtype, such as "float32" or "bfloat16".
            trust_remote_code: run code that comes with the model; off unless asked.
            device_map: accelerate's placement of the layers over several devices, such as "auto"; `device` is then
                not used. What this library keeps beside the model lies on the first of them.

        Raises:
            UnsupportedBackboneError: the family is not one of `flashmem.loading.FAMILIES`.
            FlashMemError: nothing is found under that name.
        """
        model, tokenizer = load(name_or_path, dtype, trust_remote_code, device_map)
        return cls(Path(name_or_path).name, model if device_map is not None else model.to(device), tokenizer)

    @property
    def decoder(self) -> nn.Module:
        """The model without its LM head."""
        return self.model.model

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._weight.dtype

    @property
    def hidden_size(self) -> int:
        """Width d."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of layers N."""
        return int(self.config.num_hidden_layers)

    @property
    def max_positions(self) -> int:
        """Positions that the backbone has."""
        return int(self.config.max_position_embeddings)

    @property
    def trained_context(self) -> int:
        """Positions that it was trained on, where its configuration says so."""
        return int(getattr(self.config, "trained_context", None) or self.max_positions)

    @property
    def layer_types(self) -> list[str]:
        """Kind of attention in each layer: full_attention or sliding_attention."""
        named = getattr(self.config, "layer_types", None)
        if named:
            return list(named)
        slides = getattr(self.config, "sliding_window", None) is not None
        return [_SLIDING if slides else _FULL] * self.num_layers

    def window(self, layer: int) -> int | None:
        """How far back a layer looks, or None."""
        return self._window(self.layer_types[layer])

    @property
    def monitor_layer(self) -> int:
        """The monitored layer: the last one with full attention, else (every layer slides) the last one.

        Where every layer slides (Mistral, Phi-3 with a window) the row is the window, not the whole context.
        """
        if self.monitor.layer is not None:
            return self.monitor.layer % self.num_layers
        full = [i for i, kind in enumerate(self.layer_types) if kind == _FULL]
        return full[-1] if full else self.num_layers - 1

    @property
    def fingerprint(self) -> str:
        """16 hex digits over a fixed sample of every weight: tells two backbones apart, not two dtypes."""
        if self._fingerprint is None:
            self._fingerprint = weights.fingerprint(self.model)
        return self._fingerprint

    def embed(self, token_ids: Tensor) -> Tensor:
        """Input embeddings `[B, Q, d]` of token ids `[B, Q]`, with the family's scale where it has one."""
        return self.model.get_input_embeddings()(token_ids)

    def embedding_norm(self) -> float:
        """Mean Euclidean norm of the token embeddings as the first layer sees them."""
        return weights.embedding_norm(self.model)

    def stream_scale(self) -> float:
        """Size of the residual stream before the final norm, with the state after it as the unit; a power of two."""
        return weights.stream_scale(self.model)

    def rotary(self, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[B, Q, d_h]` that a layer uses for positions `[B, Q]`."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        if self.config.model_type == "gemma3_text":
            cosine, sine = self.decoder.rotary_emb(like, positions, self.layer_types[layer])
        else:
            cosine, sine = self.decoder.rotary_emb(like, positions)
        return cosine.to(self.device), sine.to(self.device)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, no special tokens added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_chat(self, prompt: str) -> list[int]:
        """Token ids of one user turn through the chat template, ready for the answer; plain text without one."""
        return self.encode_turns([{"role": "user", "content": prompt}], answer=True)

    def encode_turns(self, turns: list[dict[str, str]], *, answer: bool) -> list[int]:
        """Token ids of a conversation through the chat template; without one, of its texts joined.

        Args:
            turns: `role` and `content` of each.
            answer: end where the answer begins.
        """
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode("".join(turn["content"] for turn in turns))
        return self.encode(self.tokenizer.apply_chat_template(turns, add_generation_prompt=answer, tokenize=False))

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def observe(self, on: bool, *, rows: int = 1, clock: Any = None) -> None:
        """Switch the monitor on or off. Off, the monitored layer is a plain SDPA layer."""
        for layer in self.decoder.layers:
            monitoring.detach(layer.self_attn)
        # Always the same one: what is compiled holds on to it.
        self.tap = monitoring.attach(self.decoder.layers[self.monitor_layer].self_attn, self._own_tap) if on else None
        if self.tap is not None:
            self.tap.rows, self.tap.normalise, self.tap.clock = rows, self.monitor.normalise, clock
            self.tap.sinks = self.monitor.sinks

    def prefill(self, prompts: list[list[int]], *, keep_inputs: bool = False, room: int = 0) -> DecodeState:
        """Encode prompts, each from slot 0 on.

        Args:
            prompts: token ids, one list a row, none empty.
            keep_inputs: keep the input embeddings for a memory that re-encodes the history.
            room: positions that will come behind the longest prompt; the cache is made for them at once.

        Raises:
            ConfigError: a prompt is empty.
            PromptTooLongError: a prompt is longer than the backbone's positions.
        """
        state = self.empty_state(len(prompts), keep_inputs=keep_inputs)
        self._require_room(prompts)
        state.cache.reserve(max(map(len, prompts)) + room)
        self.engine.lend(state.cache)
        self.append(state, prompts)
        return state

    def step(self, state: DecodeState, token_ids: Tensor, rows: Sequence[bool] | None = None) -> None:
        """Feed one token a row, `[B]`, and move the state on; `rows` are those that take it, None is all."""
        counts = None if rows is None or all(rows) else [int(takes) for takes in rows]
        hidden = self.extend(state, self.embed(token_ids[:, None]), counts=counts)
        self._settle(state, hidden[:, 0], self.newest_entropy(), rows if counts is not None else None)

    def append(self, state: DecodeState, rows: list[list[int]]) -> None:
        """Feed each row tokens of its own, of different numbers, none at all included."""
        # Gradients flow through one pass over all rows, not through parts of a cache.
        groups = [list(range(len(rows)))] if torch.is_grad_enabled() else _alike([len(row) for row in rows])
        for group in groups:
            part, since = state.rows(group), [state.lengths[row] for row in group]
            width = max(len(rows[row]) for row in group)
            padded = [rows[row] + [0] * (width - len(rows[row])) for row in group]
            ids = torch.tensor(padded, dtype=torch.long, device=self.device)
            self.read(part, ids, [len(rows[row]) for row in group])
            state.put(group, part, since)

    def inject(self, state: DecodeState, memory: Tensor, rows: Sequence[bool] | None = None) -> None:
        """Feed latents through the frozen layers: their K and V are appended to every layer's cache (paper A.3).

        Args:
            state: moved on in place. History is not encoded again, the cache is not dropped.
            memory: `[B, K, d]` input embeddings.
            rows: which rows take the injection; None is all. The others are not moved on.
        """
        shape = memory.shape[:2]
        taken = [True] * shape[0] if rows is None else list(rows)
        marks = torch.tensor(taken, device=self.device)[:, None].expand(shape)
        counts = None if all(taken) else [shape[1] * takes for takes in taken]
        hidden = self.extend(state, memory.to(self.dtype), counts=counts, latents=marks)
        self._settle(state, hidden[:, -1], self.newest_entropy(), None if counts is None else taken)

    def read(
        self,
        state: DecodeState,
        embeds: Tensor,
        counts: Sequence[int],
        latents: Tensor | None = None,
        *,
        predict: bool = True,
    ) -> None:
        """Run new positions over the cache, a chunk at a time, and move the state on.

        Args:
            state: rows without a new position stay as they are.
            embeds: `[B, Q, d]` input embeddings, or `[B, Q]` token ids, which are embedded a chunk at a time: all of a
                long prompt would be as large as a part of its cache.
            counts: how many of the Q positions each row takes.
            latents: `[B, Q]` True where a position holds a latent; None is none.
            predict: make the logits of each row's newest position, and not only its hidden state.
        """
        width = embeds.shape[1]
        size = max(1, width) if self.chunk is None else max(_LEAST_CHUNK, self.chunk // embeds.shape[0])
        state.cache.reserve(max(n + count for n, count in zip(state.lengths, counts, strict=True)))
        for start in range(0, width, size):
            piece = embeds[:, start : start + size]
            here = [min(max(count - start, 0), piece.shape[1]) for count in counts]
            ended = [0 < count - start <= piece.shape[1] for count in counts]
            marks = None if latents is None else latents[:, start : start + size]
            last, entropy = self._read_piece(state, self.embed(piece) if piece.dim() == 2 else piece, here, marks)
            if any(ended):
                self._settle(state, last, entropy, None if all(ended) else ended, predict)

    def _read_piece(
        self, state: DecodeState, embeds: Tensor, counts: list[int], latents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden state `[B, d]` and entropy `[B]` of each row's last position in one chunk."""
        whole = all(count == embeds.shape[1] for count in counts)
        newest = torch.tensor([max(count - 1, 0) for count in counts], device=self.device)
        if self.tap is not None and not whole:
            self.tap.at = newest
        try:
            hidden = self.extend(state, embeds, counts=None if whole else counts, latents=latents)
        finally:
            if self.tap is not None:
                self.tap.at = None
        if self._collected is not None:
            self._collected.append(hidden)
        last = hidden[:, -1] if whole else hidden[torch.arange(len(counts), device=self.device), newest]
        return last, self.newest_entropy()

    @contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """Collect the last hidden states `[B, q, d]` of all chunks that are read inside."""
        self._collected = []
        try:
            yield self._collected
        finally:
            self._collected = None

    def gather(self, prompts: list[list[int]]) -> DecodeState:
        """The state of prompts of which only the embeddings are there; nothing is encoded until `reencode`."""
        self._require_room(prompts)
        state = self.empty_state(len(prompts), keep_inputs=True)
        width, counts = max(len(p) for p in prompts), [len(p) for p in prompts]
        ids = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts], device=self.device)
        state.cache.keep_inputs(self.embed(ids), state.cache.place(width, state.ends))
        self._move(state, counts)
        state.encoded = [0] * len(prompts)
        return state

    def row_caches(self, state: DecodeState) -> list[Tensor]:
        """The keys and values of each row, `[N, 2, G, T, d_h]` with a T of its own; copies.

        Raises:
            ConfigError: the layers' keys and values differ in shape, or lie on several devices.
        """
        layers = [torch.stack([entry.keys, entry.values]) for entry in state.cache.layers]
        if len({(layer.shape, layer.device) for layer in layers}) > 1:
            raise ConfigError(f"The layers of {self.name} have caches of several shapes or devices.")
        whole = torch.stack(layers)
        return [whole[:, :, row, :, :length].clone() for row, length in enumerate(state.lengths)]

    def restore(self, prompts: list[list[int]], caches: list[Tensor], hidden: Tensor) -> DecodeState:
        """The state that `prefill` left of prompts, from the caches of their rows and their last states `[B, d]`."""
        state = self.gather(prompts)
        layers, _, heads, _, width = caches[0].shape
        whole = caches[0].new_zeros(layers, 2, len(prompts), heads, state.length, width)
        for row, cache in enumerate(caches):
            whole[:, :, row, :, : cache.shape[3]] = cache
        keys, values = whole.unbind(1)
        state.cache.load(list(keys), list(values), [len(prompt) for prompt in prompts])
        state.encoded = [len(prompt) for prompt in prompts]
        self._settle(state, hidden, state.entropy, None)
        return state

    def reencode(self, state: DecodeState, embeds: Tensor, *, latents: bool = False) -> None:
        """Drop the cache and encode the whole sequence again with new positions behind it.

        MemGen's released code does this for every memory, and for every token after the last one.

        Args:
            state: with its input embeddings; moved on in place.
            embeds: `[B, Q, d]` input embeddings of the new positions.
            latents: whether the new positions hold latents.
        """
        assert state.inputs is not None
        width, counts = embeds.shape[1], [n + embeds.shape[1] for n in state.lengths]
        everything = behind(state.inputs, state.lengths, embeds.to(self.dtype), max(counts))
        new = torch.full(embeds.shape[:2], latents, dtype=torch.bool, device=self.device)
        marks = behind(state.latents, state.lengths, new, max(counts))
        fresh = self.empty_state(state.batch_size, keep_inputs=True)
        fresh.cache.reserve(max(state.cache.capacity, state.length + width))
        self.read(fresh, everything, counts, marks)
        fresh.encoded = [old + new for old, new in zip(state.encoded, fresh.encoded, strict=True)]
        state.adopt(fresh)

    def keep(self, state: DecodeState, kept: list[Tensor]) -> None:
        """Drop all keys and values but some, other ones in each layer and KV head.

        Which position a slot holds is then no longer one number. Without windows nothing asks for it: a later query
        sees every slot.

        Args:
            state: rows of one length.
            kept: for each layer `[B, G, S]` slots in ascending order, S the same everywhere.
        """
        gone = state.length - kept[0].shape[-1]
        state.cache.pick(kept)
        state.evicted = [n + gone for n in state.evicted]

    def import_state(self, tensors: Mapping[str, Tensor]) -> DecodeState:
        """The state that `DecodeState.exported` took apart; its positions count as `reused`.

        Raises:
            ConfigError: the tensors are not those of a state of this backbone in this dtype.
        """
        layers = sum(name.startswith("keys.") for name in tensors)
        needed = {*FORMAT, *(f"{part}.{index}" for part in _CACHED for index in range(layers))}
        if layers not in (0, self.num_layers) or needed - set(tensors):
            raise ConfigError(f"These tensors are no state of {self.name}: some are missing.")
        if tensors["hidden"].dtype != self.dtype:
            raise ConfigError(f"The state is in {tensors['hidden'].dtype} and {self.name} in {self.dtype}.")
        state = self.empty_state(len(tensors["lengths"]), keep_inputs="inputs" in tensors)
        places = [next(layer.parameters()).device for layer in list(self.decoder.layers)[:layers]]
        pairs = [tuple(tensors[f"{part}.{i}"].to(place) for part in _CACHED) for i, place in enumerate(places)]
        state.restore(tensors, pairs)
        return state

    def extend(
        self,
        state: DecodeState,
        embeds: Tensor,
        *,
        counts: Sequence[int] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Run new positions over the cache; gradients flow through the frozen layers where grad mode is on.

        Args:
            state: cache, positions and counts are moved on in place; logits, hidden and entropy are not.
            embeds: `[B, Q, d]` input embeddings.
            counts: how many of the Q positions each row takes, the first ones; None is all.
            latents: `[B, Q]` True where a position holds a latent; None is none.

        Returns:
            `[B, Q, d]` post-norm last hidden states; those beyond a row's count mean nothing.
        """
        width = embeds.shape[1]
        slots = state.cache.place(width, state.ends)
        state.cache.keep_inputs(embeds, slots)
        if latents is not None:
            state.cache.mark(latents, slots)
        # Behind the end of a short row they mean nothing.
        positions = state.next_position[:, None] + torch.arange(width, device=self.device)
        hidden = self.run(state.cache, embeds, slots, positions)
        self._move(state, [width] * state.batch_size if counts is None else counts)
        return hidden

    def run(self, cache: RaggedCache, embeds: Tensor, slots: Slots, positions: Tensor) -> Tensor:
        """The model itself, and nothing besides: one pass at given slots and positions `[B, Q]`.

        Args:
            cache: has been told the slots.
            embeds: `[B, Q, d]` input embeddings.
            slots: where the pass writes and how far it looks.
            positions: `[B, Q]`.

        Returns:
            `[B, Q, d]` post-norm last hidden states.
        """
        if self.tap is not None:
            self.tap.latents = self._uncounted(cache, slots)
        shared = self.device, self.dtype
        masks = {kind: pass_mask(slots, embeds.shape[1], self._window(kind), *shared) for kind in self._mask_kinds}
        output = self.decoder(
            inputs_embeds=embeds,
            attention_mask=masks if self.config.model_type in _MASK_PER_TYPE else masks[self._mask_kinds[0]],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state.to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head of hidden states `[..., d]`, with the family's cap on the logits, in float32 `[..., V]`."""
        logits = self.model.get_output_embeddings()(hidden.to(self.dtype)).float().to(self.device)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def row_entropies(self) -> Tensor:
        """`[B, rows]` entropies that the last pass left in the tap (see `observe`)."""
        if self.tap is None or self.tap.entropy is None:
            raise FlashMemError("The monitor is off: call observe(True) before the pass.")
        return self.tap.entropy

    def empty_state(self, batch: int, *, keep_inputs: bool = False) -> DecodeState:
        """A state of B rows that has seen nothing."""
        cache = RaggedCache(self.num_layers, batch, keep_inputs=keep_inputs)
        make = partial(torch.zeros, device=self.device)
        return new_state(cache, make, self.config.vocab_size, self.hidden_size, self.dtype)

    def _require_room(self, prompts: list[list[int]]) -> None:
        if not prompts or min(len(p) for p in prompts) == 0:
            raise ConfigError("A prompt is empty: every prompt needs at least one token.")
        width = max(len(p) for p in prompts)
        if width > self.max_positions:
            raise PromptTooLongError(
                f"The prompt has {width} tokens and {self.name} has {self.max_positions} positions: "
                "shorten it, or truncate it (--truncate left or middle)."
            )

    def _move(self, state: DecodeState, counts: Sequence[int]) -> None:
        """So many positions of each row are in the cache now."""
        if min(counts) == max(counts):
            state.next_position = state.next_position + counts[0]
        else:
            state.next_position = state.next_position + torch.tensor(counts, device=self.device)
        state.encoded = [n + count for n, count in zip(state.encoded, counts, strict=True)]
        state.cache.commit(counts)

    def _uncounted(self, cache: RaggedCache, slots: Slots) -> Tensor | None:
        """`[B, T]` keys that the monitor leaves out besides the sinks: latents."""
        marks = cache.marks
        if marks is None or marks.data is None or self.monitor.count_latents:
            return None
        missing = slots.end - marks.capacity
        return marks.data if missing <= 0 else nn.functional.pad(marks.data, (0, missing))

    def _window(self, kind: str) -> int | None:
        return int(self.config.sliding_window) if kind == _SLIDING else None

    def newest_entropy(self) -> Tensor | None:
        """`[B]` that the last pass left in the tap."""
        if self.tap is None or self.tap.entropy is None:
            return None
        return self.tap.entropy[:, -1].to(self.device)

    def _settle(
        self,
        state: DecodeState,
        newest: Tensor,
        entropy: Tensor | None,
        rows: Sequence[bool] | None,
        predict: bool = True,
    ) -> None:
        """Take logits, hidden state and entropy from the newest position `[B, d]`, for the rows that moved."""
        logits = self.logits(newest) if predict else state.logits
        entropy = state.entropy if entropy is None else entropy
        if rows is None:
            state.logits, state.hidden, state.entropy = logits, newest, entropy
            return
        moved = torch.tensor(rows, device=self.device)
        state.logits = torch.where(moved[:, None], logits, state.logits)
        state.hidden = torch.where(moved[:, None], newest, state.hidden)
        state.entropy = torch.where(moved, entropy, state.entropy)


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in groups of which none is more than twice as long as another; those without a position are left out."""
    groups: list[list[int]] = []
    for row in sorted((row for row, n in enumerate(lengths) if n), key=lambda row: lengths[row]):
        if groups and lengths[row] <= 2 * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group) for group in groups]
