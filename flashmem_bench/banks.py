"""Memories of other samples, for the placebos that replace the content of a memory.

A bank is filled on the calibration split, so that no tested sample lends its memory: first under the trigger of the
method itself, which gives memories of every injection index, then, where the trigger fired too rarely, with memories
at the prompt end. It is large enough when 64 memories remain for every answer after those of that answer are left
out, or when the split has no more samples. Banks are cached in `<results>/banks` under the hash of all that they
depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem_bench.methods.base import BuildContext

if TYPE_CHECKING:
    from flashmem.placebo import MemoryBank
    from flashmem_bench.tasks import Sample

MIN_OTHERS = 64


def bank_hash(parts: Mapping[str, Any]) -> str:
    """Return the name of a bank: 16 hex digits over everything that its memories depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def find_or_make_bank(
    folders: Sequence[Path], name: str, context: BuildContext, note: Callable[[str], None] = lambda text: None
) -> MemoryBank:
    """Load the bank `name`, or fill and store it.

    Args:
        folders: Results folders that are searched; a new one goes into the first.
        name: From `bank_hash`.
        context: As for building `flashmem` itself.
        note: Told that it takes a while, and when the bank stays small.
    """
    from flashmem.placebo import MemoryBank

    paths = [folder / "banks" / f"{name}.safetensors" for folder in folders]
    for path in paths:
        if path.exists():
            return MemoryBank.load(path)
    note(f"collecting memories of other samples of {context.suite.name} for the placebos")
    bank = fill_bank(context)
    if not _enough(bank):
        note(f"the bank holds {len(bank)} memories: the calibration split of {context.suite.name} gives no more")
    bank.save(paths[0])
    return bank


def fill_bank(context: BuildContext) -> MemoryBank:
    """Collect memories on the calibration split until the bank is large enough."""
    from flashmem.placebo import MemoryBank
    from flashmem_bench.methods.latent import LatentMethod, trained_memory

    bank = MemoryBank()
    method = LatentMethod(context, trained_memory(context))
    samples = context.suite.samples("calibration")
    _collect(bank, method, samples, context.seed)
    if not _enough(bank):
        _collect(bank, _at_prompt_end(context, method), samples, context.seed)
    return bank


def _at_prompt_end(context: BuildContext, method: Any) -> Any:
    """Return the method with one memory at the prompt end and one token to generate: all that its memory costs."""
    from flashmem_bench.methods.latent import LatentMethod, trigger_config

    short = BuildContext(**{**vars(context), "generation": {**context.generation, "max_new_tokens": 1}})
    trigger = trigger_config(context, kind="prompt-end")
    return LatentMethod(short, method.memory, lambda sample: trigger)


def _collect(bank: MemoryBank, method: Any, samples: Sequence[Sample], seed: int) -> None:
    for index in range(len(samples)):
        if _enough(bank):
            return
        sample = samples[index]
        prompt = method.backbone.encode_chat(sample.prompt)
        (generation,) = method.generate([prompt], [sample], None, seed, keep_memories=True)
        for order, memory in enumerate(generation.memories):
            bank.add(memory, order, sample.answer)


def _enough(bank: MemoryBank) -> bool:
    if len(bank) < MIN_OTHERS:
        return False
    return len(bank) - max(Counter(bank.answers).values()) >= MIN_OTHERS
