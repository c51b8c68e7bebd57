"""What the paper reports, to stand beside what is measured.

`published.csv` holds the scores of its Tables 1 and 2 as shares, and of Table 3 text tokens a second and peak memory.
That table's backbone is not named; its memory grows with the context as a Qwen2.5-1.5B's in bfloat16 does. Its column
"latency" is left out: 256 text tokens divided by the throughput give every entry of it, in seconds a run.

A published value stands only beside a cell of the same backbone; prompts, graders and samples may still differ.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from typing import NamedTuple


class Published(NamedTuple):
    """One published number."""

    backbone: str
    suite: str
    method: str
    metric: str
    context: int | None
    value: float


@cache
def published() -> tuple[Published, ...]:
    """Every number, in the order of the file."""
    text = resources.files("flashmem_bench").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(
        Published(
            row["backbone"],
            row["suite"],
            row["method"],
            row["metric"],
            int(row["context"]) if row["context"] else None,
            float(row["value"]),
        )
        for row in csv.DictReader(text.splitlines())
    )


def published_score(suite: str, method: str, model: str) -> float | None:
    """The paper's score of a method on a suite with this backbone, as a share; None where it gives none."""
    wanted = _plain(model)
    for row in published():
        if row.suite == suite and row.method == method and _plain(row.backbone) == wanted and row.context is None:
            return row.value
    return None


def published_cost(model: str) -> dict[tuple[int, str], dict[str, float]]:
    """Text tokens a second and peak gigabytes by context and method, for a backbone of that shape; else nothing."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for row in published():
        if row.context is not None and _plain(row.backbone) == _plain(model):
            found.setdefault((row.context, row.method), {})[row.metric] = row.value
    return found


def _plain(model: str) -> str:
    """Name of a backbone without its owner, its tuning and the mark of random weights."""
    return model.rsplit("/", 1)[-1].lower().removeprefix("random-").removesuffix("-instruct")
