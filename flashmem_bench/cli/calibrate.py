"""`flashmem-bench calibrate`: the threshold of a suite, for both kinds of entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmem_bench.cli import options as o

if TYPE_CHECKING:
    from flashmem_bench.session import Session
    from flashmem_bench.thresholds import Thresholds


def calibrate(
    suite: o.Suites = None,
    model: o.Model = "flashmem-tiny",
    limit: o.Limit = None,
    seed: o.Seed = "0",
    joint: Annotated[
        bool, typer.Option("--joint", help="Also store the mean over the suites, for other suites.")
    ] = False,
    out: Annotated[
        o.Path | None, typer.Option("--out", help="Folder to write <suite>/<kind>.json into.", show_default=False)
    ] = None,
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    set_: o.Set = None,
    data_dir: o.DataDir = None,
    skip_bad_rows: o.SkipBadRows = False,
    trust_suite: o.TrustSuite = False,
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Measure the percentile threshold on greedy plain runs over the calibration split.

    Example: flashmem-bench calibrate --suite gsm8k --limit 100
    """
    o.set_up_logging(debug)
    from flashmem_bench.places import require_own
    from flashmem_bench.session import Request, Session
    from flashmem_bench.settings import parse_assignments
    from flashmem_bench.watch import watching

    request = Request(
        suites=o.known_suites(suite),
        methods=(),
        model=model,
        limit=o.count(limit, "--limit"),
        seed=o.count(seed, "--seed", least=0) or 0,
        device=device,
        dtype=dtype,
        settings=parse_assignments(set_ or []),
        data_dir=data_dir,
        skip_bad_rows=skip_bad_rows,
        trust_suite=trust_suite,
        results_dir=results_dir,
        command=o.command_line(),
    )
    session = Session(request)
    _ = session.store
    require_own(results_dir, out or results_dir / "thresholds")
    stored = []
    with watching(quiet) as watcher:
        for name in request.suites:
            stored += _calibrate_one(session, name, out, watcher)
    if joint:
        stored += _join(session, [thresholds for thresholds, _ in stored], out)
    return _conclude(stored, json=json, quiet=quiet)


def _calibrate_one(session: Session, name: str, out: o.Path | None, watcher: Any) -> list[tuple[Thresholds, o.Path]]:
    from flashmem_bench.session import generation_arguments
    from flashmem_bench.settings import resolve
    from flashmem_bench.thresholds import calibrate_suite

    suite, request = session.suite(name), session.request
    settings = resolve(session.method_settings, suite=suite.memory_defaults)
    watcher.stage(f"calibrating {suite.name}", 1.0)
    found = calibrate_suite(
        session.backbone,
        suite,
        settings=settings,
        generation=generation_arguments(session.backbone, suite, settings),
        limit=request.limit,
        percentile=settings.trigger.percentile,
        seed=request.seed,
        on_sample=lambda done, total: watcher.advance(done / total, f"{done} of {total} samples"),
    )
    return [(thresholds, _save(session, thresholds, settings, out)) for thresholds in found.values()]


def _save(session: Session, thresholds: Thresholds, settings: Any, out: o.Path | None) -> o.Path:
    from flashmem_bench.places import folder_name
    from flashmem_bench.thresholds import file_name, threshold_folder

    name = folder_name(thresholds.suite)
    folder = (
        out / name if out else threshold_folder(session.request.results_dir, session.request.model, thresholds.suite)
    )
    path = folder / file_name(thresholds.kind, settings.monitor)
    thresholds.save(path)
    return path


def _join(session: Session, parts: list[Thresholds], out: o.Path | None) -> list[tuple[Thresholds, o.Path]]:
    from flashmem_bench.settings import resolve
    from flashmem_bench.thresholds import joint_thresholds

    settings, joined = resolve(session.method_settings), []
    for kind in dict.fromkeys(part.kind for part in parts):
        thresholds = joint_thresholds(session.backbone, [part for part in parts if part.kind == kind])
        joined.append((thresholds, _save(session, thresholds, settings, out)))
    return joined


def _conclude(stored: list[tuple[Thresholds, o.Path]], *, json: bool, quiet: bool) -> int:
    rows = [
        {
            "suite": thresholds.suite,
            "kind": thresholds.kind,
            "stratum": stratum or "all",
            "percentile": entry.percentile,
            "tau": round(entry.value, 4),
            "low": round(entry.low, 4),
            "high": round(entry.high, 4),
            "samples": entry.n_samples,
            "steps": entry.n_steps,
            "file": str(path),
        }
        for thresholds, path in stored
        for stratum, entry in thresholds.by_stratum.items()
    ]
    if json:
        o.emit_json(rows)
    elif not quiet:
        from flashmem_bench.cli.lists import show_rows

        show_rows([{key: value for key, value in row.items() if key != "file"} for row in rows], json=False)
        o.tell(f"stored in {', '.join(sorted({str(path.parent) for _, path in stored}))}")
    return 0
