"""What FlashMem and its rivals cost, measured in one interleaved run.

Protocol "paper": 256 text tokens in 8 cycles of 8 latents and 32 text tokens at a fixed context; the trigger is a
clock, so no threshold is needed and every run does the same work. The EOS is ignored. The monitor watches every step
all the same, as it does in use.

Methods alternate (A B C C B A ...), so that a drift of the machine's speed falls on all of them; a ratio is taken run
by run. Inside the timed region are the prefill and the decode loop of the library, outside are tokenising and
everything of the harness. Prompts are random token ids: the time does not depend on what they say. No score is ever
given. Each run must have encoded the positions that `flashmem_bench.positions` says, or it is not measured.
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem_bench.clock import Timing, clock_for
from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.floor import Floor, Shape, decode_floor
from flashmem_bench.positions import encoded
from flashmem_bench.stats import Interval, geometric_mean_ratio

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem.generation import Generation
    from flashmem.memory import MemorySource

CYCLES, TEXT = 8, 32


# Methods that this protocol can time, and the memory source of each.
SOURCES: dict[str, str | None] = {
    "vanilla": None,
    "flashmem": "consolidator",
    "flashmem-separate-encoder": "separate-encoder",
    "memgen": "weaver",
    "memgen-cached": "weaver",
}


@dataclass(frozen=True)
class Comparison:
    """One method against another at one context.

    Attributes:
        a: The method.
        b: What it is compared with.
        decode_ratio: a / b without prefill, geometric mean over runs with its interval. MemGen as released has no
            prefill of its own: it encodes the prompt first with its first memory, inside the decode loop.
        e2e_ratio: a / b with prefill.
        floor: What no engine can go below, for flashmem against vanilla.
    """

    context: int
    runs: int
    a: str
    b: str
    decode_ratio: Interval
    e2e_ratio: Interval
    floor: Floor | None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "context": self.context,
            "runs": self.runs,
            "a": self.a,
            "b": self.b,
            "decode_ratio": list(self.decode_ratio),
            "e2e_ratio": list(self.e2e_ratio),
            "floor": asdict(self.floor) if self.floor else None,
        }


def measure(
    backbone: Backbone,
    sources: Mapping[str, MemorySource | None],
    contexts: Sequence[int],
    *,
    runs: int = 10,
    seed: int = 0,
) -> Iterator[tuple[list[dict[str, Any]], list[Comparison]]]:
    """Measure one context after the other; gives the rows of the latency table and the comparisons.

    Args:
        backbone: The model.
        sources: Memory source of each method (see `new_sources`), None for plain decoding.
        contexts: Prompt lengths, tokens.
        runs: Timed runs of each method a context, at least 5.
        seed: Of the random prompts.

    Raises:
        UsageError: Fewer than 5 runs, or a context that does not fit the backbone.
    """
    if runs < 5:
        raise UsageError(f"--runs must be 5 or more, not {runs}: an interval needs that many")
    longest = max((source.config.length for source in sources.values() if source is not None), default=0)
    budget = CYCLES * (TEXT + longest)
    for context in contexts:
        if context + budget > backbone.max_positions:
            raise UsageError(f"context {context} and {budget} more positions exceed {backbone.max_positions}")
    for context in contexts:
        yield _at_context(backbone, sources, context, runs, seed)


def new_sources(
    backbone: Backbone, methods: Sequence[str], trained: MemorySource | None = None
) -> dict[str, MemorySource | None]:
    """Return a memory source for each method: the trained one where it fits, else an untrained one of the same cost.

    Raises:
        UsageError: A method that this protocol cannot time.
    """
    from flashmem.memory import MemoryConfig, new_memory

    found: dict[str, MemorySource | None] = {}
    for method in methods:
        if method not in SOURCES:
            raise UsageError(f"latency times {', '.join(SOURCES)}; {method} is none of these")
        kind = SOURCES[method]
        if kind is None or (trained is not None and trained.config.source == kind and kind == "consolidator"):
            found[method] = trained if kind is not None else None
            continue
        rank = 16 if kind == "weaver" else 8
        memory = new_memory(MemoryConfig(source=kind, encoder_rank=rank), backbone).eval()
        memory.drops_cache = method == "memgen"
        if kind == "weaver":
            memory.cached = method == "memgen-cached"
        found[method] = memory
    return found


def _at_context(
    backbone: Backbone, sources: Mapping[str, MemorySource | None], context: int, runs: int, seed: int
) -> tuple[list[dict[str, Any]], list[Comparison]]:
    chance = random.Random(f"{seed}|{context}")
    prompt = [chance.randrange(len(backbone.tokenizer)) for _ in range(context)]
    clock = clock_for(backbone.device.type)
    for source in (*sources.values(), *sources.values()):
        _timed(backbone, source, prompt, clock)
    times: dict[str, list[Timing]] = {name: [] for name in sources}
    rows: list[dict[str, Any]] = []
    with _quiet_collector():
        for run in range(runs):
            order = list(sources) if run % 2 == 0 else list(sources)[::-1]
            for name in order:
                timing, generation = _timed(backbone, sources[name], prompt, clock)
                _check_positions(name, sources[name], generation)
                times[name].append(timing)
                rows.append(_row(backbone, name, context, run, generation, timing))
    return rows, [_compare(backbone, sources, context, a, b, times) for a, b in _pairs(sources)]


def _pairs(sources: Mapping[str, MemorySource | None]) -> list[tuple[str, str]]:
    """Everything against plain decoding, and the rivals against flashmem."""
    plain = [(name, "vanilla") for name in sources if name != "vanilla" and "vanilla" in sources]
    rivals = [name for name, source in sources.items() if source is not None and name != "flashmem"]
    return plain + [(name, "flashmem") for name in rivals if "flashmem" in sources]


def _compare(
    backbone: Backbone,
    sources: Mapping[str, MemorySource | None],
    context: int,
    a: str,
    b: str,
    times: Mapping[str, Sequence[Timing]],
) -> Comparison:
    ours, theirs = times[a], times[b]
    memory = sources[a]
    return Comparison(
        context,
        len(ours),
        a,
        b,
        geometric_mean_ratio([t.decode_ms for t in ours], [t.decode_ms for t in theirs]),
        geometric_mean_ratio([t.e2e_ms for t in ours], [t.e2e_ms for t in theirs]),
        _floor(backbone, memory, context) if (a, b) == ("flashmem", "vanilla") and memory is not None else None,
    )


def _timed(backbone: Backbone, memory: MemorySource | None, prompt: list[int], clock: Any) -> tuple[Timing, Generation]:
    from transformers import GenerationConfig

    from flashmem.generation import generate
    from flashmem.trigger import TriggerConfig

    trigger = TriggerConfig(kind="every", interval=TEXT, cooldown=TEXT, max_injections=CYCLES)
    config = GenerationConfig(max_new_tokens=CYCLES * TEXT, do_sample=False, eos_token_id=[-1])
    clock.start()
    (run,) = generate(
        backbone, [prompt], memory=memory, trigger=trigger if memory else None, generation_config=config, clock=clock
    )
    return clock.result(run.output_tokens), run


def _check_positions(method: str, memory: MemorySource | None, run: Generation) -> None:
    """A time is worth nothing if the work was not the method's.

    Raises:
        BenchError: The engine counted other positions than the formula.
    """
    kind = "weaver-recompute" if method == "memgen" else SOURCES[method]
    moments = [trigger.text_index for trigger in run.triggers]
    wanted = encoded(kind, run.prompt_tokens, run.output_tokens, moments, memory.config.length if memory else 0)
    if wanted != (run.positions_encoded, run.positions_woven):
        raise BenchError(
            f"{method} encoded {run.positions_encoded} and {run.positions_woven} positions, the formula says "
            f"{wanted[0]} and {wanted[1]}"
        )


def _row(
    backbone: Backbone, method: str, context: int, run: int, generation: Generation, timing: Timing
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
        "output_tokens": generation.output_tokens,
        "latent_tokens": generation.latent_tokens,
        "triggers": len(generation.triggers),
        "positions_encoded": generation.positions_encoded,
        "positions_woven": generation.positions_woven,
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
