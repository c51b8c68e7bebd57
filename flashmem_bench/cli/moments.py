"""`flashmem-bench moments`: does an entropy know when help is due?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashmem_bench.cli import options as o

if TYPE_CHECKING:
    from flashmem_bench.session import Session


def moments(
    suite: o.Suites = None,
    model: o.Model = "flashmem-tiny",
    limit: o.Limit = None,
    seed: o.Seed = "0",
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
    """Rank the decision steps of plain answers by each entropy and by chance, against where help is due.

    Example: flashmem-bench moments --suite hops-list,hops --limit 500
    """
    o.set_up_logging(debug)
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
    records: list[dict[str, Any]] = []
    with watching(quiet) as watcher:
        for name in request.suites:
            records += _rank_one(session, name, watcher)
    path = _store(session, records)
    if json:
        o.emit_json({"file": str(path), "rows": records})
    elif not quiet:
        _show(records)
        o.tell(f"stored in {path} and {path.parent.parent / 'figures'}")
    return 0


def _rank_one(session: Session, name: str, watcher: Any) -> list[dict[str, Any]]:
    from flashmem_bench.moments import check_suite, collect, rank

    suite = session.suite(name)
    check_suite(suite)
    watcher.stage(f"answering {suite.name}", 1.0)
    found = collect(session, suite, session.request.limit, lambda done, total: watcher.advance(done / total))
    marked = bool(suite.samples("test")[0].moments)
    return rank(found, suite.name, session.request.model, marked=marked, seed=session.request.seed)


def _store(session: Session, records: list[dict[str, Any]]) -> o.Path:
    import pandas as pd

    from flashmem_bench.moments import COLUMNS
    from flashmem_bench.report.exports import guarded
    from flashmem_bench.report.ranking import draw_ranking

    folder = session.request.results_dir
    table = pd.DataFrame(records, columns=list(COLUMNS)).astype({"layer": "Int64"})
    path = folder / "tables" / "moments.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    guarded(table).to_csv(path, index=False)
    draw_ranking(table, folder / "figures")
    return path


def _show(records: list[dict[str, Any]]) -> None:
    from flashmem_bench.cli.lists import show_rows
    from flashmem_bench.moments import label

    show_rows(
        [
            {
                "suite": row["suite"],
                "positions": row["positions"],
                "signal": label(row),
                "AUROC": f"{row['auroc']:.3f} [{row['auroc_low']:.3f}, {row['auroc_high']:.3f}]",
                "precision = recall": (
                    f"{row['precision_at_count']:.3f} [{row['precision_low']:.3f}, {row['precision_high']:.3f}]"
                ),
                "chance": f"{row['base_rate']:.3f}",
                "mean due / other": f"{row['mean_due_nats']:.2f} / {row['mean_other_nats']:.2f}",
            }
            for row in records
        ],
        json=False,
    )
