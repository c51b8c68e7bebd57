"""`flashmem-matched-fixed`: the same number of memories in each sample, at fixed moments.

`flashmem-fixed-trigger` writes as many memories as its timetable has places; this one writes as many as the `flashmem`
cell wrote in that sample, evenly over the steps that the answer had there and from the prompt end on. What is left of a
difference is the moment alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashmem_bench.methods.base import BuildContext, Method, MethodSpec, ReferenceSample
from flashmem_bench.methods.flashmem_random_trigger import REFERENCE
from flashmem_bench.methods.latent import USES, LatentMethod, trained_memory, trigger_config

if TYPE_CHECKING:
    from flashmem.trigger import TriggerConfig
    from flashmem_bench.tasks import Sample


def even_positions(count: int, steps: int, cooldown: int) -> tuple[int, ...]:
    """Return `count` of `steps` decision steps, evenly spaced from the prompt end on, never closer than the cooldown.

    Args:
        count: Memories to place; as many as a policy placed there under the same cooldown, so there is room.
        steps: Decision steps; 0 is the prompt end.
        cooldown: Text tokens between two memories at least.
    """
    gap = max(1, cooldown, steps // count) if count else 0
    return tuple(order * gap for order in range(count))


def build(context: BuildContext) -> Method:
    """Build the method over the reference cell that the runner made first."""

    def even(sample: Sample) -> TriggerConfig:
        known = context.reference.get(sample.sample_id, ReferenceSample((), 0))
        positions = even_positions(len(known.text_indices), known.steps, context.settings.trigger.cooldown)
        return trigger_config(context, kind="schedule" if positions else "never", positions=positions)

    return LatentMethod(context, trained_memory(context), even)


SPEC = MethodSpec(
    name="flashmem-matched-fixed",
    summary="flashmem at evenly spaced moments, as many in each sample as in a flashmem cell",
    build=build,
    fixed={"trigger.kind": "every"},
    memory_of="flashmem",
    uses=USES,
    reference=REFERENCE,
)
