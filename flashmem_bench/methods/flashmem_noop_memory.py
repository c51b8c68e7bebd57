"""`flashmem-noop-memory`: a placebo for the slots alone.

The real consolidator runs and the embedding of a newline is injected K times. What it changes against `vanilla` is
the effect of extra positions to attend to, without any content.
"""

from __future__ import annotations

from flashmem_bench.methods.base import BuildContext, Method, MethodSpec
from flashmem_bench.methods.latent import USES, LatentMethod, trained_memory


def build(context: BuildContext) -> Method:
    """Build flashmem with its memories replaced."""
    from flashmem.placebo import NoopMemory

    return LatentMethod(context, NoopMemory(trained_memory(context), context.backbone))


SPEC = MethodSpec(
    name="flashmem-noop-memory",
    summary="placebo: K newline embeddings, slots that the backbone knows",
    build=build,
    memory_of="flashmem",
    uses=USES,
)
