"""`flashmem-fixed-trigger`: memories on a timetable, at text tokens 0, n, 2n and so on.

It separates what the memories give from what their moments give. `trigger.interval` is n; cooldown and cap are those
of `flashmem`.
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="flashmem-fixed-trigger",
    summary="a memory every n text tokens (trigger.interval, 32)",
    build=build_latent,
    fixed={"trigger.kind": "every"},
    memory_of="flashmem",
    uses=USES,
)
