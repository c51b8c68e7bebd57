"""`flashmem-bench verify`: every published number made again from the sample rows."""

from __future__ import annotations

from typing import Annotated

import typer

from flashmem_bench.cli import options as o

_SHOWN = 20


def verify(
    run: Annotated[
        str | None, typer.Argument(help="The beginning of a cell's id; left out, all cells and the tables.")
    ] = None,
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    repair: Annotated[
        bool, typer.Option("--repair", help="Put broken lines and manifests aside first, so that they are made anew.")
    ] = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> int:
    """Check hashes, formulas and tables of a results folder; exit 1 if anything is not as its rows say.

    Broken lines and manifests that --repair puts aside stay in the folder of their cell.

    Example: flashmem-bench verify --results-dir results
    """
    o.set_up_logging(debug)
    from flashmem_bench.errors import StoreError
    from flashmem_bench.verification import verify as check

    if not (results_dir / "runs").is_dir():
        raise StoreError(f"there are no results in {results_dir}; make some with flashmem-bench run")
    done = _repair(results_dir, run) if repair else []
    compared, problems = check(results_dir, run)
    if json:
        o.emit_json({"compared": compared, "problems": [vars(problem) for problem in problems], "repaired": done})
    else:
        for sentence in done:
            o.tell(sentence)
        if done:
            o.tell("run the commands that made these cells again: what is missing is made anew")
        for problem in problems[:_SHOWN]:
            o.tell(f"{problem.where}: {problem.what}")
        if len(problems) > _SHOWN:
            o.tell(f"and {len(problems) - _SHOWN} more")
        o.tell(f"{compared:,} numbers compared, {len(problems)} wrong")
    return 1 if problems else 0


def _repair(results_dir: o.Path, run: str | None) -> list[str]:
    from flashmem_bench.repair import cells_on_disk, repair
    from flashmem_bench.store import ResultStore

    return [sentence for cell in cells_on_disk(ResultStore(results_dir), run) for sentence in repair(cell)]
