"""`flashmem-mean-memory`: a placebo that keeps what all memories have in common.

The real consolidator runs and the mean memory of the bank is injected. If it does as well as `flashmem`, a constant
prompt of the same length would do.
"""

from __future__ import annotations

from flashmem_bench.methods.base import BuildContext, Method, MethodSpec
from flashmem_bench.methods.latent import USES, LatentMethod, bank_of, trained_memory


def build(context: BuildContext) -> Method:
    """Build flashmem with its memories replaced."""
    from flashmem.placebo import MeanMemory

    return LatentMethod(context, MeanMemory(trained_memory(context), bank_of(context)))


SPEC = MethodSpec(
    name="flashmem-mean-memory",
    summary="placebo: the mean of the memories of other samples",
    build=build,
    memory_of="flashmem",
    uses=USES,
    needs_bank=True,
)
