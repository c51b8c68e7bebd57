"""`flashmem-literal`: Algorithm 1 of the paper word by word.

The token after an injection is sampled from the logits before it, so a memory at the prompt end cannot change the
first token: on one-token answers the texts equal those of `vanilla` by construction.
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="flashmem-literal",
    summary="flashmem exactly as Algorithm 1: no cooldown, no cap, logits from before the injection",
    build=build_latent,
    fixed={
        "trigger.kind": "attention-entropy",
        "trigger.cooldown": 0,
        "trigger.max_injections": None,
        "sampling.logits": "pre",
    },
    memory_of="flashmem",
    uses=USES,
)
