"""Options with one meaning in every command, and the reading of their values.

Options that take a list may be repeated or take commas; counts may be written as `4k`.
"""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from flashmem_bench.errors import UsageError
from flashmem_bench.privacy import redact
from flashmem_bench.terminal import CleanFormatter, clean, console, emit_json, say, tell

__all__ = ["console", "emit_json", "say", "tell"]

if TYPE_CHECKING:
    from flashmem_bench.limits import Limits

_RUNNING, _DATA, _OUTPUT = "Running", "Data", "Output"


def _option(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=more.pop("show_default", False), **more)


Suites = Annotated[list[str] | None, _option("--suite", "-s", help="Suite; repeat or use commas.", metavar="NAME")]
Methods = Annotated[list[str] | None, _option("--method", "-m", help="Method; repeat or use commas.", metavar="NAME")]
Model = Annotated[str, _option("--model", help="flashmem-tiny (bundled, default), a folder, or a hub id.", metavar="M")]
Limit = Annotated[str | None, _option("--limit", "-n", help="First N samples; a larger N extends a cell.", metavar="N")]
LimitSessions = Annotated[
    str | None, _option("--limit-sessions", help="Samples of the first N sessions.", metavar="N", panel=_RUNNING)
]
QuestionsPerSession = Annotated[
    str | None,
    _option("--questions-per-session", help="First N samples of each session.", metavar="N", panel=_RUNNING),
]
NoPrefixReuse = Annotated[
    bool, _option("--no-prefix-reuse", help="Encode the history of a session for every question.", panel=_RUNNING)
]
Seed = Annotated[str, _option("--seed", help="Seed of sampling and random controls (0).", metavar="S", panel=_RUNNING)]
BatchSize = Annotated[
    str, _option("--batch-size", help="Samples at once (1); a finished one makes room.", metavar="B", panel=_RUNNING)
]
Device = Annotated[str, _option("--device", help="auto, cpu, cuda, cuda:1, mps.", metavar="D", panel=_RUNNING)]
DType = Annotated[str, _option("--dtype", help="auto, float32, bfloat16, float16.", metavar="T", panel=_RUNNING)]
Checkpoint = Annotated[
    str | None, _option("--checkpoint", help="Trained memory: a folder or a hub id.", metavar="C", panel=_RUNNING)
]
Set = Annotated[list[str] | None, _option("--set", help="A setting, key=value; repeat.", metavar="K=V", panel=_RUNNING)]
Truncate = Annotated[
    str | None, _option("--truncate", help="Cut a prompt that is too long: left or middle.", metavar="WHERE",
                        panel=_RUNNING)
]  # fmt: skip
Match = Annotated[
    str, _option("--match", help="How random moments are matched: within or pooled.", metavar="HOW", panel=_RUNNING)
]
Workers = Annotated[
    str, _option("--workers", help="Processes: one a GPU, or several that share the cores (1).", metavar="N",
                 panel=_RUNNING)
]  # fmt: skip
Executor = Annotated[
    str, _option("--executor", help="Who answers: local (default), or ray: a cluster.", metavar="NAME", panel=_RUNNING)
]
RayAddress = Annotated[
    str, _option("--ray-address", help="Of the Ray cluster (auto: that of this machine).", metavar="HOST:PORT",
                 panel=_RUNNING)
]  # fmt: skip
WorkerCpus = Annotated[
    str, _option("--worker-cpus", help="CPUs of a worker of the cluster without a GPU (1).", metavar="N",
                 panel=_RUNNING)
]  # fmt: skip
SampleTimeout = Annotated[
    str | None, _option("--sample-timeout", help="A sample that takes longer fails.", metavar="SECONDS", panel=_RUNNING)
]
CellTimeout = Annotated[
    str | None, _option("--cell-timeout", help="After so long, the next cell.", metavar="SECONDS", panel=_RUNNING)
]
WorkerMemory = Annotated[
    str | None, _option("--worker-memory", help="A sample that needs more memory fails.", metavar="GIB", panel=_RUNNING)
]
FailOnError = Annotated[
    str, _option("--fail-on-error", help="Stop when more than this share of a cell fails (1: never).",
                 metavar="FRACTION", panel=_RUNNING)
]  # fmt: skip
DataDir = Annotated[
    Path | None, _option("--data-dir", help="Folder with <suite>/<file>.jsonl[.gz].", metavar="DIR", panel=_DATA)
]
SkipBadRows = Annotated[bool, _option("--skip-bad-rows", help="Go on without broken rows.", panel=_DATA)]
TrustSuite = Annotated[
    bool, _option("--trust-suite", help="Run the code that a suite file of your own names.", panel=_DATA)
]
AllowCode = Annotated[
    bool, _option("--allow-code-execution", help="Let grading run the model's programs, sandboxed.", panel=_DATA)
]
AllowUncontained = Annotated[
    bool, _option("--allow-uncontained-code", help="Even where nothing keeps them in.", panel=_DATA)
]
ResultsDir = Annotated[Path, _option("--results-dir", help="Results folder (results).", metavar="DIR", panel=_OUTPUT)]
Json = Annotated[bool, _option("--json", help="The last line of stdout is one JSON document.", panel=_OUTPUT)]
Quiet = Annotated[bool, _option("--quiet", "-q", help="No progress and no tables.", panel=_OUTPUT)]
Debug = Annotated[bool, _option("--debug", help="Log everything; tracebacks.", panel=_OUTPUT)]

DEFAULT_RESULTS = Path("results")
_FORMAT_WARNING = warnings.formatwarning


def reads(read: Callable[..., Any]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Make a command whose options are those of `read`; several commands may share one list of options.

    Args:
        read: Its parameters are the options; the command gets what it returns as its first argument.

    Returns:
        A decorator; further parameters of the command are options of its own.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        own = _parameters(command)[1:]

        def run(**values: Any) -> int:
            mine = {parameter.name: values.pop(parameter.name) for parameter in own}
            return command(read(**values), **mine)

        parameters = [*own, *_parameters(read)]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    hints = get_type_hints(function, include_extras=True)
    return [
        parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in signature(function).parameters.items()
    ]


def split_list(values: list[str] | None) -> tuple[str, ...]:
    """Return the entries of a list option, each once, in order."""
    entries = [entry.strip() for value in values or [] for entry in value.split(",")]
    return tuple(dict.fromkeys(entry for entry in entries if entry))


def required(values: list[str] | None, option: str, listing: str) -> tuple[str, ...]:
    """Return the entries of a list option that must be given."""
    entries = split_list(values)
    if not entries:
        raise UsageError(f"{option} is missing; flashmem-bench list {listing} shows what there is")
    return entries


def count(value: str | None, option: str, least: int = 1) -> int | None:
    """Read a whole number, where 4k means 4096."""
    if value is None:
        return None
    text = str(value).strip().lower()
    factor = 1024 if text.endswith("k") else 1
    try:
        number = int(text.removesuffix("k")) * factor
    except ValueError:
        raise UsageError(f"{option} must be a whole number of at least {least}, not {value!r}") from None
    if number < least:
        raise UsageError(f"{option} must be a whole number of at least {least}, not {value}")
    return number


def number(value: str | None, option: str) -> float | None:
    """Read a positive number."""
    if value is None:
        return None
    try:
        parsed = float(value)
    except ValueError:
        parsed = -1.0
    if not 0 < parsed < float("inf"):
        raise UsageError(f"{option} must be a number above 0, not {value!r}")
    return parsed


def limits(
    sample_timeout: str | None, cell_timeout: str | None, worker_memory: str | None, fail_on_error: str
) -> Limits:
    """Read the limits of a run."""
    from flashmem_bench.limits import Limits

    try:
        share = float(fail_on_error)
    except ValueError:
        raise UsageError(f"--fail-on-error must be a share from 0 to 1, not {fail_on_error!r}") from None
    return Limits(
        number(sample_timeout, "--sample-timeout"),
        number(cell_timeout, "--cell-timeout"),
        number(worker_memory, "--worker-memory"),
        share,
    )


def answering(
    workers: Workers = "1",
    executor: Executor = "local",
    ray_address: RayAddress = "auto",
    worker_cpus: WorkerCpus = "1",
    sample_timeout: SampleTimeout = None,
    cell_timeout: CellTimeout = None,
    worker_memory: WorkerMemory = None,
    fail_on_error: FailOnError = "1",
) -> dict[str, Any]:
    """Read who answers and within which limits, as fields of a request; for `reads`."""
    return {
        "workers": count(workers, "--workers") or 1,
        "executor": executor,
        "ray_address": ray_address,
        "worker_cpus": count(worker_cpus, "--worker-cpus") or 1,
        "limits": limits(sample_timeout, cell_timeout, worker_memory, fail_on_error),
    }


def command_line() -> str:
    """Return the command as the user can paste it."""
    return shlex.join(["flashmem-bench", *sys.argv[1:]])


def recorded_command() -> str:
    """Return the command as it is stored: without secrets and names of people or machines."""
    return redact(command_line())


def set_up_logging(debug: bool) -> None:
    """Send the log to stderr: everything of ours with `--debug`, else warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(CleanFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # A library's warning may quote what it was given.
    warnings.formatwarning = lambda *told, **more: clean(_FORMAT_WARNING(*told, **more))
    for name in ("flashmem", "flashmem_bench"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.WARNING)


def known_suites(values: list[str] | None) -> tuple[str, ...]:
    """Return the suites asked for, each known to exist; a suite file keeps its path."""
    from flashmem_bench.suites import find_suite

    names = required(values, "--suite", "suites")
    for name in names:
        find_suite(name)
    return names
