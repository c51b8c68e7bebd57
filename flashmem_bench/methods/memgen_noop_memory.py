"""`memgen-noop-memory`: MemGen's moments and slots without its content.

The weaver runs and the embedding of a newline is injected K times. Where `memgen` is not better than this, its answers
do not come from what its weaver writes, and being as good as it means nothing.
"""

from __future__ import annotations

from flashmem_bench.methods.base import BuildContext, Method, MethodSpec
from flashmem_bench.methods.latent import USES, LatentMethod, trained_memory
from flashmem_bench.methods.memgen import DEFAULTS, FIXED


def build(context: BuildContext) -> Method:
    """Build memgen with its memories replaced."""
    from flashmem.placebo import NoopMemory

    memory = trained_memory(context)
    memory.cached = True
    return LatentMethod(context, NoopMemory(memory, context.backbone))


SPEC = MethodSpec(
    name="memgen-noop-memory",
    summary="placebo: newline embeddings at memgen's moments",
    build=build,
    fixed=FIXED,
    defaults=DEFAULTS,
    memory_of="memgen",
    uses=USES,
)
