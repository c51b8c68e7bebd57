"""The figures: score against time, ablation sheets, phases.

Every figure is drawn from the tables alone and written as png and svg. Every interval that the tables hold is drawn,
axes begin at zero (a logarithmic axis says so), and a figure with times of a CPU says so in its title. Entropy
traces, which need the texts, are in ``traces.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes

from flashmem_bench.report.style import (
    BLUE,
    DARK,
    FAINT,
    GREEN,
    GREY,
    PHASES,
    VERMILLION,
    canvas,
    caption,
    look,
    save,
)
from flashmem_bench.report.tables import is_percentile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of a part of a file name.
_LONGEST = 100
_CONDITIONS = ["model", "device", "dtype", "batch_size", "exec"]
# The points of one sheet: those that are compared with the same reference cell.
# Letters of a value that still stands upright below its point.
_LONG_VALUE = 10
ABLATION_SHEET = ["axis", "suite", "method", "reference_cell"]
_LOG_FROM = 16


@dataclass(frozen=True)
class Drawing:
    """A figure on disk.

    Attributes:
        kind: score-latency, phases, ablation or entropy-trace.
        suite: name of the suite.
        svg: path of the svg; the png lies beside it.
        subject: axis, method and reference cell of an ablation sheet, else empty.
        text: what to see, in one sentence, for the caption and for readers who cannot see it.
    """

    kind: str
    suite: str
    svg: Path
    text: str
    subject: tuple[str, ...] = ()


def draw_all(tables: dict[str, pd.DataFrame], folder: Path) -> list[Drawing]:
    """Draw every figure that the tables can give, in the order of the report."""
    runs = tables["runs"]
    drawings = []
    for suite, group in runs[runs["role"] == "main"].groupby("suite", sort=True):
        parts = [part for _, part in group.groupby(_CONDITIONS, sort=True, dropna=False)]
        for number, part in enumerate(parts, start=1):
            name = file_name(str(suite)) + (f"-{number}" if len(parts) > 1 else "")
            drawings += [score_against_time(part, folder, name), phases(part, folder, name)]
    sheets = list(tables["ablations"].groupby(ABLATION_SHEET, sort=True, dropna=False))
    names = [file_name(f"{axis}-{suite}-{method}") for (axis, suite, method, _), _ in sheets]
    for place, (_, points) in enumerate(sheets):
        again = names[:place].count(names[place])
        drawings.append(ablation(points, folder, names[place] + (f"-{again + 1}" if again else "")))
    return [drawing for drawing in drawings if drawing is not None]


def file_name(text: str) -> str:
    """The text as a part of a file name; a long one is cut and told apart by a hash."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", text).lstrip(".")
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}-{sha256(text.encode()).hexdigest()[:8]}"


def score_against_time(runs: pd.DataFrame, folder: Path, name: str) -> Drawing | None:
    """Score against ms per text token and against time per sample, one point a cell, with 95 % intervals.

    Args:
        runs: cells of one suite that ran under the same conditions.
        folder: where the files go.
        name: last part of the file name.
    """
    shown = runs[runs["score"].notna() & runs["ms_per_token"].notna()].reset_index(drop=True)
    if shown.empty:
        return None
    with canvas(1.5 + 0.19 * max(len(shown), 9), columns=2, sharey=True) as (figure, (left, right)):
        _points(left, shown, "ms_per_token", "ms_per_token", "ms per text token, prefill included")
        _points(right, shown, "e2e_ms_median", "e2e_ms", "ms per sample, median")
        left.set_ylabel("score")
        top = min(1.0, float(shown["score_high"].fillna(shown["score"]).max()) * 1.1) or 1.0
        _score_axis(left, top)
        _label_column(figure, right, shown, "e2e_ms_median")
        caption(figure, f"{shown['suite'][0]}: score against time", _footnote(shown), cpu_timed=_on_cpu(shown))
        svg = save(figure, folder, f"score-latency-{name}")
    text = "Score against time; upper left is better. Bars are 95 % intervals; hollow points are placebos."
    return Drawing("score-latency", str(shown["suite"][0]), svg, text)


def phases(runs: pd.DataFrame, folder: Path, name: str) -> Drawing | None:
    """Mean time per sample of each method, split into its phases."""
    shown = runs[runs["plain_ms_mean"].notna()].reset_index(drop=True)
    if shown.empty:
        return None
    with canvas(1.3 + 0.24 * len(shown)) as (figure, (axes,)):
        left = pd.Series(0.0, index=shown.index)
        for phase, (column, color, hatch) in PHASES.items():
            width = shown[column].fillna(0.0).astype(float)
            axes.barh(
                shown.index,
                width,
                left=left,
                color=color,
                hatch=hatch,
                label=phase,
                height=0.72,
                edgecolor="white",
            )
            left = left + width
        for place, total in left.items():
            axes.annotate(f"{total:.3g}", (total, place), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
        axes.set_yticks(shown.index, [_label(row) for row in shown.to_dict("records")], parse_math=False)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, float(left.max()) * 1.08 or 1.0)
        axes.set_xlabel("ms per sample, mean")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
        caption(
            figure, f"{shown['suite'][0]}: where the time goes", _footnote(shown, "means"), cpu_timed=_on_cpu(shown)
        )
        svg = save(figure, folder, f"phases-{name}")
    text = "Mean time per sample by phase. Decode is what is left after the prefill and the method's own phases."
    return Drawing("phases", str(shown["suite"][0]), svg, text)


def ablation(points: pd.DataFrame, folder: Path, name: str) -> Drawing | None:
    """Score, trigger rate and cost over the values of one axis, with the reference point marked."""
    points = points[points["n"] > 0].reset_index(drop=True)
    if points.empty:
        return None
    places, numeric = _places(points)
    axis, suite = str(points["axis"][0]), str(points["suite"][0])
    with canvas(7.0, rows=4, sharex=True) as (figure, panels):
        score, rate, cost, whole = panels
        _series(score, places, points, "score", ("score_low", "score_high"), VERMILLION, "D", "score", numeric)
        _series(
            rate,
            places,
            points,
            "trigger_rate",
            ("trigger_rate_low", "trigger_rate_high"),
            BLUE,
            "s",
            "triggers per decision step",
            numeric,
        )
        _series(rate, places, points, "above_tau_rate", None, GREY, "o", "steps above the threshold", numeric)
        ends = ("decode_ms_per_token_low", "decode_ms_per_token_high")
        _series(cost, places, points, "decode_ms_per_token", ends, GREEN, "^", "decode", numeric)
        _series(whole, places, points, "e2e_ms_median", ("e2e_ms_low", "e2e_ms_high"), DARK, "v", "sample", numeric)
        labels = ("score", "share of steps", "ms per text token,\nno prefill", "ms per sample,\nmedian")
        for axes, label in zip(panels, labels, strict=True):
            axes.set_ylabel(label)
            axes.set_ylim(0, max(axes.get_ylim()[1] * 1.08, 1e-9))
            _mark_reference(axes, places, points, named=axes is score)
        _score_axis(score, min(1.0, score.get_ylim()[1]))
        figure.align_ylabels(panels)
        # Above the panel: inside, its markers read as points of a sheet whose values are names.
        rate.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2)
        _value_axis(whole, places, points, numeric)
        title = f"{suite}, {points['method'][0]}: ablation of {axis}"
        caption(figure, title, _footnote(points), cpu_timed=_on_cpu(points))
        svg = save(figure, folder, f"ablation-{name}")
    text = f"Score, trigger rate and cost over {axis}; dashed: reference point; bars: 95 % intervals."
    return Drawing("ablation", suite, svg, text, (axis, str(points["method"][0]), str(points["reference_cell"][0])))


def _score_axis(axes: Axes, top: float) -> None:
    """From zero, with just enough room at either end for a marker that stands there."""
    axes.set_ylim(-0.03 * top, 1.03 * top)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 1.03 * top])


def _points(axes: Axes, shown: pd.DataFrame, x: str, bounds: str, label: str) -> None:
    for place, row in enumerate(shown.to_dict("records")):
        style = look(row["method"], place)
        axes.errorbar(
            row[x],
            row["score"],
            xerr=_bars(row[x], row[f"{bounds}_low"], row[f"{bounds}_high"]),
            yerr=_bars(row["score"], row["score_low"], row["score_high"]),
            color=style.color,
            marker=style.marker,
            markerfacecolor="white" if style.hollow else style.color,
            elinewidth=0.8,
            zorder=3,
        )
    axes.set_xlabel(label)
    axes.set_xlim(0, float(max(shown[x].max(), shown[f"{bounds}_high"].fillna(0).max())) * 1.1 or 1.0)


def _label_column(figure: Figure, axes: Axes, shown: pd.DataFrame, x: str) -> None:
    """Name every point in a column beside the axes, ordered by score, with a thin line to its point."""
    low, high = axes.get_ylim()
    order = shown.sort_values(["score", x], ascending=[False, True], kind="stable")
    gap = 1 / max(len(order), 9)
    heights = _spread([(score - low) / (high - low) for score in order["score"]], gap * 0.98)
    for height, (place, row) in zip(heights, order.iterrows(), strict=True):
        style = look(row["method"], int(place))
        axes.annotate(
            "",
            (row[x], row["score"]),
            (1.03, height),
            textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.6, "shrinkA": 4, "shrinkB": 4},
        )
        axes.plot(
            [1.03],
            [height],
            transform=axes.transAxes,
            clip_on=False,
            marker=style.marker,
            color=style.color,
            markersize=5,
            markerfacecolor="white" if style.hollow else style.color,
        )
        axes.annotate(
            _label(row),
            (1.03, height),
            (6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            parse_math=False,
            annotation_clip=False,
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move descending heights within [0, 1] at least the gap apart, from the top down."""
    placed: list[float] = []
    for number, height in enumerate(heights):
        ceiling = placed[-1] - gap if placed else 1 - gap / 2
        floor = gap / 2 + gap * (len(heights) - 1 - number)
        placed.append(max(min(height, ceiling), floor))
    return placed


def _bars(value: float, low: float, high: float) -> list[list[float]] | None:
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _places(points: pd.DataFrame) -> tuple[list[float], bool]:
    kinds = {is_percentile(value) for value in points["value"]}
    if points["value_number"].notna().all() and len(kinds) == 1:
        return [float(value) for value in points["value_number"]], True
    values = list(dict.fromkeys(points["value"]))
    return [float(values.index(value)) for value in points["value"]], False


def _series(
    axes: Axes,
    places: Sequence[float],
    points: pd.DataFrame,
    column: str,
    ends: tuple[str, str] | None,
    color: str,
    marker: str,
    label: str,
    numeric: bool,
) -> None:
    known = [place for place in points.index if pd.notna(points[column][place])]
    if not known:
        return
    bars = None
    if ends and points.loc[known, list(ends)].notna().all(axis=None):
        low, high = (points.loc[known, end] for end in ends)
        value = points.loc[known, column]
        bars = [(value - low).clip(lower=0), (high - value).clip(lower=0)]
    axes.errorbar(
        [places[place] for place in known],
        points.loc[known, column],
        yerr=bars,
        color=color,
        marker=marker,
        linestyle="-" if numeric else "none",
        elinewidth=0.8,
        label=label,
    )


def _mark_reference(axes: Axes, places: Sequence[float], points: pd.DataFrame, *, named: bool) -> None:
    for place in points.index[points["reference"].fillna(value=False)]:
        axes.axvline(places[place], color=GREY, linestyle="--", linewidth=0.9, zorder=1)
        if named:
            axes.annotate(
                "reference",
                (places[place], 0),
                (3, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=7.5,
                color=DARK,
            )


def _value_axis(axes: Axes, places: Sequence[float], points: pd.DataFrame, numeric: bool) -> None:
    axis = str(points["axis"][0])
    if not numeric:
        axes.set_xticks(places, points["value"], parse_math=False)
        if points["value"].str.len().max() > _LONG_VALUE:
            for text in axes.get_xticklabels():
                text.set(rotation=25, ha="right", rotation_mode="anchor")
        axes.set_xlabel(axis)
        axes.margins(x=0.08)
        return
    logarithmic = min(places) > 0 and max(places) / min(places) >= _LOG_FROM
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(places)), [f"{value:g}" for value in sorted(set(places))], minor=False)
    axes.minorticks_off()
    unit = ", percentile of the calibrated entropies" if is_percentile(points["value"].iloc[0]) else ""
    axes.set_xlabel(f"{axis}{unit}{' (log scale)' if logarithmic else ''}")


def _label(row: Any) -> str:
    settings = row["settings"]
    if not isinstance(settings, str) or not settings:
        return str(row["method"])
    # A long label takes its width from the axes: the first setting tells arms apart, the table beside has them all.
    key, _, value = settings.split(", ")[0].partition("=")
    shown = value if key == "memory" else f"{key.rpartition('.')[2]}={value[:16]}"
    return f"{row['method']} ({shown})"


def _footnote(rows: pd.DataFrame, bars: str = "bars are 95 % intervals") -> str:
    first = rows.iloc[0]
    conditions = f"{first['model']}, {first['device']}, {first['dtype']}, batch {first['batch_size']}"
    size = f"n = {_span(rows['n'])} samples"
    if "timed_samples" in rows and not (rows["timed_samples"] == rows["n"]).all():
        # Of a cell that was run in several goes, the times of one count.
        size += f", times of {_span(rows['timed_samples'])}"
    return f"{conditions}; {size}; {bars}"


def _span(numbers: pd.Series) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low} to {high}"


def _on_cpu(rows: pd.DataFrame) -> bool:
    return bool((rows["device"] == "cpu").any())
