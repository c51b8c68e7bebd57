"""`flashmem-bench reproduce`: a recipe from plan to report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmem_bench.cli import options as o
from flashmem_bench.cli.plan import Bandwidth, RecipeName, Tflops

if TYPE_CHECKING:
    from flashmem_bench.reproduce import Parts


@o.reads(o.answering)
def reproduce(
    answering: dict[str, Any],
    recipe: RecipeName,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the commands only.")] = False,
    device_tflops: Tflops = None,
    bandwidth: Bandwidth = None,
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
    """Plan, train, calibrate, run every arm, report. Stopped, the same command continues.

    Example: flashmem-bench reproduce qwen2.5-1.5b-gsm8k --data-dir DATA
    """
    o.set_up_logging(debug)
    from flashmem_bench.cli.plan import planned, show
    from flashmem_bench.recipes import load_recipe
    from flashmem_bench.reproduce import Parts, Place, commands, trainings

    place = Place(
        results_dir,
        data_dir,
        skip_bad_rows,
        trust_suite,
        o.command_line(),
        allow_code_execution,
        allow_uncontained_code,
        **answering,
    )
    parts = Parts(load_recipe(recipe), place)
    trainings(parts.recipe, results_dir)
    document = planned(parts, o.number(device_tflops, "--device-tflops"), o.number(bandwidth, "--bandwidth"))
    if not quiet and not json:
        show(document)
    if dry_run:
        lines = commands(recipe, parts)
        o.emit_json({"plan": document, "commands": lines}) if json else o.tell("\n".join(lines))
        return 0
    return _work(recipe, parts, json=json, quiet=quiet)


def _work(recipe: str, parts: Parts, *, json: bool, quiet: bool) -> int:
    from flashmem.errors import FlashMemError
    from flashmem_bench.cli.run import conclude
    from flashmem_bench.interrupts import Interrupted
    from flashmem_bench.progress import progress_for
    from flashmem_bench.report import build_report
    from flashmem_bench.reproduce import calibrate_all, run_arms, train_recipe
    from flashmem_bench.watch import watching

    try:
        with watching(quiet) as watcher:
            train_recipe(recipe, parts, watcher)
            calibrate_all(parts, watcher)
        results = run_arms(parts, progress_for(quiet), lambda text: o.say(text, quiet))
        report = build_report(parts.place.results_dir)
    except (Interrupted, KeyboardInterrupt) as error:
        interrupted = error if isinstance(error, Interrupted) else Interrupted()
        o.say(interrupted.sentence(parts.place.command))
        return interrupted.exit_code
    except FlashMemError as error:
        raise _with_next_step(error, parts.place.command) from error
    except Exception:
        o.say(f"stopped; everything finished is stored. Go on with: {parts.place.command}")
        raise
    code = conclude(parts.session(parts.recipe.suites, ()).request, results, json=json, quiet=quiet)
    if not json:
        o.tell(f"report: {report.html.resolve()}")
    return code


def _with_next_step(error: Any, command: str) -> Any:
    """Return an error of the same exit code that says how to go on."""
    from flashmem_bench.errors import BenchError

    if command in str(error):
        return error
    told = BenchError(f"{str(error).rstrip('.')}; when that is mended, go on with: {command}")
    told.exit_code = error.exit_code
    return told
