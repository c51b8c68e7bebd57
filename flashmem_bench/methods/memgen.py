"""`memgen`: the published heavy baseline, in the way that its released code computes.

At the prompt end and at each of the first delimiters (a comma, a full stop or a newline), up to a cap, a LoRA copy of
the backbone, the weaver, reads the embeddings of the whole sequence and writes K latents in one pass. The reasoner then
drops its cache and encodes everything again. `memgen-cached` is the same mathematics without the recomputation; it uses
the same trained weights, and its answers are the same.

The cap counts the memory at the prompt end: 6 is 1 + 5, as in the released configuration. After it the released code
decodes without a cache; `memory.tail_cache=false` does so too. That is a quirk of the program and not of the method,
so it is off by default. So is the trained trigger, as in the released evaluation scripts: it is there where a
checkpoint comes with one (`train --trigger-of`).
"""

from __future__ import annotations

from flashmem_bench.methods.base import BuildContext, MethodSpec
from flashmem_bench.methods.latent import USES, LatentMethod, trained_memory

FIXED = {"memory.source": "weaver", "trigger.kind": "delimiter"}
DEFAULTS = {"trigger.cooldown": 0, "trigger.max_injections": 6, "memory.encoder_rank": 16, "memory.init": "random"}


def _build(context: BuildContext) -> LatentMethod:
    memory = trained_memory(context)
    memory.drops_cache, memory.tail_cache = True, context.settings.memory.tail_cache
    return LatentMethod(context, memory)


SPEC = MethodSpec(
    name="memgen",
    summary="MemGen as released: a LoRA weaver at delimiters, the whole sequence encoded again for each memory",
    build=_build,
    fixed=FIXED,
    defaults=DEFAULTS,
    memory_of="memgen",
    uses=USES,
)
