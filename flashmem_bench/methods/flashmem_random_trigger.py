"""`flashmem-random-trigger`: the same memories at random moments, matched to a `flashmem` cell.

`--match within` keeps every sample's number of memories and draws their positions uniformly from the steps that the
cooldown allows: it tests the moment. `--match pooled` fires with one rate over all samples, chosen so that the
expected number of memories is that of the `flashmem` cell: it tests the allocation over samples as well.

The draw depends on the seed and the sample alone, so a run that was interrupted continues with the same moments.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import BenchError
from flashmem_bench.methods.base import BuildContext, Method, MethodSpec, ReferenceSample
from flashmem_bench.methods.latent import USES, LatentMethod, trained_memory, trigger_config

if TYPE_CHECKING:
    from flashmem.trigger import TriggerConfig
    from flashmem_bench.settings import Settings
    from flashmem_bench.tasks import Sample

REFERENCE = "flashmem"


def draw_positions(count: int, steps: int, cooldown: int, key: str) -> tuple[int, ...]:
    """Draw `count` of `steps` decision steps, uniformly over all choices that keep the cooldown.

    A choice with a gap of g between neighbours is a choice without gaps on an axis that is (count - 1) * (g - 1)
    shorter; the shift back makes it uniform.

    Args:
        count: Memories to place.
        steps: Decision steps; 0 is the prompt end.
        cooldown: Text tokens between two memories at least.
        key: What the draw depends on.
    """
    gap = max(1, cooldown)
    free = steps - (count - 1) * (gap - 1)
    if count <= 0 or free < count:
        return tuple(range(0, steps, gap))[:count] if count > 0 else ()
    rng = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
    chosen = sorted(rng.sample(range(free), count))
    return tuple(position + order * (gap - 1) for order, position in enumerate(chosen))


def pooled_rate(reference: Mapping[str, ReferenceSample], cooldown: int, cap: int | None) -> float:
    """Return the chance a step that gives the reference's number of memories over its eligible steps.

    A step is eligible when neither the cooldown nor the cap forbids a memory there.
    """
    fired = sum(len(sample.text_indices) for sample in reference.values())
    eligible = sum(_eligible_steps(sample, cooldown, cap) for sample in reference.values())
    return min(1.0, fired / eligible) if eligible else 0.0


def match(how: str, settings: Settings, reference: Mapping[str, ReferenceSample]) -> dict[str, Any]:
    """Return the rate that matches random moments to the reference over all samples; within samples nothing."""
    if how != "pooled":
        return {}
    return {
        "trigger.rate": round(pooled_rate(reference, settings.trigger.cooldown, settings.trigger.max_injections), 9)
    }


def _eligible_steps(sample: ReferenceSample, cooldown: int, cap: int | None) -> int:
    count, blocked_until, fired = 0, 0, 0
    indices = set(sample.text_indices)
    for step in range(sample.steps):
        if step < blocked_until or (cap is not None and fired >= cap):
            continue
        count += 1
        if step in indices:
            fired += 1
            blocked_until = step + max(1, cooldown)
    return count


def build(context: BuildContext) -> Method:
    """Build the method over the reference cell that the runner made first."""
    if not context.reference:
        raise BenchError(f"flashmem-random-trigger is matched to a {REFERENCE} cell, and none was prepared")
    settings = context.settings.trigger

    def within(sample: Sample) -> TriggerConfig:
        # A batch may reach beyond the limit, to samples that the reference does not have and that are not recorded.
        known = context.reference.get(sample.sample_id, ReferenceSample((), 0))
        key = f"{context.seed}/{sample.sample_id}"
        positions = draw_positions(len(known.text_indices), known.steps, settings.cooldown, key)
        return trigger_config(context, kind="schedule" if positions else "never", positions=positions)

    memory = trained_memory(context)
    if context.match == "within":
        return LatentMethod(context, memory, within)
    return LatentMethod(context, memory)


SPEC = MethodSpec(
    name="flashmem-random-trigger",
    summary="flashmem at random moments, matched to a flashmem cell (--match within or pooled)",
    build=build,
    fixed={"trigger.kind": "random"},
    memory_of="flashmem",
    uses=USES,
    reference=REFERENCE,
    match=match,
)
