"""MemGen's memory (Zhang et al., 2025), as its released code computes it: the heavy rival.

A *weaver*, a copy of the backbone with LoRA on its query and value projections, reads the input embeddings of the whole
sequence, earlier latents included, through a linear map. K learned queries stand behind them: one bank at the prompt
end, another inside the answer. One causal pass gives the last hidden states at the queries, all K at once and not one
after the other, and a linear map back makes them input embeddings of the reasoner.

The reasoner then drops its cache and encodes everything again (`Backbone.reencode`); after the last memory the released
code even decodes without a cache (`tail_cache=False`). `WeaverMemory.cached` keeps both caches instead: the weaver's is
cropped by its K query slots after each pass and extended by what came since. Causality makes the latents the same, so
what is left of the cost is the method's and not the program's.

What the weaver encodes is counted in `DecodeState.woven`, apart from what the reasoner encodes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashmem.backbone import Backbone
from flashmem.encoder import adapt, copy_layers
from flashmem.errors import ConfigError
from flashmem.memory import MemoryConfig, MemoryContext, MemorySource
from flashmem.state import DecodeState, behind
from flashmem.trigger_model import TriggerModel

_STATE = "weaver"


class QueryBank(nn.Module):
    """K learned vectors, normalised and scaled by one number."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(length, width))
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self) -> Tensor:
        """`[K, d]`."""
        return self.norm(self.queries) * self.scale


class WeaverMemory(MemorySource):
    """A LoRA copy of the backbone that turns K queries behind the sequence into K latents.

    Attributes:
        cached: keep the weaver's KV cache between the memories of a sequence. The latents are the same.
    """

    needs_history = True

    def __init__(self, config: MemoryConfig, backbone: Backbone) -> None:
        super().__init__(config)
        width = backbone.hidden_size
        weaver = copy_layers(backbone, backbone.num_layers)
        self.adapters = nn.ModuleList(adapt(weaver, config.encoder_rank))
        self.inward, self.outward = nn.Linear(width, width), nn.Linear(width, width)
        if config.init == "inherited":
            _identity(self.inward)
            _identity(self.outward)
        self.at_prompt_end, self.in_answer = QueryBank(config.length, width), QueryBank(config.length, width)
        if config.trained_trigger:
            self.trigger_model = TriggerModel(backbone, config.encoder_rank)
        self.to(backbone.device, backbone.dtype)
        # In a tuple, so that the frozen weights are no parameters of this module.
        self.weaver = (weaver,)
        self.cached = False

    def forward(self, context: MemoryContext) -> Tensor:
        """See `MemorySource.forward`. Encodes all T positions and K queries; cached, only those since the last time.

        Raises:
            ConfigError: the state has no input embeddings to read.
        """
        state = context.state
        if not state.keeps_inputs:
            raise ConfigError("A weaver needs the history: prefill with keep_inputs=True.")
        weaver, own = self.weaver[0], state.kept.get(_STATE) if self.cached else None
        if own is None:
            own = weaver.empty_state(state.batch_size)
        before = list(own.encoded)
        latents = self._pass(weaver, own, state, context.inside)
        state.woven = [n + now - then for n, now, then in zip(state.woven, own.encoded, before, strict=True)]
        if self.cached:
            own.crop([n - self.config.length for n in own.lengths])
            state.kept[_STATE] = own
        return latents

    def _pass(self, weaver: Backbone, own: DecodeState, state: DecodeState, inside: list[bool]) -> Tensor:
        """One causal pass over what the weaver has not seen yet and the queries behind it."""
        fresh, counts = _unseen(own, state)
        bank = torch.tensor(inside, device=weaver.device)[:, None, None]
        queries = torch.where(bank, self.in_answer(), self.at_prompt_end())
        length = self.config.length
        everything = behind(self.inward(fresh), counts, queries, max(counts) + length)
        with weaver.collecting() as hidden:
            weaver.read(own, everything, [count + length for count in counts], predict=False)
        places = torch.tensor(counts, device=weaver.device)[:, None] + torch.arange(length, device=weaver.device)
        states = torch.cat(hidden, 1)
        return self.outward(states.gather(1, places[..., None].expand(-1, -1, states.shape[-1])))


def _unseen(own: DecodeState, state: DecodeState) -> tuple[Tensor, list[int]]:
    """Input embeddings `[B, Q, d]` that the weaver has not read yet, and how many of the Q each row has."""
    history = state.inputs
    assert history is not None
    counts = [n - seen for n, seen in zip(state.lengths, own.lengths, strict=True)]
    if own.cache.even:
        return history[:, own.length :], counts
    places = torch.tensor(own.lengths, device=history.device)[:, None] + torch.arange(
        max(counts), device=history.device
    )
    places = places.clamp_max(history.shape[1] - 1)
    return history.gather(1, places[..., None].expand(-1, -1, history.shape[-1])), counts


def _identity(linear: nn.Linear) -> None:
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
