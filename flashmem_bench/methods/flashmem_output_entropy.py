"""`flashmem-output-entropy`: the rival trigger that costs nothing.

The entropy of the next-token distribution replaces the attention entropy; its threshold is calibrated in the same
way, as its own percentile. Everything else is `flashmem`.
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="flashmem-output-entropy",
    summary="flashmem with the entropy of the next-token distribution as the trigger",
    build=build_latent,
    fixed={"trigger.kind": "output-entropy"},
    memory_of="flashmem",
    uses=USES,
)
