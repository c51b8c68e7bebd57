"""The tables that a command prints at its end: one line a headline cell, or one a point of an ablation axis.

A table that is wider than its place loses whole columns, the least important first, rather than letters. Nothing is
printed here; the caller owns the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from flashmem_bench.report import wording as say
from flashmem_bench.report.cells import CONDITIONS

if TYPE_CHECKING:
    import pandas as pd

CPU_STAMP = "CPU timing, not comparable with GPU"
_GAP = 2
_NAME_WIDTH = 26
_DROP_RUNS = ("no answer", "cut", "lat.", "time", "vs vanilla")
_DROP_ABLATION = ("ms/sample", "trig. rate")


def runs_table(runs: pd.DataFrame, title: str = "Results", width: int | None = None) -> Table:
    """Headline cells as a rich table.

    Args:
        runs: the ``runs`` table; cells that are only points of an ablation are left out.
        title: what stands above it.
        width: columns of the terminal; None keeps every column.
    """
    main = runs[runs["role"] == "main"]
    lines: list[dict[str, str]] = []
    for suite, here in main.groupby("suite", sort=False):
        parts = [rows for _, rows in here.groupby(list(CONDITIONS), sort=True, dropna=False)]
        for rows in parts:
            where = f" ({', '.join(str(rows[name].iloc[0]) for name in CONDITIONS)})" if len(parts) > 1 else ""
            lines.append({"method": f"{suite}{where}"})
            lines += [_run_line(row) for row in rows.to_dict("records")]
    caption = (
        "score %: mean, 95 % interval; vs vanilla: points, paired 95 % interval; trig., lat.: triggers and latents a "
        "sample; ms/tok with prefill; time: against vanilla; cut: at the token budget"
    )
    return _table(_stamped(title, main), caption, lines, _DROP_RUNS, width)


def ablation_table(ablations: pd.DataFrame, title: str = "Ablation", width: int | None = None) -> Table:
    """The points of the ablation axes as a rich table, the reference point marked.

    Args:
        ablations: the ``ablations`` table.
        title: what stands above it.
        width: columns of the terminal; None keeps every column.
    """
    lines: list[dict[str, str]] = []
    sheets = ablations.groupby(["axis", "suite", "method", "reference_cell"], sort=False, dropna=False)
    for (axis, suite, method, _), rows in sheets:
        lines.append({"value": f"{axis}: {suite}, {method}"})
        lines += [_ablation_line(row) for row in rows.to_dict("records")]
    caption = "* reference point; score %: mean, 95 % interval; vs reference: points, paired 95 % interval"
    return _table(_stamped(title, ablations), caption, lines, _DROP_ABLATION, width)


def _run_line(row: dict[str, Any]) -> dict[str, str]:
    settings = f" ({row['settings']})" if say.known(row["settings"]) and row["settings"] else ""
    return {
        "method": f" {row['method']}{settings}",
        "n": say.whole(row["n"]),
        "score %": say.percent_interval(row["score"], row["score_low"], row["score_high"]),
        "vs vanilla": say.points(row["delta_vanilla"], row["delta_low"], row["delta_high"]),
        "trig.": say.number(row["triggers_mean"], 2),
        "lat.": say.number(row["latents_mean"], 2),
        "ms/tok": say.number(row["ms_per_token"]),
        "time": say.times(row["time_ratio"]),
        "cut": say.share(row["truncated_rate"]),
        "no answer": say.share(row["no_answer_rate"]),
    }


def _ablation_line(row: dict[str, Any]) -> dict[str, str]:
    return {
        "value": f" {row['value']} *" if row["reference"] else f" {row['value']}",
        "n": say.whole(row["n"]),
        "score %": say.percent_interval(row["score"], row["score_low"], row["score_high"]),
        "vs reference": say.points(row["delta_reference"], row["delta_low"], row["delta_high"]),
        "trig. rate": say.share(row["trigger_rate"]),
        "ms/tok, no prefill": say.number(row["decode_ms_per_token"]),
        "ms/sample": say.number(row["e2e_ms_median"]),
    }


def _stamped(title: str, rows: pd.DataFrame) -> str:
    return f"{title}\n{CPU_STAMP}" if (rows["device"] == "cpu").any() else title


def _table(
    title: str,
    caption: str,
    lines: Sequence[dict[str, str]],
    expendable: Sequence[str],
    width: int | None,
) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    headings = _fitting(lines, expendable, width)
    for place, heading in enumerate(headings):
        if place == 0:
            table.add_column(heading, overflow="fold", min_width=_NAME_WIDTH)
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        # Text, not markup: settings in brackets must not be taken for a style. A lone name heads a group.
        style = "bold" if len(line) == 1 else ""
        table.add_row(*(Text(line.get(heading, ""), style=style) for heading in headings))
    return table


def _fitting(lines: Sequence[dict[str, str]], expendable: Sequence[str], width: int | None) -> list[str]:
    """The headings that fit, dropping expendable ones in their order."""
    headings = list(max(lines, key=len, default={}))
    space = {name: max(len(line.get(name, "")) for line in [*lines, {name: name}]) + _GAP for name in headings}
    # The first column holds names, which may run over several lines.
    space |= {name: min(space[name], _NAME_WIDTH + _GAP) for name in headings[:1]}
    for name in expendable:
        if width is None or sum(space[heading] for heading in headings) + _GAP <= width:
            break
        if name in headings:
            headings.remove(name)
    return headings
