"""A frozen Hugging Face causal LM behind four verbs: prefill, step, inject, extend.

This is the only file that touches transformers' cache, masks and layer internals. The rest of the library sees a
`Backbone` (weights, tokenizer, shapes) and a `DecodeState` (one batch of sequences under way).

Rows of a batch may disagree: some take an injection while others do not, and prompts are left-padded. A slot that a
row does not use is a *hole*: it has no position, no later query sees it, and it is not counted. All masks are made
here from positions, not from slot numbers, so a sliding window is the same in a batch as alone. Where causality needs
no mask (one unpadded row, most of the time) none is passed, and SDPA keeps its fast kernels.

Invariant: the history goes through the backbone once. `DecodeState.encoded` counts every position that did, and a fork
of a state counts anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from flashmem import monitor as monitoring
from flashmem import weights
from flashmem.errors import ConfigError, FlashMemError, PromptTooLongError
from flashmem.loading import load, require_supported
from flashmem.monitor import MonitorConfig

# These models take one mask per layer type; the others take one tensor.
_MASK_PER_TYPE = frozenset({"qwen2", "qwen3", "gemma2", "gemma3_text"})
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Stands for "sees every key": the query position of a hole, whose output nobody reads but which must stay finite.
_EVERYWHERE = torch.iinfo(torch.int64).max
# Appended positions that take one pass: their mask has so many rows, whatever is appended.
_PIECE = 2048
_EXPORTED = ("positions", "latents", "next_position", "logits", "hidden", "entropy")
_CACHED = ("keys", "values")


@dataclass
class DecodeState:
    """One batch of sequences under way.

    Attributes:
        cache: the backbone's KV cache, T slots.
        positions: `[B, T]` position of the token or latent in each slot; -1 for padding and holes.
        latents: `[B, T]` True where a slot holds a latent.
        next_position: `[B]` position that the next token of each row will take.
        logits: `[B, V]` after the newest position of each row, float32.
        hidden: `[B, d]` post-norm last hidden state of the newest position.
        entropy: `[B]` monitored entropy of the newest position, nats; zeros when the monitor is off.
        encoded: positions that went through the backbone for this state, one count a row.
        reused: positions that it took over from the state that it was forked from, one count a row.
        inputs: the input embeddings `[B, Q, d]` of every pass, kept only for memories that re-encode the history.
        evicted: positions whose keys and values were dropped, one count a row.
        woven: positions that went through a second model of the memory source, one count a row.
        kept: what a memory source keeps between its memories of these sequences.
    """

    cache: DynamicCache
    positions: Tensor
    latents: Tensor
    next_position: Tensor
    logits: Tensor
    hidden: Tensor
    entropy: Tensor
    encoded: list[int]
    ragged: bool
    inputs: list[Tensor] | None = None
    evicted: list[int] = field(default_factory=list)
    woven: list[int] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.positions.shape[0]

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """The cached K and V of one layer, both `[B, G, T, d_h]` (views: do not write)."""
        here, entry = self.positions.device, self.cache.layers[layer]
        return entry.keys.to(here), entry.values.to(here)

    def visible(self, query_positions: Tensor, window: int | None) -> Tensor | None:
        """`[B, 1, Q, T]` True where queries at `[B, Q]` may look; None when every slot is visible to all of them."""
        if not self.ragged and window is None:
            return None
        keys = self.positions[:, None, :]
        seen = (keys >= 0) & (keys <= query_positions[:, :, None])
        if window is not None:
            seen &= keys > query_positions[:, :, None] - window
        return seen[:, None]


@dataclass
class Backbone:
    """A frozen causal LM with a monitored layer.

    Attributes:
        name: what the model was loaded from (the last path component for a local folder).
        model: the transformers model, in eval mode, no parameter requires a gradient.
        tokenizer: its tokenizer.
        monitor: where the Cognitive Monitor looks; assign a new `MonitorConfig` to change it.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        require_supported(self.model.config)
        self.model.set_attn_implementation(monitoring.register())
        self.model.eval().requires_grad_(False)
        self._tap: monitoring.AttentionTap | None = None
        self._fingerprint: str | None = None
        self._mask_kinds = sorted(set(self.layer_types))
        self.observe(False)

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
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

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
        return int(self.config.sliding_window) if self.layer_types[layer] == _SLIDING else None

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
        self._tap = monitoring.attach(self.decoder.layers[self.monitor_layer].self_attn) if on else None
        if self._tap is not None:
            self._tap.rows, self._tap.normalise, self._tap.clock = rows, self.monitor.normalise, clock

    def prefill(self, prompts: list[list[int]], *, keep_inputs: bool = False) -> DecodeState:
        """Encode prompts, left-padded to one length T.

        Args:
            prompts: token ids, one list a row, none empty.
            keep_inputs: keep the input embeddings for a memory that re-encodes the history.

        Raises:
            ConfigError: a prompt is empty.
            PromptTooLongError: a prompt is longer than the backbone's positions.
        """
        width = max((len(p) for p in prompts), default=0)
        if not prompts or min(len(p) for p in prompts) == 0:
            raise ConfigError("A prompt is empty: every prompt needs at least one token.")
        if width > self.max_positions:
            raise PromptTooLongError(
                f"The prompt has {width} tokens and {self.name} has {self.max_positions} positions: "
                "shorten it, or truncate it (--truncate left or middle)."
            )
        ids, real = self._left_pad(prompts, width)
        state = self.empty_state(len(prompts), ragged=bool((~real).any()), keep_inputs=keep_inputs)
        hidden = self.extend(state, self.embed(ids), real=real)
        self._settle(state, hidden, torch.ones(len(prompts), dtype=torch.bool, device=self.device))
        return state

    def step(self, state: DecodeState, token_ids: Tensor) -> None:
        """Feed one token a row, `[B]`, and move the state on."""
        hidden = self.extend(state, self.embed(token_ids[:, None]))
        self._settle(state, hidden, None)

    def append(self, state: DecodeState, rows: list[list[int]]) -> None:
        """Feed each row tokens of its own, of different numbers, none at all included; the shorter ones get holes."""
        width = max(len(row) for row in rows)
        for start in range(0, width, _PIECE):
            self._append_piece(state, [row[start : start + _PIECE] for row in rows])

    def _append_piece(self, state: DecodeState, rows: list[list[int]]) -> None:
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=self.device)
        hidden = self.extend(state, self.embed(ids), real=None if bool(real.all()) else real)
        last = hidden[torch.arange(len(rows), device=self.device), real.sum(1) - 1]
        self._settle(state, last[:, None], real[:, 0])

    def inject(self, state: DecodeState, memory: Tensor, rows: Tensor | None = None) -> None:
        """Feed latents through the frozen layers: their K and V are appended to every layer's cache (paper A.3).

        Args:
            state: moved on in place. History is not encoded again, the cache is not dropped.
            memory: `[B, K, d]` input embeddings.
            rows: `[B]` True where a row takes the injection; None is all. The others get holes.
        """
        shape = memory.shape[:2]
        real = None if rows is None else rows[:, None].expand(shape)
        marks = torch.ones(shape, dtype=torch.bool, device=self.device) if real is None else real
        hidden = self.extend(state, memory.to(self.dtype), real=real, latents=marks)
        self._settle(state, hidden, rows)

    def gather(self, prompts: list[list[int]]) -> DecodeState:
        """The state of prompts of which only the embeddings are there; nothing is encoded until `reencode`."""
        ids, real = self._left_pad(prompts, max(len(p) for p in prompts))
        state = self.empty_state(len(prompts), ragged=bool((~real).any()), keep_inputs=True)
        embeds = self.embed(ids)
        self._advance(state, embeds, real, None)
        state.encoded = [0] * len(prompts)
        state.inputs = [embeds]
        return state

    def row_caches(self, state: DecodeState) -> list[Tensor]:
        """The keys and values of each row without its padding, `[N, 2, G, T, d_h]` with a T of its own; copies.

        Raises:
            ConfigError: the layers' keys and values differ in shape, or lie on several devices.
        """
        layers = [torch.stack([entry.keys, entry.values]) for entry in state.cache.layers]
        if len({(layer.shape, layer.device) for layer in layers}) > 1:
            raise ConfigError(f"The layers of {self.name} have caches of several shapes or devices.")
        whole, real = torch.stack(layers), state.positions >= 0
        return [whole[:, :, row][:, :, :, real[row].to(whole.device)] for row in range(state.batch_size)]

    def restore(self, prompts: list[list[int]], caches: list[Tensor], hidden: Tensor) -> DecodeState:
        """The state that `prefill` left of prompts, from the caches of their rows and their last states `[B, d]`."""
        state = self.gather(prompts)
        layers, _, heads, _, width = caches[0].shape
        slots = state.positions.shape[1]
        whole = caches[0].new_zeros(layers, 2, len(prompts), heads, slots, width)
        for row, cache in enumerate(caches):
            whole[:, :, row, :, slots - cache.shape[3] :] = cache
        for index, (keys, values) in enumerate(whole):
            state.cache.update(keys, values, index)
        state.encoded = [len(prompt) for prompt in prompts]
        self._settle(state, hidden[:, None], None)
        return state

    def reencode(
        self, state: DecodeState, embeds: Tensor, rows: Tensor | None = None, *, latents: bool = False
    ) -> None:
        """Drop the cache and encode the whole sequence again with new positions behind it.

        MemGen's released code does this for every memory, and for every token after the last one.

        Args:
            state: with its input embeddings; moved on in place.
            embeds: `[B, Q, d]` input embeddings of the new positions.
            rows: `[B]` True where a row takes them; None is all. The others get holes.
            latents: whether the new positions hold latents.
        """
        assert state.inputs is not None
        shape = embeds.shape[:2]
        taken = torch.ones(shape, dtype=torch.bool, device=self.device) if rows is None else rows[:, None].expand(shape)
        real = torch.cat([state.positions >= 0, taken], 1)
        marks = torch.cat([state.latents, taken & latents], 1)
        fresh = self.empty_state(state.batch_size, ragged=state.ragged, keep_inputs=True)
        everything = torch.cat([*state.inputs, embeds.to(self.dtype)], 1)
        hidden = self.extend(fresh, everything, real=None if bool(real.all()) else real, latents=marks)
        state.encoded = [old + new for old, new in zip(state.encoded, fresh.encoded, strict=True)]
        for name in ("cache", "positions", "latents", "next_position", "ragged", "inputs"):
            setattr(state, name, getattr(fresh, name))
        # The newest position of a row with holes is not the last slot.
        newest = state.positions.argmax(1)
        self._settle(state, hidden[torch.arange(len(newest), device=self.device), newest][:, None], None)

    def keep(self, state: DecodeState, kept: list[Tensor]) -> None:
        """Drop all keys and values but some, other ones in each layer and KV head.

        Which position a slot holds is then no longer one number. Without padding and windows nothing asks for it: a
        later query sees every slot.

        Args:
            state: one length, no padding.
            kept: for each layer `[B, G, S]` slots in ascending order, S the same everywhere.
        """
        before, after = state.positions.shape[1], kept[0].shape[-1]
        for entry, slots in zip(state.cache.layers, kept, strict=True):
            index = slots.to(entry.keys.device)[..., None].expand(-1, -1, -1, entry.keys.shape[-1])
            entry.keys, entry.values = entry.keys.gather(2, index), entry.values.gather(2, index)
        state.positions, state.latents = state.positions[:, before - after :], state.latents[:, before - after :]
        state.evicted = [n + before - after for n in state.evicted]

    def repeat(self, state: DecodeState, times: int) -> None:
        """Continue every row in several ways: rows 0..n-1 come from row 0, and so on. The prompt counts once a row."""
        state.cache.batch_repeat_interleave(times)
        for name in ("positions", "latents", "next_position", "logits", "hidden", "entropy"):
            setattr(state, name, getattr(state, name).repeat_interleave(times, 0))
        state.encoded = [n if nth == 0 else 0 for n in state.encoded for nth in range(times)]
        state.evicted = [n for n in state.evicted for _ in range(times)]
        state.woven = [n if nth == 0 else 0 for n in state.woven for nth in range(times)]
        state.reused = [n if nth == 0 else 0 for n in state.reused for nth in range(times)]

    def fork(self, state: DecodeState) -> DecodeState:
        """A state that goes on from here by itself, while the given one stays as it is.

        All tensors are shared: whatever writes to a state puts new tensors in the place of the old ones. What the fork
        encodes is counted from 0, and what it has from its parent is in `reused`.
        """
        cache = copy.copy(state.cache)
        cache.layers = [copy.copy(layer) for layer in state.cache.layers]
        return replace(
            state,
            cache=cache,
            encoded=[0] * state.batch_size,
            woven=[0] * state.batch_size,
            evicted=list(state.evicted),
            reused=(state.positions >= 0).sum(1).tolist(),
            inputs=None if state.inputs is None else list(state.inputs),
            kept={name: self.fork(it) if isinstance(it, DecodeState) else it for name, it in state.kept.items()},
        )

    def export_state(self, state: DecodeState) -> dict[str, Tensor]:
        """Everything that a state needs to go on, by name, as tensors of its own device; views, do not write.

        What a memory source keeps (`kept`) is left out: it is made again when it is missing.

        Raises:
            ConfigError: keys and values were evicted, so a slot no longer has one position.
        """
        if any(state.evicted):
            raise ConfigError("A state whose keys and values were evicted cannot be saved: save it before eviction.")
        tensors = {name: getattr(state, name) for name in _EXPORTED} | {"ragged": torch.tensor(state.ragged)}
        for index, entry in enumerate(state.cache.layers):
            tensors |= {f"{part}.{index}": getattr(entry, part) for part in _CACHED}
        return tensors if state.inputs is None else {**tensors, "inputs": torch.cat(state.inputs, 1)}

    def import_state(self, tensors: Mapping[str, Tensor]) -> DecodeState:
        """The state that `export_state` took apart; its positions count as `reused`.

        Raises:
            ConfigError: the tensors are not those of a state of this backbone in this dtype.
        """
        layers = sum(name.startswith("keys.") for name in tensors)
        needed = {*_EXPORTED, "ragged", *(f"{part}.{index}" for part in _CACHED for index in range(layers))}
        if layers not in (0, self.num_layers) or needed - set(tensors):
            raise ConfigError(f"These tensors are no state of {self.name}: some are missing.")
        if tensors["hidden"].dtype != self.dtype:
            raise ConfigError(f"The state is in {tensors['hidden'].dtype} and {self.name} in {self.dtype}.")
        state = self.empty_state(tensors["positions"].shape[0], ragged=bool(tensors["ragged"]))
        for name in _EXPORTED:
            setattr(state, name, tensors[name].to(self.device))
        for index, layer in enumerate(list(self.decoder.layers)[:layers]):
            keys, values = (tensors[f"{part}.{index}"].to(next(layer.parameters()).device) for part in _CACHED)
            state.cache.update(keys, values, index)
        if "inputs" in tensors:
            state.inputs = [tensors["inputs"].to(self.device)]
        state.reused = (state.positions >= 0).sum(1).tolist()
        return state

    def crop(self, state: DecodeState, slots: int) -> None:
        """Forget the newest slots of every row."""
        kept = state.positions.shape[1] - slots
        # Not `DynamicCache.crop`: its argument changed its meaning between the versions that we support.
        for entry in state.cache.layers:
            entry.keys, entry.values = entry.keys[..., :kept, :], entry.values[..., :kept, :]
        state.positions, state.latents = state.positions[:, :kept], state.latents[:, :kept]
        if state.inputs is not None:
            state.inputs = [torch.cat(state.inputs, 1)[:, :kept]]
        state.next_position = state.positions.amax(1) + 1

    def extend(
        self, state: DecodeState, embeds: Tensor, *, real: Tensor | None = None, latents: Tensor | None = None
    ) -> Tensor:
        """Run new positions over the cache; gradients flow through the frozen layers where grad mode is on.

        Args:
            state: cache, positions and counts are moved on in place; logits, hidden and entropy are not.
            embeds: `[B, Q, d]` input embeddings.
            real: `[B, Q]` False where a row has a hole or padding; None is all real.
            latents: `[B, Q]` True where a position holds a latent; None is none.

        Returns:
            `[B, Q, d]` post-norm last hidden states.
        """
        queries = self._advance(state, embeds, real, latents)
        if self._tap is not None:
            self._tap.exclude = self._excluded(state)
        if state.inputs is not None:
            state.inputs.append(embeds)
        masks = self._masks(state, queries)
        output = self.decoder(
            inputs_embeds=embeds,
            attention_mask=masks,
            position_ids=queries.masked_fill(queries == _EVERYWHERE, 0),
            past_key_values=state.cache,
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
        if self._tap is None or self._tap.entropy is None:
            raise FlashMemError("The monitor is off: call observe(True) before the pass.")
        return self._tap.entropy

    def _left_pad(self, prompts: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
        pad = self.tokenizer.pad_token_id or 0
        ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
        real = [[False] * (width - len(p)) + [True] * len(p) for p in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(real, device=self.device)

    def empty_state(self, batch: int, *, ragged: bool = False, keep_inputs: bool = False) -> DecodeState:
        """A state of B rows that has seen nothing."""
        device = self.device
        return DecodeState(
            # Without a config every layer keeps all it saw: windows are masks here, so positions stay countable.
            cache=DynamicCache(),
            positions=torch.empty(batch, 0, dtype=torch.long, device=device),
            latents=torch.empty(batch, 0, dtype=torch.bool, device=device),
            next_position=torch.zeros(batch, dtype=torch.long, device=device),
            logits=torch.zeros(batch, self.config.vocab_size, device=device),
            hidden=torch.zeros(batch, self.hidden_size, device=device, dtype=self.dtype),
            entropy=torch.zeros(batch, device=device),
            encoded=[0] * batch,
            ragged=ragged,
            inputs=[] if keep_inputs else None,
            evicted=[0] * batch,
            woven=[0] * batch,
            reused=[0] * batch,
        )

    def _advance(self, state: DecodeState, embeds: Tensor, real: Tensor | None, latents: Tensor | None) -> Tensor:
        """Give the new slots their positions; returns the query positions `[B, Q]`."""
        batch, width = embeds.shape[:2]
        if real is None:
            offsets = torch.arange(width, device=self.device)
            queries = slots = state.next_position[:, None] + offsets
            state.next_position = state.next_position + width
            state.encoded = [n + width for n in state.encoded]
        else:
            slots = state.next_position[:, None] + real.long().cumsum(1) - 1
            queries = slots.masked_fill(~real, _EVERYWHERE)
            slots = slots.masked_fill(~real, -1)
            counts = real.sum(1)
            state.next_position = state.next_position + counts
            state.encoded = [n + int(c) for n, c in zip(state.encoded, counts.tolist(), strict=True)]
            state.ragged = state.ragged or not bool(real.all())
        state.positions = torch.cat([state.positions, slots], 1)
        marks = torch.zeros(batch, width, dtype=torch.bool, device=self.device) if latents is None else latents
        state.latents = torch.cat([state.latents, marks], 1)
        return queries

    def _excluded(self, state: DecodeState) -> Tensor:
        """`[B, T]` keys that the monitor leaves out. Sinks are the first positions; padding has no weight anyway."""
        sinks = (state.positions >= 0) & (state.positions < self.monitor.sinks)
        return sinks if self.monitor.count_latents else sinks | state.latents

    def _masks(self, state: DecodeState, queries: Tensor) -> Any:
        masks = {kind: self._mask(state, queries, kind) for kind in self._mask_kinds}
        if self.config.model_type in _MASK_PER_TYPE:
            return masks
        return masks[self._mask_kinds[0]]

    def _mask(self, state: DecodeState, queries: Tensor, kind: str) -> Tensor | None:
        """`[B, 1, Q, T]`, or None where plain causality (or, for one query, full sight) is right."""
        length, width = state.positions.shape[1], queries.shape[1]
        window = int(self.config.sliding_window) if kind == _SLIDING else None
        reaches_all = window is None or length <= window
        plain = width == 1 or width == length
        if plain and reaches_all and not state.ragged:
            return None
        keys = state.positions[:, None, :]
        seen = (keys >= 0) & (keys <= queries[:, :, None])
        if not reaches_all:
            seen &= (keys > queries[:, :, None] - window) | (queries == _EVERYWHERE)[:, :, None]
        return seen[:, None]

    def _settle(self, state: DecodeState, hidden: Tensor, rows: Tensor | None) -> None:
        """Take logits, hidden state and entropy from the newest position, for the rows that moved."""
        newest = hidden[:, -1]
        logits = self.logits(newest)
        entropy = self._tap.entropy[:, -1].to(self.device) if self._tap is not None else state.entropy
        if rows is None:
            state.logits, state.hidden, state.entropy = logits, newest, entropy
            return
        state.logits = torch.where(rows[:, None], logits, state.logits)
        state.hidden = torch.where(rows[:, None], newest, state.hidden)
        state.entropy = torch.where(rows, entropy, state.entropy)
