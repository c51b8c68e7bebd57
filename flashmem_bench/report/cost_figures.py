"""Cost against context, from the latency protocol: time a token, the ratio to plain decoding, and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from flashmem_bench import stats
from flashmem_bench.report.cells import VANILLA
from flashmem_bench.report.figures import Drawing, file_name
from flashmem_bench.report.style import GREY, canvas, caption, look, save

_CONDITIONS = ["protocol", "model", "device", "dtype", "exec"]
_MIB = 2.0**20
_MOST_LINES = 10
# On the protocol's clock their own triggers do not decide, so that their work is flashmem's.
_SAME_CLOCK = frozenset(
    {"flashmem-literal", "flashmem-no-monitor", "flashmem-fixed-trigger", "flashmem-output-entropy", "flashmem-plus"}
)


def draw_latency(latency: pd.DataFrame, folder: Path) -> list[Drawing]:
    """One figure for each backbone, device and protocol with more than one context or method."""
    found = []
    for key, rows in latency.groupby(_CONDITIONS, sort=True, dropna=False):
        if rows["method"].nunique() > 1:
            found.append(_draw(rows.reset_index(drop=True), key, folder))
    return found


def _draw(rows: pd.DataFrame, key: tuple[str, ...], folder: Path) -> Drawing:
    protocol, model, device, dtype, mode = key
    panels: list[tuple[str, Callable[[Axes, pd.DataFrame], None]]] = [
        ("ms a text token with prefill (log)", _per_token),
        ("time against vanilla with prefill (log)", _ratio),
        ("the same without prefill (log)", _decode_ratio),
    ]
    if rows["peak_alloc_bytes"].notna().any():
        panels.append(("peak memory, MiB", _memory))
    shown, left_out = _told_apart(rows)
    columns = 2
    lines = -(-len(panels) // columns)
    with canvas(2.6 * lines + 1.0, rows=lines, columns=columns) as (figure, axes):
        for place, (title, draw) in zip(axes, panels, strict=False):
            draw(place, shown)
            place.set_title(title, loc="left")
            _context_axis(place, shown)
        for place in axes[len(panels) :]:
            place.axis("off")
        handles, labels = axes[0].get_legend_handles_labels()
        if len(panels) < len(axes):
            axes[-1].legend(handles, labels, loc="center")
        else:
            figure.legend(handles, labels, loc="outside right center")
        footnote = f"{model}, {dtype}, {mode}, protocol {protocol}; bars: 95 % intervals over runs; no score is taken"
        footnote += f"\n{left_out} methods that do the same work as one of these are in the table" if left_out else ""
        caption(figure, f"Cost against context: {model}", footnote, cpu_timed=device == "cpu")
        svg = save(figure, folder, f"latency-{file_name(f'{model}-{device}-{protocol}')}")
    text = "Time a token, its ratio to plain decoding, and memory against the length of the context, by method."
    return Drawing("latency", "", svg, text)


def _told_apart(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The rows to draw, and how many methods stay out: where many were timed, those of the same work as another."""
    methods = set(rows["method"])
    twins = {name for name in methods if name.endswith("-memory") or name in _SAME_CLOCK}
    if len(methods) <= _MOST_LINES or len(methods - twins) < 2:
        return rows, 0
    return rows[~rows["method"].isin(twins)].reset_index(drop=True), len(twins)


def _per_token(axes: Axes, rows: pd.DataFrame) -> None:
    def value(part: pd.DataFrame, plain: pd.DataFrame | None) -> stats.Interval:
        del plain
        return stats.median_interval(part["e2e_ms"] / part["output_tokens"])

    _lines(axes, rows, value)
    _log_axis(axes, "{:g}")


def _ratio(axes: Axes, rows: pd.DataFrame) -> None:
    _ratios(axes, rows, "e2e_ms")


def _decode_ratio(axes: Axes, rows: pd.DataFrame) -> None:
    _ratios(axes, rows, "decode_ms")


def _ratios(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    def value(part: pd.DataFrame, plain: pd.DataFrame | None) -> stats.Interval:
        if plain is None or plain.empty:
            return stats.NOTHING
        n = min(len(part), len(plain))
        return stats.geometric_mean_ratio(part[column][:n], plain[column][:n], resamples=2000)

    _lines(axes, rows[rows["method"] != VANILLA], value, rows[rows["method"] == VANILLA])
    axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1)
    _log_axis(axes, "{:g}x")


def _memory(axes: Axes, rows: pd.DataFrame) -> None:
    def value(part: pd.DataFrame, plain: pd.DataFrame | None) -> stats.Interval:
        del plain
        return stats.Interval(float(part["peak_alloc_bytes"].max()) / _MIB, np.nan, np.nan)

    _lines(axes, rows[rows["peak_alloc_bytes"].notna()], value)
    axes.set_ylim(bottom=0)


def _lines(
    axes: Axes,
    rows: pd.DataFrame,
    value: Callable[[pd.DataFrame, pd.DataFrame | None], stats.Interval],
    plain: pd.DataFrame | None = None,
) -> None:
    """One line a method over the contexts that it was timed at."""
    for place, (method, part) in enumerate(rows.groupby("method", sort=False)):
        style = look(str(method), place)
        points = []
        for context, here in part.groupby("context", sort=True):
            twin = None if plain is None else plain[plain["context"] == context]
            points.append((float(context), value(here.reset_index(drop=True), twin)))
        known = [(context, found) for context, found in points if not np.isnan(found.estimate)]
        ends = np.array([[f.estimate - f.low, f.high - f.estimate] for _, f in known]).T if known else None
        axes.errorbar(
            [context for context, _ in known],
            [found.estimate for _, found in known],
            yerr=None if ends is None or np.isnan(ends).any() else np.maximum(ends, 0),
            color=style.color,
            marker=style.marker,
            markerfacecolor="white" if style.hollow else style.color,
            label=str(method),
        )


def _log_axis(axes: Axes, form: str) -> None:
    """A logarithmic axis with a handful of plain numbers on it, however short it is."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 1.5, 2, 3, 5, 7) if high / low > 3 else (1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda number, _: form.format(round(number, 3)))


def _context_axis(axes: Axes, rows: pd.DataFrame) -> None:
    contexts = sorted(set(rows["context"].astype(int)))
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{value // 1024}k" if value % 1024 == 0 else str(value) for value in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")
