"""`lora-sft`: supervised fine-tuning with as many parameters as FlashMem's consolidator has.

LoRA over all linear maps of the layers, fitted on the same examples, steps and batches. A memory that does not beat it
is a way to fine-tune. It answers with the changes merged into the weights, so a step costs what it costs plainly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from flashmem_bench.errors import BenchError
from flashmem_bench.methods.base import BuildContext, MethodSpec
from flashmem_bench.methods.latent import LatentMethod, trained_memory

if TYPE_CHECKING:
    from flashmem.memory import MemorySource


def _build(context: BuildContext) -> LatentMethod:
    return merged(context, trained_memory(context))


def merged(context: BuildContext, adapters: MemorySource) -> LatentMethod:
    """Build plain decoding of the backbone with the changes in its weights."""
    from flashmem.lora import LoRA

    if not isinstance(adapters, LoRA):
        raise BenchError(f"lora-sft needs a LoRA checkpoint, not a {adapters.config.source} memory")
    changed = replace(context, backbone=adapters.merged(context.backbone))
    return LatentMethod(changed, memory=None, trigger_for=lambda sample: None)  # type: ignore[arg-type,return-value]


SPEC = MethodSpec(
    name="lora-sft",
    summary="LoRA fine-tuning with as many parameters as the consolidator, merged",
    build=_build,
    fixed={"memory.source": "lora"},
    defaults={"memory.encoder_rank": None},
    memory_of="lora-sft",
    uses=("memory", "sampling.temperature", "exec"),
)
