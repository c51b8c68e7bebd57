"""`flashmem-bench compare A B`: two methods on the same samples."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from flashmem_bench.cli import options as o


def compare(
    a: Annotated[str, typer.Argument(help="Method, or the beginning of a cell's id.", show_default=False)],
    b: Annotated[str, typer.Argument(help="What it is compared with.", show_default=False)],
    suite: o.Suites = None,
    margin: Annotated[
        str | None,
        typer.Option("--margin", help="How much worse still counts as no worse, as a share: 0.02.", metavar="M"),
    ] = None,
    allow_unequal: Annotated[
        bool, typer.Option("--allow-unequal", help="Compare under different conditions too, and say which.")
    ] = False,
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    debug: o.Debug = False,
) -> int:
    """Compare two methods in pairs: scores, samples fixed and broken, time, and whether one is no worse.

    Example: flashmem-bench compare flashmem lora-sft --suite hops --margin 0.02
    """
    o.set_up_logging(debug)
    from flashmem_bench.errors import StoreError, UsageError
    from flashmem_bench.report.cells import load_cells
    from flashmem_bench.report.paired import compare_arms, find_pair
    from flashmem_bench.store import ResultStore

    allowed = o.number(margin, "--margin")
    if allowed is not None and allowed >= 1:
        raise UsageError(f"--margin is a share of the score, such as 0.02, not {margin}")
    if not (results_dir / "runs").is_dir():
        raise StoreError(f"there are no results in {results_dir}; make some with flashmem-bench run")
    cells = load_cells(ResultStore(results_dir))
    suites = o.split_list(suite) or tuple(dict.fromkeys(cell.suite for cell in cells if cell.method in (a, b)))
    found = [
        compare_arms(*find_pair(cells, name, a, b), allowed, unequal=allow_unequal) for name in suites or ("wordmath",)
    ]
    if json:
        o.emit_json([_known(document) for document in found])
    else:
        for document in found:
            o.tell(describe(document))
    return 0


def describe(found: dict[str, Any]) -> str:
    """The comparison in a few lines."""
    from flashmem_bench.report import wording as say
    from flashmem_bench.report.console import CPU_STAMP

    counted = [(found["seeds_a"], found["a"]), (found["seeds_b"], found["b"])]
    seeds = [f"{count} {'seed' if count == 1 else 'seeds'} of {name}" for count, name in counted if count]
    lines = [
        f"{found['suite']}: {found['a']} {say.percent(found['score_a'])} against {found['b']} "
        f"{say.percent(found['score_b'])} on {found['n']} samples{'; ' + ', '.join(seeds) if seeds else ''}",
        f"  difference {say.points(*found['difference'])} points (95 %, paired), p = {say.p_value(found['p_value'])}",
        f"  {found['fixed']} answers fixed, {found['broken']} broken, of {found['pairs']}; "
        f"{found['same_text']} equal texts",
    ]
    if found["minimum_detectable"] is not None:
        detectable = say.points(found["minimum_detectable"])
        lines.append(f"  so many samples show a difference of {detectable} points with a power of 80 %")
    if "margin" in found:
        lines.append(f"  {_no_worse(found)}")
    named = (("time_ratio", "with prefill"), ("decode_time_ratio", "without"))
    ratios = [f"{say.interval(*found[key])} {name}" for key, name in named if not math.isnan(found[key][0])]
    if ratios:
        stamp = f" ({CPU_STAMP})" if found["device"] == "cpu" else ""
        of = f" on {found['timed_pairs']} of the pairs" if found["timed_pairs"] < found["pairs"] else ""
        lines.append(f"  time{_load(found)}: {', '.join(ratios)}{of}{stamp}")
    if found["unequal"]:
        lines.append(f"  not under the same conditions: {found['unequal']}")
    return "\n".join(lines)


def _load(found: dict[str, Any]) -> str:
    """What is no latency of a sample alone says so."""
    size = found["batch_size"] or 1
    return f" of a sample in a batch of {size}" if size > 1 and not found["unequal"] else ""


def _no_worse(found: dict[str, Any]) -> str:
    from flashmem_bench.report import wording as say

    margin = say.share(found["margin"])
    needed = found["samples_for_margin"]
    room = f"; if both are equally good, {math.ceil(needed):,} samples show it with a power of 80 %" if needed else ""
    if found["no_worse"]:
        return f"no worse by more than {margin}: yes"
    sure = found["difference"][2] < -found["margin"]
    return f"no worse by more than {margin}: {'no, it is worse' if sure else 'cannot tell'}{'' if sure else room}"


def _known(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {key: _known(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_known(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
