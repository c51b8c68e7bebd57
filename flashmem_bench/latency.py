"""What FlashMem costs, measured in one interleaved run against plain decoding.

Protocol "paper": 256 text tokens in 8 cycles of 8 latents and 32 text tokens at a fixed context; the trigger is a
clock, so no threshold is needed and every run does the same work. The EOS is ignored. The monitor watches every step
all the same, as it does in use.

Methods alternate (A B B A ...), so that a drift of the machine's speed falls on both; a ratio is taken run by run.
Inside the timed region are the prefill and the decode loop of the library, outside are tokenising and everything of the
harness. Prompts are random token ids: the time does not depend on what they say. No score is ever given.
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem_bench.clock import Timing, clock_for
from flashmem_bench.errors import UsageError
from flashmem_bench.floor import Floor, Shape, decode_floor
from flashmem_bench.stats import Interval, geometric_mean_ratio

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem.memory import MemorySource

CYCLES, TEXT = 8, 32


@dataclass(frozen=True)
class Comparison:
    """FlashMem against plain decoding at one context.

    Attributes:
        decode_ratio: flashmem / vanilla without prefill, geometric mean over runs with its interval.
        e2e_ratio: the same with prefill.
        floor: what no engine can go below.
    """

    context: int
    runs: int
    decode_ratio: Interval
    e2e_ratio: Interval
    floor: Floor

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "context": self.context,
            "runs": self.runs,
            "decode_ratio": list(self.decode_ratio),
            "e2e_ratio": list(self.e2e_ratio),
            "floor": asdict(self.floor),
        }


def measure(
    backbone: Backbone, memory: MemorySource, contexts: Sequence[int], *, runs: int = 10, seed: int = 0
) -> Iterator[tuple[list[dict[str, Any]], Comparison]]:
    """Measure one context after the other; gives the rows of the latency table and the comparison.

    Args:
        backbone: The model.
        memory: FlashMem's memory source, trained or not.
        contexts: Prompt lengths, tokens.
        runs: Timed runs of each method a context, at least 5.
        seed: Of the random prompts.

    Raises:
        UsageError: Fewer than 5 runs, or a context that does not fit the backbone.
    """
    if runs < 5:
        raise UsageError(f"--runs must be 5 or more, not {runs}: an interval needs that many")
    budget = CYCLES * (TEXT + memory.config.length)
    for context in contexts:
        if context + budget > backbone.max_positions:
            raise UsageError(f"context {context} and {budget} more positions exceed {backbone.max_positions}")
    for context in contexts:
        yield _at_context(backbone, memory, context, runs, seed)


def _at_context(
    backbone: Backbone, memory: MemorySource, context: int, runs: int, seed: int
) -> tuple[list[dict[str, Any]], Comparison]:
    chance = random.Random(f"{seed}|{context}")
    prompt = [chance.randrange(len(backbone.tokenizer)) for _ in range(context)]
    clock = clock_for(backbone.device.type)
    sources = {"vanilla": None, "flashmem": memory}
    for source in (*sources.values(), *sources.values()):
        _timed(backbone, source, prompt, clock)
    times: dict[str, list[Timing]] = {name: [] for name in sources}
    rows: list[dict[str, Any]] = []
    with _quiet_collector():
        for run in range(runs):
            order = list(sources) if run % 2 == 0 else list(sources)[::-1]
            for name in order:
                timing, triggers = _timed(backbone, sources[name], prompt, clock)
                times[name].append(timing)
                rows.append(_row(backbone, name, context, run, triggers, memory, timing))
    ours, plain = times["flashmem"], times["vanilla"]
    comparison = Comparison(
        context,
        runs,
        geometric_mean_ratio([t.decode_ms for t in ours], [t.decode_ms for t in plain]),
        geometric_mean_ratio([t.e2e_ms for t in ours], [t.e2e_ms for t in plain]),
        _floor(backbone, memory, context),
    )
    return rows, comparison


def _timed(backbone: Backbone, memory: MemorySource | None, prompt: list[int], clock: Any) -> tuple[Timing, int]:
    from transformers import GenerationConfig

    from flashmem.generation import generate
    from flashmem.trigger import TriggerConfig

    trigger = TriggerConfig(kind="every", interval=TEXT, cooldown=TEXT, max_injections=CYCLES)
    config = GenerationConfig(max_new_tokens=CYCLES * TEXT, do_sample=False, eos_token_id=[-1])
    clock.start()
    (run,) = generate(
        backbone, [prompt], memory=memory, trigger=trigger if memory else None, generation_config=config, clock=clock
    )
    return clock.result(run.output_tokens), len(run.triggers)


def _row(
    backbone: Backbone, method: str, context: int, run: int, triggers: int, memory: MemorySource, timing: Timing
) -> dict[str, Any]:
    return {
        "method": method,
        "model": backbone.name,
        "random_weights": False,
        "device": backbone.device.type,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "batch_size": 1,
        "exec": "eager",
        "protocol": "paper",
        "context": context,
        "run": run,
        "output_tokens": CYCLES * TEXT,
        "latent_tokens": triggers * memory.config.length,
        "triggers": triggers,
        **{name: getattr(timing, name) for name in ("prefill_ms", "ttft_ms", "decode_ms", "e2e_ms")},
        **{name: getattr(timing, name) for name in ("monitor_ms", "consolidate_ms", "inject_ms")},
        "peak_alloc_bytes": None,
    }


def _floor(backbone: Backbone, memory: MemorySource, context: int) -> Floor:
    return decode_floor(
        Shape.of(backbone.config),
        context=context,
        text_tokens=CYCLES * TEXT,
        injections=CYCLES,
        length=memory.config.length,
        depth=memory.config.depth,
        element_bytes=backbone.dtype.itemsize,
    )


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """No garbage collection inside timed runs."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def append_rows(results_dir: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Add rows to the results folder's latency file and return its path."""
    path = results_dir / "latency" / "runs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    return path


def read_rows(results_dir: Path) -> list[dict[str, Any]]:
    """Read what `append_rows` wrote; a torn last line is left out."""
    path = results_dir / "latency" / "runs.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
