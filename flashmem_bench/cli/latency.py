"""`flashmem-bench latency`: the controlled cost protocol, FlashMem, its rivals and plain decoding in one run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flashmem_bench.cli import options as o


def latency(
    contexts: Annotated[
        list[str] | None, typer.Option("--contexts", help="Prompt lengths (512,4k).", metavar="T", show_default=False)
    ] = None,
    method: o.Methods = None,
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
    """Time methods at fixed contexts: 8 cycles of 8 latents and 32 text tokens, no scores.

    Example: flashmem-bench latency --contexts 512,4k --method vanilla,flashmem,memgen,memgen-cached
    """
    o.set_up_logging(debug)
    lengths = [o.count(c, "--contexts") or 0 for c in o.split_list(contexts) or ("512", "4k")]
    from flashmem.memory import load_memory
    from flashmem_bench.latency import append_rows, measure, new_sources
    from flashmem_bench.models import load_backbone

    backbone = load_backbone(model, device, dtype)
    # An untrained memory costs what a trained one costs, and this command gives no score.
    trained = load_memory(checkpoint, backbone) if checkpoint else None
    sources = new_sources(backbone, o.split_list(method) or ("vanilla", "flashmem"), trained)
    found = []
    for rows, comparisons in measure(
        backbone, sources, lengths, runs=o.count(runs, "--runs") or 0, seed=o.count(seed, "--seed", 0) or 0
    ):
        append_rows(results_dir, rows)
        found += comparisons
        o.say(f"context {rows[0]['context']}: {len(rows)} runs done", quiet)
    if not quiet:
        _show(found, backbone.device.type)
    if json:
        o.emit_json([comparison.plain() for comparison in found])
    return 0


def _show(found: list[Any], device: str) -> None:
    from rich.console import Console
    from rich.table import Table

    stamp = "CPU timing, not comparable with GPU" if device == "cpu" else device
    table = Table(title=f"Time ratios, 8 x (8 latents + 32 text tokens) ({stamp})")
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
    Console().print(table)
