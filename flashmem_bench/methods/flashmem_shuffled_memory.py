"""`flashmem-shuffled-memory`: a placebo for the sample, at the same moments and the same cost.

The real consolidator runs, then its memory is replaced by that of another sample with another answer, at the same
injection index. If it does as well as `flashmem`, the memory says nothing about the sample.
"""

from __future__ import annotations

from flashmem_bench.methods.base import BuildContext, Method, MethodSpec
from flashmem_bench.methods.latent import USES, LatentMethod, bank_of, trained_memory


def build(context: BuildContext) -> Method:
    """Build flashmem with its memories replaced."""
    from flashmem.placebo import ShuffledMemory

    return LatentMethod(context, ShuffledMemory(trained_memory(context), bank_of(context), context.seed))


SPEC = MethodSpec(
    name="flashmem-shuffled-memory",
    summary="placebo: the memory of another sample with another answer",
    build=build,
    memory_of="flashmem",
    uses=USES,
    needs_bank=True,
)
