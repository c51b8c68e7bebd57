"""`flashmem-bench train`: fits a memory on one suite or jointly on several, or all those of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmem_bench.cli import options as o

if TYPE_CHECKING:
    from flashmem_bench.fitting import FitResult

_PANEL = "Training"


_Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Take everything from a recipe; other options replace parts.", rich_help_panel=_PANEL
    ),
]
_Minutes = Annotated[str | None, typer.Option("--minutes", help="Stop after this time.", rich_help_panel=_PANEL)]
_Steps = Annotated[str | None, typer.Option("--steps", help="Optimiser steps.", rich_help_panel=_PANEL)]
_Epochs = Annotated[str, typer.Option("--epochs", help="Passes over the examples.", rich_help_panel=_PANEL)]
_BatchSize = Annotated[str, typer.Option("--batch-size", help="Examples a step.", rich_help_panel=_PANEL)]
_MicroBatchSize = Annotated[
    str | None, typer.Option("--micro-batch-size", help="Examples at once; same steps, less memory.",
                             rich_help_panel=_PANEL)
]  # fmt: skip
_Checkpointing = Annotated[
    bool, typer.Option("--activation-checkpointing", help="Compute twice, keep less.", rich_help_panel=_PANEL)
]
_PrefixGib = Annotated[
    str | None,
    typer.Option("--prefix-gib", help="Keep encoded prompts between epochs.", rich_help_panel=_PANEL),
]
_Placement = Annotated[
    str, typer.Option("--placement", help="single, or auto: over all devices.", rich_help_panel=_PANEL)
]
_Lr = Annotated[str, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=_PANEL)]
_Insertion = Annotated[
    str,
    typer.Option(
        "--insertion", help="Where memories go: prompt-end, mixed, firing or delimiters.", rich_help_panel=_PANEL
    ),
]
_Targets = Annotated[
    str | None,
    typer.Option("--targets", help="gold, or self: the backbone's own right answers.", rich_help_panel=_PANEL),
]
_TrainSeed = Annotated[str, typer.Option("--train-seed", help="Seed.", rich_help_panel=_PANEL)]
_Validation = Annotated[str, typer.Option("--validation", help="Validation samples a suite.", rich_help_panel=_PANEL)]
_Out = Annotated[o.Path | None, typer.Option("--out", help="Folder of the checkpoint.", rich_help_panel=_PANEL)]
_TriggerOf = Annotated[
    str | None,
    typer.Option(
        "--trigger-of", help="Fit MemGen's trained trigger to the memgen memory in this folder.", rich_help_panel=_PANEL
    ),
]
_Provisional = Annotated[
    bool, typer.Option("--provisional", help="Usable by default whatever its harm.", rich_help_panel=_PANEL)
]


def train(
    context: typer.Context,
    method: o.Methods = None,
    suite: o.Suites = None,
    recipe: _Recipe = None,
    model: o.Model = "flashmem-tiny",
    limit: o.Limit = None,
    minutes: _Minutes = None,
    steps: _Steps = None,
    epochs: _Epochs = "5",
    batch_size: _BatchSize = "64",
    micro_batch_size: _MicroBatchSize = None,
    activation_checkpointing: _Checkpointing = False,
    prefix_gib: _PrefixGib = None,
    placement: _Placement = "single",
    lr: _Lr = "1e-5",
    insertion: _Insertion = "prompt-end",
    targets: _Targets = None,
    train_seed: _TrainSeed = "0",
    validation: _Validation = "200",
    out: _Out = None,
    provisional: _Provisional = False,
    trigger_of: _TriggerOf = None,
    device: o.Device = "auto",
    dtype: o.DType = "float32",
    set_: o.Set = None,
    data_dir: o.DataDir = None,
    skip_bad_rows: o.SkipBadRows = False,
    trust_suite: o.TrustSuite = False,
    allow_code_execution: o.AllowCode = False,
    allow_uncontained_code: o.AllowUncontained = False,
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Fit the memory of a method; stopped, the same command continues. --limit counts training samples a suite.

    Example: flashmem-bench train --method flashmem --suite wordmath,hops --minutes 10
    """
    o.set_up_logging(debug)
    from flashmem_bench.recipes import load_recipe
    from flashmem_bench.reproduce import Parts, Place

    values = _values(context.params)
    if trigger_of is not None:
        return _fit_trigger(context, values, trigger_of, json=json, quiet=quiet)
    if recipe is None:
        chosen = _plain_recipe(context.params).with_values(values)
    else:
        given = [name for name in context.params if _on_the_line(context, name)]
        base = load_recipe(recipe)
        settings = {**base.settings, **values["settings"]}
        values["settings"] = settings
        known = {key: value for key, value in values.items() if _KEYS[key] in given or key == "settings"}
        chosen = base.with_values(known)
    allowed = (allow_code_execution, allow_uncontained_code)
    place = Place(results_dir, data_dir, skip_bad_rows, trust_suite, o.command_line(), *allowed)
    return _execute(Parts(chosen, place), out, json=json, quiet=quiet)


# Keys of a recipe and the parameters that replace them.
_KEYS = {
    "model": "model",
    "device": "device",
    "dtype": "dtype",
    "placement.map": "placement",
    "suites": "suite",
    "settings": "set_",
    "train.methods": "method",
    "train.seeds": "train_seed",
    "train.targets": "targets",
    "train.insertion": "insertion",
    "train.lr": "lr",
    "train.batch_size": "batch_size",
    "train.micro_batch_size": "micro_batch_size",
    "train.activation_checkpointing": "activation_checkpointing",
    "train.prefix_gib": "prefix_gib",
    "train.epochs": "epochs",
    "train.steps": "steps",
    "train.minutes": "minutes",
    "train.validation": "validation",
    "train.examples": "limit",
    "train.provisional": "provisional",
}


def _on_the_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _values(given: dict[str, Any]) -> dict[str, Any]:
    """Read the options, each with the sentence of the option where it is wrong, as values of a recipe."""
    from flashmem_bench.errors import UsageError
    from flashmem_bench.fitting import TARGETS
    from flashmem_bench.settings import parse_assignments

    for option, allowed in (
        ("insertion", ("prompt-end", "mixed", "firing", "delimiters")),
        ("placement", ("single", "auto")),
    ):
        if given[option] not in allowed:
            raise UsageError(f"--{option} must be {' or '.join(allowed)}, not {given[option]!r}")
    if given["targets"] not in (None, *TARGETS):
        raise UsageError(f"--targets must be gold or self, not {given['targets']!r}")
    numbers = {name: o.number(given[name], f"--{name}") for name in ("minutes", "epochs", "lr")}
    numbers["prefix_gib"] = o.number(given["prefix_gib"], "--prefix-gib") or 0.0
    counts = {
        name: o.count(given[name], "--" + name.replace("_", "-"))
        for name in ("steps", "batch_size", "micro_batch_size", "validation", "limit")
    }
    read = {
        **given,
        **numbers,
        **counts,
        "suite": o.split_list(given["suite"]),
        "method": o.split_list(given["method"]) or ("flashmem",),
        "train_seed": (o.count(given["train_seed"], "--train-seed", least=0),),
        "set_": parse_assignments(given["set_"] or []),
    }
    return {key: read[name] for key, name in _KEYS.items()}


# What fitting a trigger reads; the other options say how a memory is fitted, and that is there already.
_TRIGGER_OPTIONS = frozenset(
    ("suite", "model", "limit", "minutes", "steps", "lr", "train_seed", "out", "trigger_of", "device", "dtype", "set_",
     "data_dir", "skip_bad_rows", "trust_suite", "allow_code_execution", "allow_uncontained_code", "results_dir",
     "json", "quiet", "debug")
)  # fmt: skip


def _fit_trigger(context: typer.Context, values: dict[str, Any], weaver: str, *, json: bool, quiet: bool) -> int:
    """Fit MemGen's trained trigger to a memgen checkpoint."""
    from flashmem.trigger_training import TriggerTraining
    from flashmem_bench.errors import UsageError
    from flashmem_bench.session import Request, Session
    from flashmem_bench.trigger_fitting import fit_trigger
    from flashmem_bench.watch import watching

    given = context.params
    unread = sorted(name for name in given if name not in _TRIGGER_OPTIONS and _on_the_line(context, name))
    if unread:
        raise UsageError(f"--trigger-of fits a trigger and does not read --{unread[0].replace('_', '-')}; leave it out")
    if given["out"] is None or not given["suite"]:
        raise UsageError("--trigger-of needs --suite and --out, the folder of the checkpoint that has both")
    minutes, steps = values["train.minutes"], values["train.steps"]
    if minutes is None and steps is None:
        raise UsageError("--trigger-of needs --steps or --minutes")
    request = Request(
        suites=o.known_suites(given["suite"]),
        methods=("memgen",),
        model=given["model"],
        device=given["device"],
        dtype=given["dtype"],
        settings=values["settings"],
        data_dir=given["data_dir"],
        skip_bad_rows=given["skip_bad_rows"],
        trust_suite=given["trust_suite"],
        allow_code_execution=given["allow_code_execution"],
        allow_uncontained_code=given["allow_uncontained_code"],
        results_dir=given["results_dir"],
        command=o.command_line(),
    )
    (seed,) = values["train.seeds"]
    config = TriggerTraining(lr=values["train.lr"], steps=steps, minutes=minutes, seed=seed or 0)
    with watching(quiet) as watcher:
        found = fit_trigger(Session(request), weaver, config, given["out"], values["train.examples"], watcher)
    facts = found.metadata["trigger"]
    if json:
        o.emit_json({"checkpoint": str(found.path), "metadata": found.metadata})
    elif not quiet:
        o.tell(f"{facts['steps']} steps, reward {facts['reward_first']:.3f} to {facts['reward_last']:.3f}, memories at "
              f"{facts['written_first']:.0%} to {facts['written_last']:.0%} of the places")  # fmt: skip
        o.tell(f"checkpoint: {found.path}")
    return 0


def _plain_recipe(given: dict[str, Any]) -> Any:
    """Return the recipe of a command without --recipe: one method, all suites together."""
    from flashmem_bench.errors import UsageError
    from flashmem_bench.recipes import Recipe
    from flashmem_bench.registry import get_methods

    methods = get_methods(o.split_list(given["method"]) or ("flashmem",))
    if len(methods) != 1:
        raise UsageError("train fits one method at a time; give one --method, or several in a --recipe")
    o.known_suites(given["suite"])
    return Recipe()


def _execute(parts: Any, out: o.Path | None, *, json: bool, quiet: bool) -> int:
    from flashmem_bench.fitting import joined
    from flashmem_bench.reproduce import train_all, trainings
    from flashmem_bench.watch import watching

    wanted = trainings(parts.recipe, parts.place.results_dir, out)
    main = joined().main
    with watching(quiet or not main) as watcher:
        found = train_all(parts, wanted, watcher)
    documents = [
        {"checkpoint": str(result.path), "metadata": result.metadata, "trained": result.report is not None}
        for _, result in found
    ]
    if json and main:
        o.emit_json(documents[0] if len(documents) == 1 else documents)
    elif not quiet and main:
        for _, result in found:
            _show(parts, result)
    return 0


def _show(parts: Any, result: FitResult) -> None:
    from flashmem_bench.checkpoints import HARM_LIMIT, command_options

    facts = result.metadata
    if result.report is None:
        o.tell(f"{result.path} is trained already; choose another --train-seed or --out to train again")
    else:
        early = f", stopped early, best at step {facts['best_step']}" if facts["stopped_early"] else ""
        o.tell(f"{facts['steps']} steps on {facts['examples']} examples, loss {facts['first_loss']:.3f} to "
              f"{facts['final_loss']:.3f}{early}")  # fmt: skip
    for name in facts["suites"]:
        o.tell(f"{name}: vanilla {facts['vanilla_score_by_suite'][name]:.3f}, one memory at the prompt end "
              f"{facts['memory_score_by_suite'][name]:.3f} (gain {facts['gain_by_suite'][name]:.3f}, harm "
              f"{facts['harm_by_suite'][name]:.3f})")  # fmt: skip
    harmful = [name for name in facts["suites"] if facts["harm_by_suite"][name] > HARM_LIMIT]
    if harmful and not facts.get("provisional"):
        o.tell(f"harm is above {HARM_LIMIT:.0%} on {', '.join(harmful)}: there it is used only with --checkpoint")
    o.tell(f"checkpoint: {result.path}")
    options = command_options(parts.place.results_dir, parts.recipe.model)
    o.tell(f"next: flashmem-bench calibrate --suite {','.join(facts['suites'])}{options}")
