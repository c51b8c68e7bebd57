"""How well each signal ranks the moments where help is due: one figure a suite."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from flashmem_bench.moments import label
from flashmem_bench.report.style import BLUE, GREEN, GREY, VERMILLION, canvas, caption, save

_COLORS = {"output-entropy": GREEN, "random": GREY}
_TITLES = {
    "all": "all decision steps",
    "value": "just before a value",
    "prompt-end": "at the prompt end",
    "later": "later decision steps",
}


def draw_ranking(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw AUROC with its interval by signal and kind of position; returns the paths of the svg files."""
    return [_draw(str(suite), rows, folder) for suite, rows in table.groupby("suite", sort=False)]


def _draw(suite: str, rows: pd.DataFrame, folder: Path) -> Path:
    kinds = list(dict.fromkeys(rows["positions"]))
    signals = len(rows[rows["positions"] == kinds[0]])
    with canvas(1.3 + 0.24 * signals, columns=len(kinds), sharey=True) as (figure, panels):
        for axes, kind in zip(panels, kinds, strict=True):
            _panel(axes, rows[rows["positions"] == kind].to_dict("records"))
            axes.set_title(_TITLES[kind], loc="left")
        samples = int(rows["samples"].max())
        footnote = f"{samples} samples, greedy plain answers; bars: 95 % intervals over samples; dashed: chance"
        caption(figure, f"{suite}: which signal knows where help is due?", footnote, cpu_timed=False)
        return save(figure, folder, f"moments-{suite.replace('/', '-')}")


def _panel(axes, rows: list[dict]) -> None:
    for height, row in enumerate(reversed(rows)):
        color = VERMILLION if row["monitored"] else _COLORS.get(row["signal"], BLUE)
        ends = [[row["auroc"] - row["auroc_low"]], [row["auroc_high"] - row["auroc"]]]
        axes.errorbar(row["auroc"], height, xerr=ends, fmt="o", color=color, markersize=5)
    axes.axvline(0.5, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [label(row) for row in reversed(rows)])
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("AUROC")
