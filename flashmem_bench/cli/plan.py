"""`flashmem-bench plan`: hours, device memory and disk of a recipe, before anything runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flashmem_bench.cli import options as o

Tflops = Annotated[
    str | None, typer.Option("--device-tflops", help="Dense TFLOP/s of a device; measured here if left out.")
]
Bandwidth = Annotated[str | None, typer.Option("--bandwidth", help="Its GB/s of memory; measured here if left out.")]
RecipeName = Annotated[str, typer.Argument(help="A shipped recipe by name, or a file.", show_default=False)]


def plan(
    recipe: RecipeName,
    device_tflops: Tflops = None,
    bandwidth: Bandwidth = None,
    data_dir: o.DataDir = None,
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    debug: o.Debug = False,
) -> int:
    """Print what a recipe takes: hours, device memory, disk, and what the estimate assumes.

    Example: flashmem-bench plan qwen2.5-1.5b-gsm8k --device-tflops 312 --bandwidth 2039
    """
    o.set_up_logging(debug)
    from flashmem_bench.recipes import load_recipe
    from flashmem_bench.reproduce import Parts, Place

    chosen = load_recipe(recipe)
    speed = o.number(device_tflops, "--device-tflops"), o.number(bandwidth, "--bandwidth")
    document = planned(Parts(chosen, Place(results_dir, data_dir)), *speed)
    if json:
        o.emit_json(document)
    else:
        show(document)
    return 0


def planned(parts: Any, tflops: float | None, bandwidth: float | None) -> dict[str, Any]:
    """Return the plan of a recipe on the device in question."""
    from dataclasses import replace

    from flashmem_bench import gaps
    from flashmem_bench import plan as planning
    from flashmem_bench.reproduce import require_suites

    recipe = parts.recipe
    require_suites(recipe)
    shape, tied, shape_source = planning.shape_of(recipe)
    samples, samples_source = planning.samples_of(recipe, parts)
    if tflops and bandwidth:
        device = planning.Device(tflops, bandwidth, "as given")
    else:
        device = planning.measure_device(recipe.device, recipe.dtype)
        device = replace(device, tflops=tflops or device.tflops, bandwidth=bandwidth or device.bandwidth)
    document = planning.make_plan(recipe, shape, tied, samples, device)
    document["missing"] = {
        "data": gaps.missing_data(recipe.suites, parts),
        "answers to claims": gaps.open_claims(recipe.run.methods),
    }
    document["assumptions"][:0] = [f"shape from {shape_source}", f"samples: {samples_source}"]
    return document


def show(document: dict[str, Any]) -> None:
    """Print a plan as a table with its assumptions below."""
    from flashmem_bench.cli.lists import show_rows

    total = document["total"]
    rows = [*document["phases"], {"phase": "total", "samples": None, **total, "why": ""}]
    show_rows(
        [
            {
                "phase": row["phase"],
                "samples": row["samples"] or None,
                "hours": f"{row['hours']:.3g}",
                "device GiB": f"{row['memory_gib']:.3g}",
                "disk GiB": f"{row['disk_gib']:.2g}",
                "how": row["why"],
            }
            for row in rows
        ],
        json=False,
    )
    parameters = ", ".join(f"{name} {number / 1e6:.4g} M" for name, number in document["parameters"].items())
    o.tell(f"{document['recipe']} on {document['model']}; parameters: {parameters}")
    counts = ", ".join(f"{split} {number}" for split, number in document["samples"].items())
    o.tell(f"samples: {counts}")
    o.tell(_power(document["power"]))
    for what, entries in document["missing"].items():
        o.tell(f"missing {what}: none" if not entries else f"missing {what}:")
        for sentence in entries:
            o.tell(f"- {sentence}")
    o.tell("assumptions:")
    for sentence in document["assumptions"]:
        o.tell(f"- {sentence}")


def _power(power: dict[str, Any]) -> str:
    """What the comparisons can see, in a sentence or two."""
    least = power["minimum_detectable"]
    seen = f"a difference of {100 * least:.1f} points or more" if least is not None else "no difference at all"
    margins = sorted({(power["margins"][name], needed) for name, needed in power["samples_for_margin"].items()})
    needs = "; ".join(f"a margin of {100 * margin:g} points needs {needed:,.0f}" for margin, needed in margins)
    return (
        f"comparisons: {power['samples_a_suite']:,} paired samples of a suite show {seen} with a power of 80 % where "
        f"two methods differ on {power['discordant_share']:.0%} of them; {needs}"
    )
