"""Activation checkpointing of the pass that carries gradients: layers are run again instead of remembered.

transformers' own checkpointing drops the KV cache, because a layer that runs twice would append its keys twice. Here
the pass over [M, y] reads the prefix from layers of a cache that answers `update()` with prefix and new keys together
and keeps nothing, so that a layer may run any number of times. The price is that nothing is appended: the state is
spent after the pass, which is what training wants. The consolidator's blocks are run again too, unless its latents see
earlier ones (`latent_attention="earlier"`), whose cache grows by itself. A separate encoder keeps its activations.

torch's non-reentrant form is used: it needs no input that requires a gradient and keeps autocast as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from flashmem.backbone import Backbone, DecodeState
from flashmem.memory import MemorySource


class _PrefixLayer(DynamicLayer):
    """One layer of a cache that shows new keys behind the prefix's and forgets them."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


@contextmanager
def recomputing(backbone: Backbone, memory: MemorySource, state: DecodeState) -> Iterator[None]:
    """Forward passes inside keep the input of each layer only; gradients are those of the plain pass.

    Args:
        backbone: frozen; its layers are as before afterwards.
        memory: the source whose blocks are run again too, where they can be.
        state: prefilled; its cache is read and no longer appended to.
    """
    state.cache = prefix_of(state.cache)
    modules = [*backbone.decoder.layers, *_blocks(memory)]
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        _restore(modules, before)


def prefix_of(cache: DynamicCache) -> DynamicCache:
    """A cache that shows new keys behind those of `cache` and keeps nothing of them."""
    view = DynamicCache()
    for layer in cache.layers:
        entry = _PrefixLayer()
        entry.keys, entry.values, entry.is_initialized = layer.keys, layer.values, True
        entry.dtype, entry.device = layer.keys.dtype, layer.keys.device
        view.layers.append(entry)
    return view


def _blocks(memory: MemorySource) -> Iterable[nn.Module]:
    consolidator = getattr(memory, "consolidator", None)
    return consolidator.blocks if consolidator is not None and memory.config.latent_attention == "none" else ()


def _restore(modules: list[nn.Module], before: list[Any]) -> None:
    for module, forward in zip(modules, before, strict=True):
        if forward is None:
            del module.forward
        else:  # A hook of accelerate's placement, which lives on the instance as well.
            module.forward = forward
