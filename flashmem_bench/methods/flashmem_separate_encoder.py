"""`flashmem-separate-encoder`: the same consolidator over keys and values that are not shared.

An auxiliary encoder, a copy of the backbone's layers with trainable LoRA, encodes the whole history again at each
injection. What it gives beyond `flashmem` is what sharing the cache costs in quality; what it takes longer is what
sharing saves. It has a trained memory of its own.
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="flashmem-separate-encoder",
    summary="the consolidator over an auxiliary encoder that re-encodes the whole history",
    build=build_latent,
    fixed={"memory.source": "separate-encoder"},
    memory_of="flashmem-separate-encoder",
    uses=USES,
)
