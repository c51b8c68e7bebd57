"""What a method fixes and what it breaks, and whether more memories go with more benefit: one figure a suite."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from flashmem_bench.report.cells import VANILLA
from flashmem_bench.report.figures import Drawing, file_name
from flashmem_bench.report.style import BLUE, GREY, VERMILLION, canvas, caption, look, save

# A bar of a comparison alone is not as high as the figure.
_LEAST_ROWS = 4


def draw_benefit(comparisons: pd.DataFrame, runs: pd.DataFrame, folder: Path) -> list[Drawing]:
    """Draw every suite that has comparisons with vanilla."""
    against = comparisons[(comparisons["b"] == VANILLA) & comparisons["difference"].notna()]
    return [
        _draw(str(suite), rows.reset_index(drop=True), runs, folder)
        for suite, rows in against.groupby("suite", sort=True)
    ]


def _draw(suite: str, rows: pd.DataFrame, runs: pd.DataFrame, folder: Path) -> Drawing:
    cells = runs.set_index("cell")
    names = [_label(row, cells) for row in rows.to_dict("records")]
    with canvas(1.4 + 0.2 * max(len(rows), 8), columns=2) as (figure, (left, right)):
        _fixed_and_broken(left, rows, names)
        _rate_and_benefit(right, rows, cells)
        footnote = f"paired with vanilla on {int(rows['n'].max())} samples; bars on the right: 95 % intervals"
        caption(figure, f"{suite}: what changes against vanilla", footnote, cpu_timed=False)
        svg = save(figure, folder, f"benefit-{file_name(suite)}")
    text = "Left: samples with a higher and with a lower score than vanilla's. Right: gain against memories a sample."
    return Drawing("benefit", suite, svg, text)


def _label(row: dict, cells: pd.DataFrame) -> str:
    told = cells["settings"].get(row["cell_a"], "")
    settings = str(told) if isinstance(told, str) and told else ""
    return f"{row['a']} ({settings})" if settings and len(settings) < 24 else str(row["a"])


def _fixed_and_broken(axes: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    places = list(range(len(rows)))[::-1]
    axes.barh(places, rows["fixed"].astype(float), color=BLUE, label="higher", height=0.7)
    axes.barh(places, -rows["broken"].astype(float), color=VERMILLION, hatch="///", edgecolor="white", label="lower",
              height=0.7)  # fmt: skip
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(places, names, fontsize=6.5)
    axes.set_ylim(-0.7, max(len(rows), _LEAST_ROWS) - 0.3)
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set_xlabel("samples with a lower and a higher score")
    axes.legend(loc="upper right")


def _rate_and_benefit(axes: Axes, rows: pd.DataFrame, cells: pd.DataFrame) -> None:
    for place, row in enumerate(rows.to_dict("records")):
        triggers = cells["triggers_mean"].get(row["cell_a"])
        style = look(str(row["a"]), place)
        gain, low, high = (100 * row[key] for key in ("difference", "low", "high"))
        axes.errorbar(
            0.0 if pd.isna(triggers) else float(triggers),
            gain,
            yerr=[[max(0.0, gain - low)], [max(0.0, high - gain)]],
            color=style.color,
            marker=style.marker,
            markerfacecolor="white" if style.hollow else style.color,
        )
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlabel("memories a sample")
    axes.set_ylabel("points against vanilla")
