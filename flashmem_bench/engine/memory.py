"""Peak memory of a long prefill: it should be the weights, the cache, and what one chunk needs.

What a prefill takes beyond weights and cache is measured at every context. At the shortest it is taken for what one
chunk needs (the shortest context holds at least one whole chunk), and everywhere the ratio

    (weights + growth of the peak) / (weights + keys and values + one chunk)

is held against 1.05: an engine whose peak does not grow with the prompt beyond its cache stays at 1, one that keeps
activations or masks of the whole prompt does not. Bytes are counted, not timed, so there is one run a context and no
interval.

On a CPU each context has a process of its own, in which blocks that are freed go back to the system at once: glibc
would else keep some of them, other ones in every run, and the peak of one prompt would differ by a quarter. On a CUDA
device the allocator counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from flashmem_bench.engine.bounds import at_most
from flashmem_bench.engine.figures import Figure, Outcome
from flashmem_bench.engine.gates import full_pass
from flashmem_bench.engine.workload import fixed_length, random_prompt
from flashmem_bench.errors import BenchError
from flashmem_bench.floor import Shape

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem_bench.engine.setting import Setting

NEAR, MOST_GB = 1.05, 24.0
CPU_CONTEXTS, CUDA_CONTEXTS, LONGEST = (8192, 16384, 32768, 65536), (8192, 65536), 131072
_NEW_TOKENS = 8
# Blocks from this size on are mapped one by one; a threshold that is set does not move.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def prefill_memory(setting: Setting) -> Outcome:
    """Growth of the resident memory in a prefill, in a fresh process for each context."""
    found = Outcome("prefill-memory")
    contexts = sorted(setting.lengths(CPU_CONTEXTS, _NEW_TOKENS))
    if not _answers_rightly(setting, found, contexts[0]):
        return found
    grown: dict[int, dict[str, Any]] = {}
    for context in contexts:
        if grown and setting.stop.late:
            found.notes.append(f"no time was left for {context}")
            continue
        grown[context] = _in_a_process(setting, context)
    return _held_against_a_chunk(setting, found, grown, "cpu", CPU_CONTEXTS)


def peak_memory(setting: Setting) -> Outcome:
    """Growth of the allocated memory from prompt to answer on a CUDA device."""
    found = Outcome("peak-memory")
    contexts = sorted(setting.lengths(CUDA_CONTEXTS, _NEW_TOKENS))
    if not _answers_rightly(setting, found, contexts[0]):
        return found
    grown = {context: _on_the_device(setting, context) for context in contexts}
    return _held_against_a_chunk(setting, found, grown, "cuda", CUDA_CONTEXTS)


def prefill_128k(setting: Setting) -> Outcome:
    """Weights and growth of the allocated memory with a very long prompt, GB."""
    found = Outcome("prefill-128k")
    for context in setting.lengths((LONGEST,), _NEW_TOKENS):
        if not _answers_rightly(setting, found, context):
            return found
        grown = _on_the_device(setting, context)
        bound = at_most(setting, MOST_GB, "cuda", context == LONGEST)
        peak = (weight_bytes(setting.backbone) + grown["growth_bytes"]) / 1e9
        found.figures.append(Figure("peak memory, GB", peak, context=context, bound=bound, counted=True))
        found.details[str(context)] = grown
    return found


def weight_bytes(backbone: Backbone) -> int:
    """Return the bytes of all weights, shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in backbone.model.parameters())


def cache_bytes(backbone: Backbone, context: int) -> int:
    """Return the bytes of the keys and values of all layers over a context."""
    shape = Shape.of(backbone.config)
    return shape.layers * shape.cache(context) * backbone.dtype.itemsize


def _held_against_a_chunk(
    setting: Setting, found: Outcome, grown: dict[int, dict[str, Any]], device: str, own: tuple[int, ...]
) -> Outcome:
    backbone = setting.backbone
    weights, first = weight_bytes(backbone), min(grown)
    chunk = max(0, grown[first]["growth_bytes"] - cache_bytes(backbone, first))
    for context, measured in grown.items():
        cache = cache_bytes(backbone, context)
        beyond = measured["growth_bytes"] - cache
        ratio = (weights + measured["growth_bytes"]) / (weights + cache + chunk)
        # The shortest context defines the chunk, so it says nothing about it.
        bound = at_most(setting, NEAR, device, context in own and context != first)
        note = f"{beyond / 1e6:.1f} MB beyond weights and a cache of {cache / 1e6:.1f} MB"
        label = "peak / (weights + cache + one chunk)"
        found.figures.append(Figure(label, ratio, context=context, expected=1.0, bound=bound, note=note, counted=True))
        found.notes.append(f"{context}: {note}")
        found.details[str(context)] = measured | {"cache_bytes": cache, "beyond_bytes": beyond}
    found.details |= {"weight_bytes": weights, "chunk_bytes": chunk}
    return found


def _answers_rightly(setting: Setting, found: Outcome, context: int) -> bool:
    """A prefill in pieces must leave what one pass over the prompt would."""
    from flashmem.generation import generate

    prompt, config = random_prompt(setting.backbone, context, setting.seed), fixed_length(setting.backbone, _NEW_TOKENS)
    (answer,) = generate(setting.backbone, [prompt], generation_config=config)
    return found.holds(full_pass(setting.clean, prompt, answer, f"plain decoding at {context}"))


def _on_the_device(setting: Setting, context: int) -> dict[str, Any]:
    """Growth of the peak while a prompt is answered, by the allocator's own count."""
    import torch

    from flashmem.generation import generate

    prompt, config = random_prompt(setting.backbone, context, setting.seed), fixed_length(setting.backbone, _NEW_TOKENS)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    generate(setting.backbone, [prompt], generation_config=config)
    torch.cuda.synchronize()
    return {"growth_bytes": torch.cuda.max_memory_allocated() - before}


def _in_a_process(setting: Setting, context: int) -> dict[str, Any]:
    asked = {
        "model": setting.model,
        "shape": setting.shape,
        "dtype": str(setting.backbone.dtype).removeprefix("torch."),
        "execution": setting.execution,
        "context": context,
        "seed": setting.seed,
    }
    command = [sys.executable, "-m", "flashmem_bench.engine.prefill_process", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_GIVE_BACK})
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise BenchError(f"the prefill of {context} tokens failed in its process ({reason[0]}): choose --contexts")
    return json.loads(done.stdout.splitlines()[-1])
