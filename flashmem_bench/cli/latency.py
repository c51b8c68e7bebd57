"""`flashmem-bench latency`: the controlled cost protocol, FlashMem against plain decoding in one interleaved run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flashmem_bench.cli import options as o


def latency(
    contexts: Annotated[
        list[str] | None, typer.Option("--contexts", help="Prompt lengths (512,4k).", metavar="T", show_default=False)
    ] = None,
    runs: Annotated[str, typer.Option("--runs", help="Timed runs of each method.", metavar="N")] = "10",
    model: o.Model = "flashmem-tiny",
    checkpoint: o.Checkpoint = None,
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    seed: o.Seed = "0",
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Time flashmem and vanilla at fixed contexts: 8 cycles of 8 latents and 32 text tokens, no scores."""
    o.set_up_logging(debug)
    lengths = [o.count(c, "--contexts") or 0 for c in o.split_list(contexts) or ("512", "4k")]
    from flashmem.memory import MemoryConfig, load_memory, new_memory
    from flashmem_bench.latency import append_rows, measure
    from flashmem_bench.models import load_backbone

    backbone = load_backbone(model, device, dtype)
    # An untrained memory costs what a trained one costs, and this command gives no score.
    memory = load_memory(checkpoint, backbone) if checkpoint else new_memory(MemoryConfig(), backbone).eval()
    found = []
    for rows, comparison in measure(
        backbone, memory, lengths, runs=o.count(runs, "--runs") or 0, seed=o.count(seed, "--seed", 0) or 0
    ):
        append_rows(results_dir, rows)
        found.append(comparison)
        o.say(_sentence(comparison), quiet)
    if not quiet:
        _show(found, backbone.device.type)
    if json:
        o.emit_json([comparison.plain() for comparison in found])
    return 0


def _sentence(comparison: Any) -> str:
    return f"context {comparison.context}: {comparison.runs} runs of each method done"


def _show(found: list[Any], device: str) -> None:
    from rich.console import Console
    from rich.table import Table

    stamp = "CPU timing, not comparable with GPU" if device == "cpu" else device
    table = Table(title=f"flashmem / vanilla, 8 x (8 latents + 32 text tokens) ({stamp})")
    for name in ("context", "decode only", "with prefill", "floor (bytes)", "floor (FLOPs)", "runs"):
        table.add_column(name, justify="right")
    for c in found:
        table.add_row(
            str(c.context),
            "{:.3f} [{:.3f}, {:.3f}]".format(*c.decode_ratio),
            "{:.3f} [{:.3f}, {:.3f}]".format(*c.e2e_ratio),
            f"{c.floor.bytes_ratio:.3f}",
            f"{c.floor.flops_ratio:.3f}",
            str(c.runs),
        )
    Console().print(table)
