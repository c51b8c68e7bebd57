"""`flashmem-bench engine`: the engine against the hardware and against transformers' `generate`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmem_bench.cli import options as o

if TYPE_CHECKING:
    from flashmem_bench.engine.figures import Outcome
    from flashmem_bench.engine.setting import Setting


def engine(
    check: Annotated[
        list[str] | None, typer.Option("--check", help="Check; repeat or use commas.", metavar="NAME")
    ] = None,
    contexts: Annotated[
        list[str] | None,
        typer.Option("--contexts", help="Prompt lengths in the place of each check's own.", metavar="T"),
    ] = None,
    runs: Annotated[str, typer.Option("--runs", help="Pairs of timed runs, at least.", metavar="N")] = "5",
    most_runs: Annotated[str, typer.Option("--most-runs", help="And at most.", metavar="N")] = "30",
    budget_minutes: Annotated[
        str | None, typer.Option("--budget-minutes", help="Begin no run after this time.", metavar="M")
    ] = None,
    model: o.Model = "flashmem-tiny",
    model_shape: Annotated[
        str | None,
        typer.Option("--model-shape", help="Random weights of a real shape, such as qwen2.5-1.5b.", metavar="S"),
    ] = None,
    exec_: Annotated[str, typer.Option("--exec", help="eager, compile or graph.", metavar="HOW")] = "eager",
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    seed: o.Seed = "0",
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Measure the engine against the hardware and against transformers' generate; wrong answers give no figure.

    Example: flashmem-bench engine --check generate-batch1,decode-4k
    """
    o.set_up_logging(debug)
    minutes = o.number(budget_minutes, "--budget-minutes")
    deadline = time.monotonic() + 60 * minutes if minutes else None
    from flashmem_bench.engine.checks import chosen, others, run_checks
    from flashmem_bench.latency.interleave import Stop
    from flashmem_bench.models import pick_device

    names, least = o.split_list(check), o.count(runs, "--runs") or 0
    wanted = chosen(names, pick_device(device).partition(":")[0])
    stop = Stop(least, max(o.count(most_runs, "--most-runs") or 0, least), deadline=deadline)
    lengths = tuple(o.count(length, "--contexts") or 0 for length in o.split_list(contexts))
    setting = _setting(model, model_shape, device, dtype, exec_, stop, lengths, o.count(seed, "--seed", 0) or 0)
    left_out = [] if names else others(wanted)
    document, found = _document(setting), []
    path = _keep(results_dir, document, left_out)
    for outcome in run_checks(setting, wanted):
        found.append(outcome)
        o.say(f"{outcome.check}: {_progress(outcome)}", quiet)
        document["after"] = _snapshot(setting)
        _keep(results_dir, document, [*found, *left_out])
    if not quiet:
        _show([*found, *left_out], document, str(path))
    if json:
        o.emit_json(document)
    return 1 if any(not outcome.correct for outcome in found) else 3 if any(outcome.skipped for outcome in found) else 0


def _setting(
    model: str, shape: str | None, device: str, dtype: str, how: str, stop: Any, contexts: tuple[int, ...], seed: int
) -> Setting:
    from flashmem_bench.engine.setting import Setting, set_execution
    from flashmem_bench.latency.shapes import random_backbone
    from flashmem_bench.models import load_backbone, pick_device, pick_dtype

    if shape is None:
        backbone = load_backbone(model, device, dtype)
    else:
        place = pick_device(device)
        backbone = random_backbone(shape, place, pick_dtype(dtype, place), seed)
    set_execution(backbone, how)
    return Setting(backbone, model, shape, stop, contexts, seed)


def _snapshot(setting: Setting) -> dict[str, Any]:
    from flashmem_bench.latency.machine import snapshot

    return snapshot(str(setting.backbone.device))


def _progress(outcome: Outcome) -> str:
    if outcome.skipped:
        return f"not run: {outcome.skipped}"
    if not outcome.correct:
        return f"wrong answers, no figure: {outcome.gate}"
    return "; ".join(f"{figure.name} {figure.estimate:.3f} ({figure.verdict})" for figure in outcome.figures)


def _document(setting: Setting) -> dict[str, Any]:
    """Everything but what the checks find."""
    from datetime import UTC, datetime

    from flashmem_bench.engine.table import CPU_STAMP
    from flashmem_bench.environment import describe

    backbone = setting.backbone
    return {
        "stamp": datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ"),
        "command": o.recorded_command(),
        "model": backbone.name,
        "device": setting.device,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "exec": setting.execution,
        "timing": CPU_STAMP if setting.device == "cpu" else f"timing on {setting.device}",
        "seed": setting.seed,
        "machine": describe(backbone),
        "before": _snapshot(setting),
        "after": None,
        "checks": [],
    }


def _keep(results_dir: o.Path, document: dict[str, Any], outcomes: list[Outcome]) -> o.Path:
    from flashmem_bench.engine.files import write

    document["checks"] = [outcome.plain() for outcome in outcomes]
    return write(results_dir, document)


def _show(outcomes: list[Outcome], document: dict[str, Any], path: str) -> None:
    from flashmem_bench.engine.table import figures_table, sentences

    console = o.console()
    console.print(figures_table(outcomes, document))
    for text in sentences(outcomes):
        console.print(text, highlight=False)
    console.print(f"written to {path}", highlight=False)
