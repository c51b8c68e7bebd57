"""`flashmem-random-memory`: a placebo for the content, at the same moments and the same cost.

The real consolidator runs and its output is thrown away; what is injected is Gaussian with the mean and covariance of
real memories, matched in norm. If it does as well as `flashmem`, the content of the memory is not what helps.
"""

from __future__ import annotations

from flashmem_bench.methods.base import BuildContext, Method, MethodSpec
from flashmem_bench.methods.latent import USES, LatentMethod, bank_of, trained_memory


def build(context: BuildContext) -> Method:
    """Build flashmem with its memories replaced."""
    from flashmem.placebo import RandomMemory

    return LatentMethod(context, RandomMemory(trained_memory(context), bank_of(context), context.seed))


SPEC = MethodSpec(
    name="flashmem-random-memory",
    summary="placebo: Gaussian memories with the mean and covariance of real ones",
    build=build,
    memory_of="flashmem",
    uses=USES,
    needs_bank=True,
)
