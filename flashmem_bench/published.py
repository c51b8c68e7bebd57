"""What the paper reports, to stand beside what is measured.

Scores of its Tables 1 and 2 are in the suite files (`published`, per cent). `published_cost.csv` holds text tokens a
second and peak memory of its Table 3, whose backbone is not named: its memory grows with the context as that of a
Qwen2.5-1.5B in bfloat16 does. The table's column "latency" is left out: 256 text tokens divided by the throughput
give every entry of it, in seconds a run.

A published value stands only beside a cell of the same backbone; prompts, graders and samples may still differ.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from typing import NamedTuple

from flashmem_bench.suites import list_suites


class Published(NamedTuple):
    """One published score, as a share."""

    backbone: str
    suite: str
    method: str
    value: float


@cache
def published_scores() -> tuple[Published, ...]:
    """Every published score of the bundled suites."""
    return tuple(
        Published(str(row["backbone"]), info.name, method, float(value) / 100)
        for info in list_suites()
        for row in info.metadata.get("published") or ()
        for method, value in row.items()
        if method != "backbone"
    )


def published_score(suite: str, method: str, model: str) -> float | None:
    """The paper's score of a method on a suite with this backbone, as a share; None where it gives none."""
    wanted = _plain(model)
    found = (row for row in published_scores() if (row.suite, row.method) == (suite, method))
    return next((row.value for row in found if _plain(row.backbone) == wanted), None)


@cache
def published_cost(model: str) -> dict[tuple[int, str], dict[str, float]]:
    """Text tokens a second and peak gigabytes by context and method, for a backbone of that shape; else nothing."""
    text = resources.files("flashmem_bench").joinpath("published_cost.csv").read_text(encoding="utf-8")
    found: dict[tuple[int, str], dict[str, float]] = {}
    for row in csv.DictReader(text.splitlines()):
        if _plain(row["backbone"]) == _plain(model):
            found.setdefault((int(row["context"]), row["method"]), {})[row["metric"]] = float(row["value"])
    return found


def _plain(model: str) -> str:
    """Name of a backbone without its owner, its tuning and the mark of random weights."""
    return model.rsplit("/", 1)[-1].lower().removeprefix("random-").removesuffix("-instruct")
