"""`memgen-cached`: MemGen without its avoidable recomputation, the fair rival.

The reasoner's cache is kept and takes the latents as it takes tokens. The weaver's cache is kept too: its K query slots
are cropped after each pass, and the latents with the text since then are appended before the next one. What it encodes
first, the whole prompt, falls into the timed region. Trained weights and answers are those of `memgen`.
"""

from __future__ import annotations

from flashmem_bench.methods.base import BuildContext, MethodSpec
from flashmem_bench.methods.latent import USES, LatentMethod, trained_memory
from flashmem_bench.methods.memgen import DEFAULTS, FIXED


def _build(context: BuildContext) -> LatentMethod:
    memory = trained_memory(context)
    memory.cached = True
    return LatentMethod(context, memory)


SPEC = MethodSpec(
    name="memgen-cached",
    summary="MemGen with both caches kept: the same answers, every avoidable recomputation removed",
    build=_build,
    fixed={**FIXED, "memory.tail_cache": True},
    defaults=DEFAULTS,
    memory_of="memgen",
    uses=USES,
)
