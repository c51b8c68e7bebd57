"""`flashmem`: the method at its operating point.

A memory is made by the shared-KV consolidator and injected when the attention entropy of the newest token exceeds
tau, at most every 32 text tokens and 8 times a sample unless the settings say otherwise (paper sections 3.1 to 3.3).
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="flashmem",
    summary="latent memory from the shared KV cache, injected where the attention entropy is high",
    build=build_latent,
    memory_of="flashmem",
    uses=USES,
)
