"""`flashmem-bench doctor`: what is there, what is missing."""

from __future__ import annotations

import dataclasses

from flashmem_bench.cli import options as o


def doctor(
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    data_dir: o.DataDir = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> int:
    """Examine the installation; exit code 1 if something essential is broken."""
    o.set_up_logging(debug)
    from flashmem_bench.doctor import examine

    checks = examine(results_dir, data_dir)
    broken = [check for check in checks if check.status == "broken"]
    if json:
        o.emit_json([dataclasses.asdict(check) for check in checks])
    else:
        from flashmem_bench.cli.lists import show_rows

        show_rows([{"": check.status, "check": check.name, "found": check.detail} for check in checks], json=False)
        print("broken: " + ", ".join(check.name for check in broken) if broken else "nothing essential is broken")
    return 1 if broken else 0
