"""`vanilla`: the frozen backbone alone, the baseline of every comparison.

It runs the same decode loop as the latent methods, without a monitor and without a memory, so that a difference in
time is the method's and not the loop's.
"""

from __future__ import annotations

from flashmem_bench.methods.base import BuildContext, Method, MethodSpec
from flashmem_bench.methods.latent import LatentMethod


def build(context: BuildContext) -> Method:
    """Build plain decoding."""
    return LatentMethod(context, memory=None, trigger_for=lambda sample: None)  # type: ignore[arg-type,return-value]


SPEC = MethodSpec(name="vanilla", summary="the plain backbone", build=build)
