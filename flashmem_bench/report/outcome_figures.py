"""How answers ended, by method: right, partly, wrong, and the states that say little of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashmem_bench.report.cells import Cell, settings_differences
from flashmem_bench.report.figures import Drawing, file_name
from flashmem_bench.report.style import BLUE, DARK, FAINT, GREY, ORANGE, PURPLE, SKY, VERMILLION, canvas, caption, save

# In the order in which they are drawn; an answer is in the first state from the end that holds for it.
STATES: Mapping[str, tuple[str, str]] = {
    "right": (BLUE, ""),
    "partly right": (SKY, ""),
    "wrong": (FAINT, ""),
    "no answer found": (ORANGE, "///"),
    "cut at the budget": (PURPLE, "\\\\\\"),
    "not graded in time": (GREY, "..."),
    "grader failed": (DARK, "xxx"),
    "failed": (VERMILLION, "---"),
}


def state_of(row: Mapping[str, Any]) -> str:
    """The state of one sample. A right answer is right however it ended; a failure hides everything before it."""
    if row.get("error") is not None:
        return "failed"
    if row.get("parse_status") in ("timeout", "error"):
        return "not graded in time" if row["parse_status"] == "timeout" else "grader failed"
    score = row.get("score")
    if score is not None and score >= 1:
        return "right"
    if row.get("truncated"):
        return "cut at the budget"
    if row.get("parse_status") == "no_answer":
        return "no answer found"
    return "partly right" if score else "wrong"


def draw_outcomes(cells: Sequence[Cell], folder: Path) -> list[Drawing]:
    """Draw the headline cells of every suite."""
    main = [cell for cell in cells if cell.is_main and cell.rows]
    differences = settings_differences(main)
    return [
        _draw(suite, [cell for cell in main if cell.suite == suite], differences, folder)
        for suite in sorted({cell.suite for cell in main})
    ]


def _draw(suite: str, cells: Sequence[Cell], differences: Mapping[str, str], folder: Path) -> Drawing:
    names = [_label(cell, differences[cell.cell_id]) for cell in cells]
    shares = [_shares(cell.rows) for cell in cells]
    shown = [state for state in STATES if any(part[state] for part in shares)]
    with canvas(1.3 + 0.2 * max(len(cells), 4)) as (figure, (axes,)):
        places = list(range(len(cells)))[::-1]
        left = [0.0] * len(cells)
        for state in shown:
            color, hatch = STATES[state]
            widths = [100 * part[state] for part in shares]
            axes.barh(places, widths, left=left, color=color, hatch=hatch, edgecolor="white", label=state, height=0.75)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(places, names, fontsize=6.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of the samples")
        figure.legend(loc="outside upper right", ncols=min(len(shown), 4))
        footnote = "wrong, no answer and cut answers score alike and mean different things"
        caption(figure, f"{suite}: how answers ended", footnote, cpu_timed=False)
        svg = save(figure, folder, f"outcomes-{file_name(suite)}")
    return Drawing("outcomes", suite, svg, "How answers ended, by method, in per cent of the samples.")


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = [state_of(row) for row in rows]
    return {state: found.count(state) / len(found) for state in STATES}


def _label(cell: Cell, told: str) -> str:
    return f"{cell.method} ({told})" if told and len(told) < 40 else cell.method
