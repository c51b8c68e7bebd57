"""`flashmem-bench latency`: what methods cost at fixed contexts, all in one interleaved run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmem_bench.cli import options as o

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem_bench.latency.interleave import Block


def latency(
    contexts: Annotated[
        list[str] | None, typer.Option("--contexts", help="Prompt lengths (512,4k).", metavar="T", show_default=False)
    ] = None,
    method: o.Methods = None,
    protocol: Annotated[
        str, typer.Option("--protocol", help="paper: 8 x (8 latents + 32 tokens); free: each method's own trigger.")
    ] = "paper",
    runs: Annotated[str, typer.Option("--runs", help="Timed runs of each method, at least.", metavar="N")] = "5",
    most_runs: Annotated[str, typer.Option("--most-runs", help="And at most.", metavar="N")] = "30",
    budget_minutes: Annotated[
        str | None, typer.Option("--budget-minutes", help="Begin no run after this time.", metavar="M")
    ] = None,
    model: o.Model = "flashmem-tiny",
    model_shape: Annotated[
        str | None,
        typer.Option("--model-shape", help="Random weights of a real shape, such as qwen2.5-1.5b.", metavar="S"),
    ] = None,
    checkpoint: o.Checkpoint = None,
    set_: o.Set = None,
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    seed: o.Seed = "0",
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Time methods at fixed contexts in turns, until the ratios are known within 2 %. No scores.

    Example: flashmem-bench latency --contexts 512,4k --method vanilla,flashmem,memgen,memgen-cached
    """
    o.set_up_logging(debug)
    minutes = o.number(budget_minutes, "--budget-minutes")
    deadline = time.monotonic() + 60 * minutes if minutes else None
    lengths = [o.count(c, "--contexts") or 0 for c in o.split_list(contexts) or ("512", "4k")]
    from flashmem_bench.errors import UsageError
    from flashmem_bench.latency.campaign import Campaign, measure
    from flashmem_bench.latency.interleave import Stop
    from flashmem_bench.latency.protocol import PROTOCOLS, Protocol

    if protocol not in PROTOCOLS:
        raise UsageError(f"--protocol is {' or '.join(PROTOCOLS)}, not {protocol!r}")
    least = o.count(runs, "--runs") or 0
    stop = Stop(least, max(o.count(most_runs, "--most-runs") or 0, least), deadline=deadline)
    methods = o.split_list(method) or ("vanilla", "flashmem")
    backbone = _backbone(model, model_shape, device, dtype)
    trained, settings = _trained(checkpoint, backbone), _settings(set_ or [])
    backbone.execution = settings.pop("exec", "eager")
    campaign = Campaign(methods, Protocol(protocol), stop, trained, settings, _ceilings(backbone))  # type: ignore[arg-type]
    found = []
    for block in measure(backbone, campaign, lengths, o.count(seed, "--seed", 0) or 0):
        _keep(results_dir, block)
        found += block.comparisons
        o.say(f"context {block.record['context']}: {block.record['stopped']}; {_observer(block)}", quiet)
    missing = [length for length in lengths if length not in {comparison.context for comparison in found}]
    if missing and deadline is not None:
        o.say(f"no time was left for {', '.join(str(length) for length in missing)}")
    if not quiet:
        _show(found, backbone.device.type)
    if json:
        o.emit_json([comparison.plain() for comparison in found])
    return 0


def _backbone(model: str, shape: str | None, device: str, dtype: str) -> Backbone:
    from flashmem_bench.latency.shapes import random_backbone
    from flashmem_bench.models import load_backbone, pick_device, pick_dtype

    if shape is None:
        return load_backbone(model, device, dtype)
    place = pick_device(device)
    return random_backbone(shape, place, pick_dtype(dtype, place))


def _trained(checkpoint: str | None, backbone: Backbone) -> Any:
    """A trained memory; an untrained one costs the same, and this command gives no score."""
    from flashmem.memory import load_memory

    return load_memory(checkpoint, backbone) if checkpoint else None


def _settings(assignments: list[str]) -> dict[str, Any]:
    """Dotted settings without the schema of `run`, which needs more packages than this command may."""
    import yaml

    from flashmem_bench.bounded_yaml import load_bounded
    from flashmem_bench.errors import UsageError

    found = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or key.partition(".")[0] not in ("memory", "trigger", "eviction", "exec"):
            raise UsageError(
                f"--set takes memory.*, trigger.*, eviction.* or exec, such as memory.length=4, not {text!r}"
            )
        try:
            found[key] = load_bounded(value.encode("utf-8", "replace"), yaml.SafeLoader)
        except ValueError as error:
            raise UsageError(f"{value!r} is no value for {key}: {error}") from error
    return found


def _ceilings(backbone: Backbone) -> Any:
    from flashmem_bench.ceilings import measure_ceilings

    return measure_ceilings(str(backbone.device), backbone.dtype)


def _keep(results_dir: o.Path, block: Block) -> None:
    from flashmem_bench.environment import describe_machine
    from flashmem_bench.latency.files import BLOCKS, append

    append(results_dir, block.rows)
    append(results_dir, [{**block.record, "machine": describe_machine(), "command": o.recorded_command()}], BLOCKS)


def _observer(block: Block) -> str:
    return "observing costs {:+.1%} [{:+.1%}, {:+.1%}]".format(
        *(value - 1 for value in block.record["observer_ratio_of_all"])
    )


def _show(found: list[Any], device: str) -> None:
    from rich.table import Table

    stamp = "CPU timing, not comparable with GPU" if device == "cpu" else device
    table = Table(title=f"Time ratios at fixed contexts ({stamp})")
    table.add_column("methods")
    for name in ("context", "decode only", "with prefill", "floor (bytes)", "floor (FLOPs)", "runs"):
        table.add_column(name, justify="right")
    for c in found:
        table.add_row(
            f"{c.a} / {c.b}",
            str(c.context),
            "{:.3f} [{:.3f}, {:.3f}]".format(*c.decode_ratio),
            "{:.3f} [{:.3f}, {:.3f}]".format(*c.e2e_ratio),
            f"{c.floor.bytes_ratio:.3f}" if c.floor else "",
            f"{c.floor.flops_ratio:.3f}" if c.floor else "",
            str(c.runs),
        )
    o.console().print(table)
