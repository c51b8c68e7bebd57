"""`flashmem-watch`: the monitor alone, a control.

It watches every step and never writes, so its text is vanilla's. What it costs more than `vanilla` is the price of
watching, and its entropies show what happens after a high one when nothing is done.
"""

from __future__ import annotations

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import USES, build_latent

SPEC = MethodSpec(
    name="flashmem-watch",
    summary="control: the monitor watches and no memory is written",
    build=build_latent,
    fixed={"trigger.max_injections": 0},
    memory_of="flashmem",
    uses=USES,
)
