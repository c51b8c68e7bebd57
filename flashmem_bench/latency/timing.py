"""One timed run: generate, check that the work was the method's, and turn it into a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmem_bench.clock import HostClock, Timing
from flashmem_bench.errors import BenchError
from flashmem_bench.floor import Shape
from flashmem_bench.latency.arms import EVICTING, Arm
from flashmem_bench.latency.protocol import Protocol
from flashmem_bench.latency.work import run_work
from flashmem_bench.positions import encoded
from flashmem_bench.stats import percentile

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem.generation import Generation
    from flashmem_bench.ceilings import Ceilings

# A gap between the phases and the whole above this share is marked.
INCONSISTENT = 0.02


@dataclass(frozen=True)
class Run:
    """One timed run."""

    timing: Timing
    generation: Generation


def generate_once(backbone: Backbone, arm: Arm, protocol: Protocol, prompt: list[int], clock: Any = None) -> Generation:
    """Generate with an arm; of several answers the first is returned."""
    from flashmem.generation import generate

    return generate(
        backbone,
        [prompt] * arm.rows,
        memory=arm.memory,
        trigger=arm.trigger,
        generation_config=protocol.generation(sampled=arm.rows > 1),
        clock=clock,
        prefill=arm.prefill,
        seed=0,
    )[0]


def timed_run(backbone: Backbone, arm: Arm, protocol: Protocol, prompt: list[int], clock: HostClock) -> Run:
    """Time one generation.

    Raises:
        BenchError: The engine encoded other positions than the formula says: the time would be worth nothing.
    """
    clock.start()
    generation = generate_once(backbone, arm, protocol, prompt, clock)
    run = Run(clock.result(generation.output_tokens), generation)
    check_positions(arm, run.generation)
    return run


def check_positions(arm: Arm, run: Generation) -> None:
    """Hold the positions that the engine counted against the formula.

    Raises:
        BenchError: They differ.
    """
    if arm.name in EVICTING or arm.rows > 1:
        return
    moments = [trigger.text_index for trigger in run.triggers]
    wanted = encoded(arm.kind, run.prompt_tokens, run.output_tokens, moments, arm.length)
    if wanted != (run.positions_encoded, run.positions_woven):
        raise BenchError(
            f"{arm.name} encoded {run.positions_encoded} and {run.positions_woven} positions, the formula says "
            f"{wanted[0]} and {wanted[1]}"
        )


def row_of(
    backbone: Backbone, arm: Arm, protocol: Protocol, context: int, number: int, run: Run, ceilings: Ceilings | None
) -> dict[str, Any]:
    """The columns of a run, without those of its block and of the memory pass."""
    timing, generation = run.timing, run.generation
    plain, triggering = split_gaps(run)
    seconds = (timing.decode_ms or 0.0) / 1e3
    gap = timing.unaccounted_share
    return {
        "method": arm.name,
        "model": backbone.name,
        "random_weights": backbone.name.startswith("random-"),
        "device": backbone.device.type,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "batch_size": arm.rows,
        "exec": backbone.execution,
        "protocol": protocol.name,
        "context": context,
        "run": number,
        "output_tokens": generation.output_tokens,
        "latent_tokens": generation.latent_tokens,
        "triggers": len(generation.triggers),
        "positions_encoded": generation.positions_encoded,
        "positions_woven": generation.positions_woven,
        **{name: getattr(timing, name) for name in ("prefill_ms", "ttft_ms", "decode_ms", "e2e_ms", "tpot_ms")},
        **{name: getattr(timing, name) for name in ("step_ms", "sample_ms")},
        **{name: getattr(timing, name) for name in ("consolidate_ms", "inject_ms")},
        # Inside a pass that is replayed nobody can time it.
        "monitor_ms": timing.monitor_ms if backbone.execution == "eager" else None,
        **_tails("itl_plain_ms", plain),
        **_tails("itl_trigger_ms", triggering),
        "text_tok_s": (generation.output_tokens - 1) / seconds if seconds else None,
        "positions_s": (generation.positions_encoded - context) / seconds if seconds else None,
        "unaccounted_share": gap,
        "timing_consistent": gap is not None and abs(gap) <= INCONSISTENT,
        **hardware_shares(backbone, arm, run, ceilings),
        "peak_alloc_bytes": None,
        "peak_reserved_bytes": None,
    }


def split_gaps(run: Run) -> tuple[list[float], list[float]]:
    """Gaps between tokens without and with a memory in them, ms."""
    hit = {trigger.text_index for trigger in run.generation.triggers}
    gaps = list(enumerate(run.timing.itl_ms, start=1))
    return [gap for place, gap in gaps if place not in hit], [gap for place, gap in gaps if place in hit]


def _tails(name: str, gaps: list[float]) -> dict[str, float | None]:
    return {f"{name}_p{q}": percentile(gaps, q) for q in (50, 90, 95, 99)}


def hardware_shares(backbone: Backbone, arm: Arm, run: Run, ceilings: Ceilings | None) -> dict[str, float | None]:
    """Least bytes and operations a text token of the decode, and how near to the measured ceilings that ran."""
    names = ("bytes_token", "flops_token", "bandwidth_share", "flops_share")
    seconds = (run.timing.decode_ms or 0.0) / 1e3
    if arm.rows > 1 or arm.name in EVICTING or not seconds:
        return dict.fromkeys(names)
    generation = run.generation
    depth = getattr(arm.memory.config, "depth", 1) if arm.memory is not None else 1
    _, after = run_work(
        Shape.of(backbone.config),
        arm.kind,
        prompt=generation.prompt_tokens,
        text=generation.output_tokens,
        moments=[trigger.text_index for trigger in generation.triggers],
        length=arm.length,
        depth=depth or backbone.num_layers,
        element_bytes=backbone.dtype.itemsize,
    )
    tokens = generation.output_tokens
    shares: Mapping[str, float | None] = {
        "bandwidth_share": after.bytes / seconds / ceilings.bytes_s if ceilings else None,
        "flops_share": after.flops / seconds / ceilings.flops if ceilings else None,
    }
    return {"bytes_token": after.bytes / tokens, "flops_token": after.flops / tokens, **shares}
