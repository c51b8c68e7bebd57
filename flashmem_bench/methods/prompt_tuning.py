"""`prompt-tuning`: K trained embeddings in the place of FlashMem's memory (Lester et al., 2021).

They stand at the prompt end and are the same for every sample: what the slots are worth without any content of the
sample. `memory.reparam=mlp` gives them as many parameters as the consolidator has, in a network over K trained vectors.
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="prompt-tuning",
    summary="K trained embeddings at the prompt end, the same for every sample",
    build=build_latent,
    fixed={"memory.source": "constant", "trigger.kind": "prompt-end"},
    memory_of="prompt-tuning",
    uses=USES,
)
