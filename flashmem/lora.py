"""LoRA supervised fine-tuning (Hu et al., 2021): what the same parameters do inside the backbone.

The rival asks whether a memory is more than a way to train: LoRA on every linear map of every layer, with the rank at
which it has as many parameters as FlashMem's consolidator, fitted on the same examples, steps and batches. It writes no
latents, so it is no memory; it is a `MemorySource` only to be trained, saved and found like one.

While it is fitted it is applied by hooks, so the backbone that others use stays as it is. It answers merged: `merged`
returns a backbone of its own, with nothing added to a step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from flashmem.backbone import Backbone
from flashmem.errors import ConfigError
from flashmem.memory import MemoryConfig, MemoryContext, MemorySource

# alpha / rank.
_SCALE = 2.0


class LoRA(MemorySource):
    """Low-rank changes of all linear maps in the layers, the LM head left out.

    Args:
        config: `encoder_rank` is the rank; None is that of `matched_rank`.
        backbone: stays frozen and unchanged.
    """

    def __init__(self, config: MemoryConfig, backbone: Backbone) -> None:
        rank = config.encoder_rank or matched_rank(config, backbone)
        super().__init__(replace(config, encoder_rank=rank))
        device, dtype = backbone.device, backbone.dtype
        self.names = list(linear_maps(backbone))
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for linear in linear_maps(backbone).values():
            down = nn.Parameter(torch.empty(rank, linear.in_features, device=device, dtype=dtype))
            nn.init.kaiming_uniform_(down, a=5**0.5)
            self.down.append(down)
            self.up.append(nn.Parameter(torch.zeros(linear.out_features, rank, device=device, dtype=dtype)))

    def forward(self, context: MemoryContext) -> Tensor:
        """Raises: ConfigError: always."""
        raise ConfigError("LoRA writes no memory: it changes the backbone (see LoRA.merged).")

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        """Passes of the backbone inside run with the changes, with gradients to them."""
        maps = linear_maps(backbone)
        hooks = [
            maps[name].register_forward_hook(
                lambda _, given, out, down=down, up=up: out + _SCALE * (given[0] @ down.T) @ up.T
            )
            for name, down, up in zip(self.names, self.down, self.up, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def merged(self, backbone: Backbone) -> Backbone:
        """A backbone with the changes in its weights; what is not changed is shared with the original."""
        maps = linear_maps(backbone)
        own = {id(maps[name].weight) for name in self.names}
        shared = {id(p): p for p in backbone.model.parameters() if id(p) not in own}
        model = copy.deepcopy(backbone.model, shared)
        changed = Backbone(backbone.name, model, backbone.tokenizer, backbone.monitor)
        changed.execution = backbone.execution
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            weight = linear_maps(changed)[name].weight
            # In float32: the product of two bfloat16 factors has digits that a sum in bfloat16 would lose.
            weight.copy_(weight.float() + _SCALE * up.float() @ down.float())
        return changed


def linear_maps(backbone: Backbone) -> dict[str, nn.Linear]:
    """Every linear map in the layers of a backbone, by name."""
    return {name: part for name, part in backbone.decoder.layers.named_modules() if isinstance(part, nn.Linear)}


def matched_rank(config: MemoryConfig, backbone: Backbone) -> int:
    """The rank at which LoRA has about as many parameters as the consolidator of these settings."""
    a_rank = sum(linear.in_features + linear.out_features for linear in linear_maps(backbone).values())
    return max(1, round(consolidator_parameters(config, backbone) / a_rank))


def consolidator_parameters(config: MemoryConfig, backbone: Backbone) -> int:
    """Parameters that training a FlashMem of these settings would fit."""
    from flashmem.consolidator import SharedKVMemory

    memory = SharedKVMemory(replace(config, source="consolidator", encoder_rank=8), backbone)
    return sum(p.numel() for p in memory.trained().values())
