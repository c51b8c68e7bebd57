"""`cot-sc`: self-consistency, the rival that spends its extra computation on more answers.

`vote.draws` answers are sampled at `vote.temperature` from one prefill of the prompt, decoded together, and vote. The
metrics `sc_1` to `sc_n` are the curve over their number, all from one set; the score is that of all of them. Times are
those of the whole set, and so are `positions_encoded` and `drawn_tokens`; `output_tokens` are the winner's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flashmem_bench.methods.base import BuildContext, MethodSpec
from flashmem_bench.voting import winner

if TYPE_CHECKING:
    from flashmem.generation import Generation
    from flashmem.state import DecodeState
    from flashmem_bench.clock import HostClock
    from flashmem_bench.tasks import Sample

_WARM_UP_TOKENS = 16


class SelfConsistency:
    """Samples several answers a prompt and returns the one that wins."""

    reuses_prefix = True

    def __init__(self, context: BuildContext):
        self.context, self.backbone = context, context.backbone
        self.draws = context.settings.vote.draws
        arguments = {"do_sample": True, "temperature": context.settings.vote.temperature}
        self._generation = {**context.generation, **arguments}

    def batch_key(self, sample: Sample) -> object:
        """Return the sample: its answers are a batch of their own."""
        return sample.sample_id

    def warm_up(self, prompt: list[int], sample: Sample) -> None:
        """Draw a few tokens."""
        self._draw(prompt, None, 0, _WARM_UP_TOKENS)

    def generate(
        self,
        prompts: Sequence[list[int]],
        samples: Sequence[Sample],
        clock: HostClock | None,
        seed: int,
        prefill: Callable[[list[list[int]]], DecodeState] | None = None,
    ) -> list[Generation]:
        """Answer one prompt after the other; see `Method.generate`."""
        drawn = [self._draw(prompt, clock, seed, prefill=prefill) for prompt in prompts]
        return [self._vote(answers, sample) for answers, sample in zip(drawn, samples, strict=True)]

    def _draw(
        self,
        prompt: list[int],
        clock: HostClock | None,
        seed: int,
        budget: int | None = None,
        prefill: Callable[[list[list[int]]], DecodeState] | None = None,
    ) -> list[Generation]:
        from transformers import GenerationConfig

        from flashmem.generation import generate

        def shared(prompts: list[list[int]]) -> DecodeState:
            state = (prefill or self.backbone.prefill)(prompts[:1])
            state.repeat(self.draws)
            return state

        tokens = min(budget or self._generation["max_new_tokens"], self._generation["max_new_tokens"])
        config = GenerationConfig(**{**self._generation, "max_new_tokens": tokens})
        return generate(
            self.backbone,
            [prompt] * self.draws,
            generation_config=config,
            clock=clock,
            seed=seed,
            prefill=shared,
        )

    def _vote(self, drawn: list[Generation], sample: Sample) -> Generation:
        found = [self.context.suite.grade(sample, answer.text).extracted for answer in drawn]
        return replace(
            drawn[winner(found)],
            candidates=[answer.text for answer in drawn],
            drawn_tokens=sum(answer.output_tokens for answer in drawn),
            positions_encoded=sum(answer.positions_encoded for answer in drawn),
            positions_reused=sum(answer.positions_reused for answer in drawn),
        )


SPEC = MethodSpec(
    name="cot-sc",
    summary="self-consistency: several sampled answers vote, prefill shared, with the curve over their number",
    build=SelfConsistency,
    uses=("vote", "exec"),
    judges=False,
    together=False,
)
