"""`flashmem-plus`: a stronger memory under FlashMem's trigger, the candidate of our ablations.

A block for every layer of the backbone, each reading the cache of its own layer; latents see the latents before them;
and each starts from the embedding that the one before it wrote, as a token does. It has trained weights of its own.
What it costs more is in `consolidate_ms`: K steps of all layers instead of one.
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="flashmem-plus",
    summary="flashmem with a block for every layer and latents that see each other",
    build=build_latent,
    defaults={"memory.depth": None, "memory.latent_attention": "earlier", "memory.feedback": "embedding"},
    memory_of="flashmem-plus",
    uses=USES,
)
