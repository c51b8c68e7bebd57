"""`flashmem-plus`: the best memory that our ablations found, under FlashMem's trigger.

A block for every layer of the backbone, each reading the cache of its own layer; latents see the latents before them;
and each starts from the embedding that the one before it wrote, as a token does. It is chosen on validation and has
trained weights of its own. What it costs more is in `consolidate_ms`: K steps of all layers instead of one.
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="flashmem-plus",
    summary="flashmem with the best memory of our ablations: all layers, latents that see each other",
    build=build_latent,
    defaults={"memory.depth": None, "memory.latent_attention": "earlier", "memory.feedback": "embedding"},
    memory_of="flashmem-plus",
    uses=USES,
)
