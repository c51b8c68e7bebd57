"""The look of every figure, in one place.

Colours are those of Okabe and Ito, which people with any common colour-vision deficiency can tell apart, and
no meaning rests on colour alone: methods also have markers, phases also have hatches. Axes of scores, shares
and times begin at zero. Text is set at the size at which it is printed in a two-column page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

from flashmem_bench.terminal import clean

CPU_STAMP = "CPU timing, not comparable with GPU"

BLACK, GREY, ORANGE, SKY, GREEN = "#000000", "#7a7a7a", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
DARK, FAINT = "#4d4d4d", "#c8c8c8"
WIDTH_INCH = 7.2
_TITLE_LETTERS = 78


@dataclass(frozen=True)
class Look:
    """Colour and marker of a method; placebos are hollow."""

    color: str
    marker: str
    hollow: bool = False


_LOOKS = {
    "vanilla": Look(BLACK, "o"),
    "flashmem": Look(VERMILLION, "D"),
    "flashmem-watch": Look(BLACK, "D", hollow=True),
    "flashmem-literal": Look(ORANGE, "d"),
    "flashmem-prompt-end": Look(ORANGE, "^"),
    "flashmem-no-monitor": Look(ORANGE, "v"),
    "flashmem-fixed-trigger": Look(SKY, "s"),
    "flashmem-random-trigger": Look(SKY, "s", hollow=True),
    "flashmem-output-entropy": Look(GREEN, "P"),
    "flashmem-matched-fixed": Look(SKY, "D", hollow=True),
    "flashmem-matched-output": Look(GREEN, "P", hollow=True),
    "flashmem-separate-encoder": Look(BLUE, "X"),
    "flashmem-random-memory": Look(PURPLE, "o", hollow=True),
    "flashmem-shuffled-memory": Look(PURPLE, "D", hollow=True),
    "flashmem-mean-memory": Look(PURPLE, "^", hollow=True),
    "flashmem-noop-memory": Look(PURPLE, "v", hollow=True),
    "flashmem-plus": Look(VERMILLION, "*"),
    "memgen": Look(GREY, "s"),
    "memgen-cached": Look(GREY, "s", hollow=True),
    "memgen-noop-memory": Look(GREY, "v", hollow=True),
    "lora-sft": Look(BLUE, "p"),
    "prompt-tuning": Look(BLUE, "h", hollow=True),
    "cot-sc": Look(GREEN, "*"),
    "snapkv": Look(SKY, "<"),
    "streaming-llm": Look(SKY, ">"),
    "tova": Look(SKY, "<", hollow=True),
    "h2o": Look(SKY, ">", hollow=True),
}
_SPARE = tuple(Look(color, marker) for marker in "<>ph*" for color in (BLUE, GREEN, GREY, PURPLE, SKY))

PHASES = {
    "prefill": ("prefill_ms_mean", GREY, ""),
    "decode": ("plain_ms_mean", SKY, ""),
    "monitor": ("monitor_ms_mean", ORANGE, "///"),
    "consolidate": ("consolidate_ms_mean", VERMILLION, "\\\\\\"),
    "inject": ("inject_ms_mean", GREEN, "..."),
}

_RC = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 6,
    "errorbar.capsize": 2,
    "hatch.linewidth": 0.6,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    # The same tables give byte-identical files.
    "svg.hashsalt": "flashmem-bench",
    "svg.fonttype": "path",
    # Labels hold names and settings, where a dollar is a dollar.
    "text.parse_math": False,
}


def look(method: str, place: int = 0) -> Look:
    """Colour and marker of a method; an unknown one gets a spare look by its place in the table."""
    return _LOOKS.get(method) or _SPARE[place % len(_SPARE)]


@contextmanager
def canvas(height_inch: float, rows: int = 1, columns: int = 1, **subplots: object) -> Iterator[tuple[Figure, list]]:
    """A figure in the common style, drawn without any window system.

    Yields:
        The figure and its axes as a flat list.
    """
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(WIDTH_INCH, height_inch))
        yield figure, list(figure.subplots(rows, columns, squeeze=False, **subplots).flat)


def caption(figure: Figure, title: str, footnote: str, *, cpu_timed: bool) -> None:
    """Set what the figure shows above it, stamped when its times are a CPU's, and the conditions below."""
    stamp = f"[{CPU_STAMP}]" if cpu_timed else ""
    gap = "\n" if len(title) + len(stamp) > _TITLE_LETTERS else "  "
    figure.suptitle(
        f"{title}{gap}{stamp}".rstrip(), fontsize=10, x=0.01, ha="left", fontweight="bold", parse_math=False
    )
    figure.supxlabel(footnote, fontsize=7.5, x=0.01, ha="left", color=DARK, parse_math=False)


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write png and svg; returns the path of the svg."""
    folder.mkdir(parents=True, exist_ok=True)
    _make_readable(figure)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    return folder / f"{name}.svg"


def _make_readable(figure: Figure) -> None:
    """Replace control characters in every text: fonts have none, and XML may not hold them, not even in a comment."""
    for text in figure.findobj(Text):
        text.set_text(_printable(text.get_text()))
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formatter = axis.get_major_formatter()
            # Labels of ticks are set anew from here whenever the figure is drawn.
            if isinstance(formatter, FuncFormatter):
                axis.set_major_formatter(FuncFormatter(partial(_printed, formatter.func)))


def _printed(label: Callable[[float, int | None], str], value: float, place: int | None) -> str:
    return _printable(label(value, place))


def _printable(text: str) -> str:
    # The sign of a control character is in few fonts; a box is in this one.
    return "".join("\u25a1" if 0x2400 <= ord(letter) < 0x2422 else letter for letter in clean(text))
