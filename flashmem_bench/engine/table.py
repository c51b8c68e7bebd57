"""The outcomes of a command as tables of a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from flashmem_bench.engine.figures import Figure, Outcome

CPU_STAMP = "CPU timing, not comparable with GPU"
_STYLES = {"met": "green", "missed": "red", "cannot tell": "yellow"}


def figures_table(outcomes: Sequence[Outcome], document: dict[str, Any]) -> Table:
    """Return the figures of all checks, one line each, and why others have none."""
    from rich.table import Table

    stamp = CPU_STAMP if document["device"] == "cpu" else document["device"]
    title = f"The engine: {document['model']}, {document['dtype']}, {document['exec']} ({stamp})"
    table = Table(title=title, title_justify="left")
    table.add_column("check")
    table.add_column("figure")
    for name in ("context", "measured [95 %]", "expected", "bound", "pairs"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for outcome in outcomes:
        for figure in outcome.figures:
            table.add_row(outcome.check, *_cells(figure))
        if not outcome.figures:
            table.add_row(
                outcome.check, _without(outcome), "", "", "", "", "", "not run" if outcome.skipped else "wrong"
            )
    return table


def _cells(figure: Figure) -> list[str]:
    ends = "" if figure.low is None else f" [{figure.low:.3f}, {figure.high:.3f}]"
    verdict, style = figure.verdict, _STYLES.get(figure.verdict)
    return [
        figure.name,
        str(figure.context or ""),
        f"{figure.estimate:.3f}{ends}",
        "" if figure.expected is None else f"{figure.expected:.3f}",
        str(figure.bound or ""),
        str(figure.pairs),
        f"[{style}]{verdict}[/{style}]" if style else verdict,
    ]


def _without(outcome: Outcome) -> str:
    return outcome.skipped or f"the answers are not right, so nothing was timed: {outcome.gate}"


def sentences(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what the table has no room for: gates and notes."""
    return [
        f"{outcome.check}: {text}"
        for outcome in outcomes
        for text in [*([outcome.gate] if outcome.gate and outcome.correct else []), *outcome.notes]
    ]
