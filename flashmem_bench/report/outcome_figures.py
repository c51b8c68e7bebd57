"""How answers ended, by method: the points that were won, and why the others were not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashmem_bench.report.cells import Cell, settings_differences
from flashmem_bench.report.figures import Drawing, file_name
from flashmem_bench.report.style import BLUE, DARK, FAINT, GREY, ORANGE, PURPLE, VERMILLION, canvas, caption, save

RIGHT = "right"
# A bar of a method alone is not as high as the figure.
_LEAST_ROWS = 3
# In the order in which they are drawn.
STATES: Mapping[str, tuple[str, str]] = {
    RIGHT: (BLUE, ""),
    "wrong": (FAINT, ""),
    "no answer found": (ORANGE, "///"),
    "cut at the budget": (PURPLE, "\\\\\\"),
    "not graded in time": (GREY, "..."),
    "grader failed": (DARK, "xxx"),
    "failed": (VERMILLION, "---"),
}


def why_lost(row: Mapping[str, Any]) -> str:
    """Why the points that a sample did not win were lost; a failure hides whatever came before it."""
    if row.get("error") is not None:
        return "failed"
    if row.get("parse_status") in ("timeout", "error"):
        return "not graded in time" if row["parse_status"] == "timeout" else "grader failed"
    if row.get("truncated"):
        return "cut at the budget"
    return "no answer found" if row.get("parse_status") == "no_answer" else "wrong"


def shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of all points in each state; a sample that is partly right has a part in two of them."""
    found = dict.fromkeys(STATES, 0.0)
    for row in rows:
        won = float(row.get("score") or 0.0) if row.get("error") is None else 0.0
        found[RIGHT] += won / len(rows)
        found[why_lost(row)] += (1 - won) / len(rows)
    return found


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
    parts = [shares(cell.rows) for cell in cells]
    with canvas(1.3 + 0.19 * max(len(cells), 4)) as (figure, (axes,)):
        places = list(range(len(cells)))[::-1]
        left = [0.0] * len(cells)
        for state in [state for state in STATES if any(part[state] > 0 for part in parts)]:
            color, hatch = STATES[state]
            widths = [100 * part[state] for part in parts]
            axes.barh(places, widths, left=left, color=color, hatch=hatch, edgecolor="white", label=state, height=0.75)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(places, names, fontsize=6.5)
        axes.set_ylim(-0.7, max(len(cells), _LEAST_ROWS) - 0.3)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of all points")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
        footnote = "a graded sample is right by its score; points are lost alike for reasons that mean different things"
        caption(figure, f"{suite}: how answers ended", footnote, cpu_timed=False)
        svg = save(figure, folder, f"outcomes-{file_name(suite)}")
    return Drawing("outcomes", suite, svg, "How answers ended, by method: points won, and why the others were lost.")


def _label(cell: Cell, told: str) -> str:
    return f"{cell.method} ({told})" if told and len(told) < 40 else cell.method
