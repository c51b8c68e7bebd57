"""Who answers the prompts: our engine, and transformers' `generate` on a model of its own.

Both get lists of token ids and give lists of token ids, the EOS included, and both pad inside what is timed. Ours
also decodes the text, which `generate` does not. `generate` runs greedily under inference mode, with its own cache and
SDPA, on batches that are left-padded in the order of the prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmem.backbone import Backbone

Answers = list[list[int]]


def settle(backbone: Backbone) -> None:
    """Wait until the device is idle."""
    if backbone.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def timed(backbone: Backbone, work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a piece of work takes, from an idle device to an idle device, and its result."""
    settle(backbone)
    begun = time.perf_counter()
    result = work()
    settle(backbone)
    return time.perf_counter() - begun, result


def ours(backbone: Backbone, prompts: Answers, config: Any, rows: int) -> Answers:
    """Answer all prompts with at most `rows` of them under way; a row that ends makes room for a waiting prompt."""
    from flashmem.generation import generate

    found = generate(backbone, prompts, generation_config=config, batch_size=rows)
    return [answer.token_ids for answer in found]


def ours_in_batches(backbone: Backbone, prompts: Answers, config: Any, rows: int) -> Answers:
    """Answer `rows` prompts after the other `rows`; a row that ends waits for those beside it."""
    from flashmem.generation import generate

    batches = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
    found = [answer for batch in batches for answer in generate(backbone, batch, generation_config=config)]
    return [answer.token_ids for answer in found]


def theirs(clean: Any, prompts: Answers, config: Any, rows: int) -> Answers:
    """Answer all prompts in left-padded batches of `rows` with transformers' `generate`."""
    batches = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
    return [answer for batch in batches for answer in _their_batch(clean, batch, config)]


def _their_batch(clean: Any, prompts: Answers, config: Any, criteria: Any = None) -> Answers:
    import torch

    width = max(len(prompt) for prompt in prompts)
    pads = [width - len(prompt) for prompt in prompts]
    ids = [[config.pad_token_id] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in pads]
    with torch.inference_mode():
        found = clean.generate(
            input_ids=torch.tensor(ids, device=clean.device),
            attention_mask=torch.tensor(mask, device=clean.device),
            generation_config=config,
            stopping_criteria=criteria,
        )
    return [_until(row, config.eos_token_id) for row in found[:, width:].tolist()]


def _until(tokens: list[int], eos: list[int]) -> list[int]:
    """The tokens up to the first EOS, that one included."""
    end = next((place for place, token in enumerate(tokens) if token in eos), len(tokens) - 1)
    return tokens[: end + 1]


def our_decode_seconds(backbone: Backbone, prompts: Answers, config: Any) -> dict[str, float]:
    """Generate once and return the seconds from the first token on the host to the last, and the tokens between."""
    from flashmem.generation import generate
    from flashmem_bench.clock import clock_for

    clock = clock_for(backbone.device.type)
    clock.start()
    found = generate(backbone, prompts, generation_config=config, clock=clock)
    longest = max(answer.output_tokens for answer in found)
    timing = clock.result(longest)
    seconds = ((timing.e2e_ms or 0.0) - (timing.ttft_ms or 0.0)) / 1e3
    return {"seconds": seconds, "tokens": float(sum(answer.output_tokens - 1 for answer in found))}


def their_decode_seconds(clean: Any, backbone: Backbone, prompts: Answers, config: Any) -> dict[str, float]:
    """The same of `generate`: a stopping criterion that stops nothing notes when the first token is there."""
    from transformers import StoppingCriteriaList

    settle(backbone)
    watch = _FirstToken(backbone)
    found = _their_batch(clean, prompts, config, StoppingCriteriaList([watch]))
    settle(backbone)
    return {"seconds": time.perf_counter() - watch.seen, "tokens": float(sum(len(answer) - 1 for answer in found))}


class _FirstToken:
    """Notes when the first token is on the device, and never stops anything."""

    def __init__(self, backbone: Backbone):
        self._backbone, self.seen = backbone, 0.0

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        import torch

        if not self.seen:
            settle(self._backbone)
            self.seen = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
