"""The separate-encoder ablation: the same consolidator over K,V that are computed anew.

An auxiliary encoder, a copy of the backbone's layers with trainable LoRA on the attention projections, reads the input
embeddings of the *whole* history (earlier latents included) at every injection and shares nothing with the backbone.
The consolidator then attends to the encoder's K,V and starts from the encoder's last hidden state. The difference to
`SharedKVMemory` is exactly what the paper claims to save: one full pass over the history and a second model.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from flashmem.backbone import Backbone
from flashmem.consolidator import Consolidator
from flashmem.errors import ConfigError
from flashmem.memory import MemoryConfig, MemoryContext, MemorySource
from flashmem.state import DecodeState


class LoRALinear(nn.Module):
    """A frozen linear map plus a trainable low-rank one that starts at zero (Hu et al., 2021)."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        device, dtype = frozen.weight.device, frozen.weight.dtype
        self.down = nn.Parameter(torch.empty(rank, frozen.in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`; the scale alpha / rank is 2."""
        return self.frozen(hidden) + 2.0 * (hidden @ self.down.T) @ self.up.T


class SeparateEncoderMemory(MemorySource):
    """The consolidator over an encoder of its own."""

    needs_history = True

    def __init__(self, config: MemoryConfig, backbone: Backbone) -> None:
        super().__init__(config)
        layers = config.encoder_layers or backbone.num_layers
        if layers > backbone.num_layers or layers < config.depth:
            raise ConfigError(
                f"memory.encoder_layers is {layers}; {backbone.name} allows {config.depth} to {backbone.num_layers}."
            )
        encoder = copy_layers(backbone, layers)
        # The blocks are copied before the adapters go in: they are plain layers, as in the shared-KV source.
        self.consolidator = Consolidator(config, encoder).to(backbone.device, backbone.dtype)
        self.adapters = nn.ModuleList(adapt(encoder, config.encoder_rank))
        # In a tuple, so that the frozen weights are no parameters of this module.
        self.encoder = (encoder,)

    def forward(self, context: MemoryContext) -> Tensor:
        """See `MemorySource.forward`. Costs one encoder pass over all T positions."""
        encoder, state = self.encoder[0], context.state
        if not state.keeps_inputs:
            raise ConfigError("A separate encoder needs the history: prefill with keep_inputs=True.")
        fresh = self._encode(encoder, state)
        return self.consolidator(fresh.hidden, encoder, fresh, fresh.keys_values)

    @staticmethod
    def _encode(encoder: Backbone, state: DecodeState) -> DecodeState:
        assert state.inputs is not None
        fresh = encoder.empty_state(state.batch_size)
        encoder.read(fresh, state.inputs, state.lengths, predict=False)
        state.woven = [old + new for old, new in zip(state.woven, fresh.encoded, strict=True)]
        return fresh


def copy_layers(backbone: Backbone, layers: int) -> Backbone:
    """A backbone of its own with the first layers of another."""
    model = copy.deepcopy(backbone.model)
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    return Backbone(backbone.name, model, backbone.tokenizer)


def adapt(encoder: Backbone, rank: int) -> list[LoRALinear]:
    """Put LoRA on every query and value projection (the fused one where there is no other); returns what was put in."""
    adapters = []
    for layer in encoder.decoder.layers:
        for name in ("q_proj", "v_proj", "qkv_proj"):
            if hasattr(layer.self_attn, name):
                adapter = LoRALinear(getattr(layer.self_attn, name), rank)
                setattr(layer.self_attn, name, adapter)
                adapters.append(adapter)
    return adapters
