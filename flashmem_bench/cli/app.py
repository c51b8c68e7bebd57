"""The table of commands."""

from __future__ import annotations

import typer

from flashmem_bench import __version__
from flashmem_bench.cli.ablate import ablate
from flashmem_bench.cli.calibrate import calibrate
from flashmem_bench.cli.compare import compare
from flashmem_bench.cli.describe import describe
from flashmem_bench.cli.doctor import doctor
from flashmem_bench.cli.engine import engine
from flashmem_bench.cli.latency import latency
from flashmem_bench.cli.lists import list_names
from flashmem_bench.cli.merge import merge
from flashmem_bench.cli.moments import moments
from flashmem_bench.cli.plan import plan
from flashmem_bench.cli.regrade import regrade
from flashmem_bench.cli.report import report
from flashmem_bench.cli.reproduce import reproduce
from flashmem_bench.cli.run import run
from flashmem_bench.cli.train import train
from flashmem_bench.cli.verify import verify
from flashmem_bench.cli.worker import worker
from flashmem_bench.terminal import tell

app = typer.Typer(
    name="flashmem-bench",
    help="Latent memory for frozen language models: run, time, grade and report it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
    """Latent memory for frozen language models: run, time, grade and report it."""
    if version:
        tell(__version__)
        raise typer.Exit()


for _name, _command in {
    "run": run,
    "worker": worker,
    "merge": merge,
    "ablate": ablate,
    "train": train,
    "calibrate": calibrate,
    "moments": moments,
    "latency": latency,
    "engine": engine,
    "compare": compare,
    "report": report,
    "regrade": regrade,
    "verify": verify,
    "plan": plan,
    "reproduce": reproduce,
    "list": list_names,
    "describe": describe,
    "doctor": doctor,
}.items():
    app.command(_name)(_command)
