"""`flashmem-no-monitor`: the ablation without the cognitive monitor.

Memories come at the prompt end and after every delimiter, under the same cooldown and cap as `flashmem`; the entropy
is not computed.
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="flashmem-no-monitor",
    summary="a memory at the prompt end and at every delimiter (, . newline), no entropy",
    build=build_latent,
    fixed={"trigger.kind": "delimiter"},
    memory_of="flashmem",
    uses=USES,
)
