"""`flashmem-bench train`: fits a memory on one suite, or jointly on several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmem_bench.cli import options as o

if TYPE_CHECKING:
    from flashmem_bench.fitting import FitRequest, FitResult
    from flashmem_bench.session import Request

_PANEL = "Training"


_Minutes = Annotated[str | None, typer.Option("--minutes", help="Stop after this time.", rich_help_panel=_PANEL)]
_Steps = Annotated[str | None, typer.Option("--steps", help="Optimiser steps.", rich_help_panel=_PANEL)]
_Epochs = Annotated[str, typer.Option("--epochs", help="Passes over the examples.", rich_help_panel=_PANEL)]
_BatchSize = Annotated[str, typer.Option("--batch-size", help="Examples a step.", rich_help_panel=_PANEL)]
_Lr = Annotated[str, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=_PANEL)]
_Insertion = Annotated[
    str, typer.Option("--insertion", help="Where memories go: prompt-end or mixed.", rich_help_panel=_PANEL)
]
_Targets = Annotated[
    str | None,
    typer.Option("--targets", help="gold, or self: the backbone's own right answers.", rich_help_panel=_PANEL),
]
_TrainSeed = Annotated[str, typer.Option("--train-seed", help="Seed.", rich_help_panel=_PANEL)]
_Validation = Annotated[str, typer.Option("--validation", help="Validation samples a suite.", rich_help_panel=_PANEL)]
_Out = Annotated[o.Path | None, typer.Option("--out", help="Folder of the checkpoint.", rich_help_panel=_PANEL)]
_Provisional = Annotated[
    bool, typer.Option("--provisional", help="Usable by default whatever its harm.", rich_help_panel=_PANEL)
]


def train(
    method: o.Methods = None,
    suite: o.Suites = None,
    model: o.Model = "flashmem-tiny",
    limit: o.Limit = None,
    minutes: _Minutes = None,
    steps: _Steps = None,
    epochs: _Epochs = "5",
    batch_size: _BatchSize = "64",
    lr: _Lr = "1e-5",
    insertion: _Insertion = "prompt-end",
    targets: _Targets = None,
    train_seed: _TrainSeed = "0",
    validation: _Validation = "200",
    out: _Out = None,
    provisional: _Provisional = False,
    device: o.Device = "auto",
    dtype: o.DType = "float32",
    set_: o.Set = None,
    data_dir: o.DataDir = None,
    skip_bad_rows: o.SkipBadRows = False,
    trust_suite: o.TrustSuite = False,
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Fit the memory of a method; stopped, the same command continues. --limit counts training samples a suite.

    Example: flashmem-bench train --method flashmem --suite wordmath,hops --minutes 10
    """
    o.set_up_logging(debug)
    from flashmem_bench.errors import UsageError
    from flashmem_bench.fitting import FitRequest
    from flashmem_bench.models import BUNDLED
    from flashmem_bench.registry import get_methods
    from flashmem_bench.session import Request, Session
    from flashmem_bench.settings import parse_assignments

    methods = get_methods(o.split_list(method) or ("flashmem",))
    if len(methods) != 1:
        raise UsageError("train fits one method at a time; give one --method")
    request = Request(
        suites=o.known_suites(suite),
        methods=(methods[0].name,),
        model=model,
        device=device,
        dtype=dtype,
        settings=parse_assignments(set_ or []),
        data_dir=data_dir,
        skip_bad_rows=skip_bad_rows,
        trust_suite=trust_suite,
        results_dir=results_dir,
        command=o.command_line(),
    )
    numbers = _train_config(
        minutes=minutes, steps=steps, epochs=epochs, batch_size=batch_size, lr=lr, insertion=insertion, seed=train_seed
    )
    wanted = FitRequest(
        method=methods[0].name,
        targets=targets or ("gold" if model == BUNDLED else "self"),
        train=numbers,
        examples=o.count(limit, "--limit"),
        validation=o.count(validation, "--validation") or 200,
        out=out,
        provisional=provisional,
    )
    return _execute(Session(request), wanted, json=json, quiet=quiet)


def _train_config(**given: Any) -> Any:
    """Check the numbers before torch is loaded, then make the library's configuration."""
    from flashmem_bench.errors import UsageError

    values = {
        "max_minutes": o.number(given["minutes"], "--minutes"),
        "max_steps": o.count(given["steps"], "--steps"),
        "epochs": o.number(given["epochs"], "--epochs"),
        "batch_size": o.count(given["batch_size"], "--batch-size"),
        "lr": o.number(given["lr"], "--lr"),
        "insertion": given["insertion"],
        "seed": o.count(given["seed"], "--train-seed", least=0),
    }
    if values["insertion"] not in ("prompt-end", "mixed"):
        raise UsageError(f"--insertion must be prompt-end or mixed, not {values['insertion']!r}")
    from flashmem.training import TrainConfig

    return TrainConfig(**values)


def _execute(session: Any, wanted: FitRequest, *, json: bool, quiet: bool) -> int:
    from flashmem_bench.fitting import fit
    from flashmem_bench.watch import watching

    _ = session.store
    with watching(quiet) as watcher:
        result = fit(session, wanted, watcher)
    if json:
        o.emit_json({"checkpoint": str(result.path), "metadata": result.metadata, "trained": result.report is not None})
    elif not quiet:
        _show(session.request, wanted, result)
    return 0


def _show(request: Request, wanted: FitRequest, result: FitResult) -> None:
    from flashmem_bench.checkpoints import HARM_LIMIT, command_options

    facts = result.metadata
    if result.report is None:
        print(f"{result.path} is trained already; choose another --train-seed or --out to train again")
    else:
        print(f"{facts['steps']} steps on {facts['examples']} examples, loss {facts['first_loss']:.3f} to "
              f"{facts['final_loss']:.3f}")  # fmt: skip
    for name in facts["suites"]:
        print(f"{name}: vanilla {facts['vanilla_score_by_suite'][name]:.3f}, one memory at the prompt end "
              f"{facts['memory_score_by_suite'][name]:.3f} (gain {facts['gain_by_suite'][name]:.3f}, harm "
              f"{facts['harm_by_suite'][name]:.3f})")  # fmt: skip
    harmful = [name for name in facts["suites"] if facts["harm_by_suite"][name] > HARM_LIMIT]
    if harmful and not wanted.provisional:
        print(f"harm is above {HARM_LIMIT:.0%} on {', '.join(harmful)}: there it is used only with --checkpoint")
    print(f"checkpoint: {result.path}")
    options = command_options(request.results_dir, request.model)
    print(f"next: flashmem-bench calibrate --suite {','.join(facts['suites'])}{options}")
