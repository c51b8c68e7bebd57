"""The tally of injected faults as a table: `python -m tests.faults FILE`, FILE written by `pytest --faults FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEADING = "| fault | times | finished rows lost | rows wrong | test |\n|---|---|---|---|---|"


def table(path: Path) -> str:
    """One line a kind of fault, ordered by the file of its test."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for record in sorted(map(json.loads, path.read_text(encoding="utf-8").splitlines()), key=lambda it: it["test"]):
        name = record["test"].partition("::")[0]
        sums = kinds.setdefault((record["kind"], name), [0, 0, 0])
        for place, key in enumerate(("runs", "rows_lost", "rows_wrong")):
            sums[place] += record[key]
    return "\n".join([HEADING, *(f"| {kind} | {n} | {lost} | {wrong} | `{test}` |"
                                 for (kind, test), (n, lost, wrong) in kinds.items())])  # fmt: skip


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
