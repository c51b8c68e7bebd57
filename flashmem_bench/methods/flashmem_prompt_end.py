"""`flashmem-prompt-end`: one memory right after the prompt, for every sample.

This is where memories are trained, so it is the fair upper line for a trigger: what the memory gives when it is
always there and the entropy decides nothing.
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="flashmem-prompt-end",
    summary="one memory at the prompt end, always: the training distribution",
    build=build_latent,
    fixed={"trigger.kind": "prompt-end"},
    memory_of="flashmem",
    uses=USES,
)
