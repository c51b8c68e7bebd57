"""What the four KV eviction rivals share: plain decoding over what a policy left of the prompt's cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from flashmem_bench.errors import UsageError
from flashmem_bench.methods.base import BuildContext, MethodSpec
from flashmem_bench.methods.latent import LatentMethod

if TYPE_CHECKING:
    from flashmem.generation import Generation
    from flashmem_bench.clock import HostClock
    from flashmem_bench.tasks import Sample


class EvictingMethod(LatentMethod):
    """Plain decoding after one eviction; batches are of one sample, since what is kept is as long in every row."""

    # What is evicted depends on the whole prompt, the question included.
    reuses_prefix = False
    stream = None  # type: ignore[assignment]

    def __init__(self, context: BuildContext, policy: str):
        from flashmem.eviction import EvictionConfig, prefill_and_evict

        super().__init__(context, memory=None, trigger_for=lambda sample: None)  # type: ignore[arg-type,return-value]
        values = context.settings.eviction
        room = context.backbone.max_positions
        if values.budget > room:
            raise UsageError(
                f"eviction.budget is {values.budget} and {context.backbone.name} has {room} positions: "
                f"choose one from {values.sinks + 1} to {room}"
            )
        config = EvictionConfig(policy, **values.model_dump())  # type: ignore[arg-type]
        self.prefill = partial(prefill_and_evict, context.backbone, config=config)

    def batch_key(self, sample: Sample) -> object:
        """Return the sample: it is a batch of its own."""
        return sample.sample_id

    def generate(  # type: ignore[override]
        self, prompts: Sequence[list[int]], samples: Sequence[Sample], clock: HostClock | None, seed: int
    ) -> list[Generation]:
        """See `Method.generate`."""
        from flashmem.generation import generate

        return generate(
            self.backbone,
            list(prompts),
            generation_config=self._generation_config,
            clock=clock,
            seed=seed,
            prefill=self.prefill,
        )


def eviction_spec(policy: str, summary: str) -> MethodSpec:
    """Return the spec of one policy."""
    return MethodSpec(
        name=policy,
        summary=summary,
        build=lambda context: EvictingMethod(context, policy),
        uses=("eviction", "sampling.temperature", "exec"),
        together=False,
    )
