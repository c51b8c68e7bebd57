"""`flashmem-plus`: the variant of the memory that our ablations chose on validation, under FlashMem's trigger.

One block as in the paper, but each latent sees the latents before it as well as the backbone's cache. It has trained
weights of its own. On the bundled backbone it gained most over three training seeds, and by less than those differ
from each other.
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="flashmem-plus",
    summary="flashmem whose latents see each other, the choice of our ablations",
    build=build_latent,
    defaults={"memory.latent_attention": "earlier"},
    memory_of="flashmem-plus",
    uses=USES,
)
