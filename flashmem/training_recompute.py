"""Activation checkpointing of the pass that carries gradients: layers are run again instead of remembered.

transformers' own checkpointing drops the KV cache, because a layer that runs twice would append its keys twice. Here
the pass over [M, y] runs on a cache that shows the prefix and the new keys together and keeps nothing of them, so that
a layer may run any number of times. The price is that nothing is appended: the state is spent after the pass, which is
what training wants. The consolidator's blocks are run again too, unless its latents see
earlier ones (`latent_attention="earlier"`), whose cache grows by itself. A separate encoder keeps its activations.

torch's non-reentrant form is used: it needs no input that requires a gradient and keeps autocast as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from flashmem.backbone import Backbone
from flashmem.memory import MemorySource
from flashmem.state import DecodeState


@contextmanager
def recomputing(backbone: Backbone, memory: MemorySource, state: DecodeState) -> Iterator[None]:
    """Forward passes inside keep the input of each layer only; gradients are those of the plain pass.

    Args:
        backbone: frozen; its layers are as before afterwards.
        memory: the source whose blocks are run again too, where they can be.
        state: prefilled; its cache is read and no longer appended to.
    """
    state.cache = state.cache.reading()
    modules = [*backbone.decoder.layers, *_blocks(memory)]
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        _restore(modules, before)


def _blocks(memory: MemorySource) -> Iterable[nn.Module]:
    consolidator = getattr(memory, "consolidator", None)
    return consolidator.blocks if consolidator is not None and memory.config.latent_attention == "none" else ()


def _restore(modules: list[nn.Module], before: list[Any]) -> None:
    for module, forward in zip(modules, before, strict=True):
        if forward is None:
            del module.forward
        else:  # A hook of accelerate's placement, which lives on the instance as well.
            module.forward = forward
