"""The entropy trace: one answer, token by token, with the moments at which a memory was injected.

Each mark is one decision step: the entropy just before the token below it was chosen. The sample is picked by a
fixed rule (up to three triggers, then readable length, then the first in suite order), never by how well it looks. Of
a long answer the beginning is shown, and the note says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmem_bench.report.cells import FLASHMEM, Cell
from flashmem_bench.report.figures import Drawing, file_name
from flashmem_bench.report.style import BLUE, DARK, VERMILLION, canvas, caption, save

_PER_LINE = 44
_SHOWN_STEPS = 3 * _PER_LINE


def draw_traces(cells: Sequence[Cell], folder: Path) -> list[Drawing]:
    """One trace a suite, of the first flashmem cell that has a sample with triggers."""
    drawings: dict[str, Drawing] = {}
    for cell in cells:
        if cell.method == FLASHMEM and cell.is_main and cell.suite not in drawings:
            picked = pick_sample(cell)
            if picked is not None:
                drawings[cell.suite] = draw_trace(cell, picked, folder)
    return list(drawings.values())


def pick_sample(cell: Cell) -> str | None:
    """Id of the sample to show, None when no sample has both triggers and entropies."""
    best: tuple[int, int, int] | None = None
    chosen = None
    for place, row in enumerate(cell.rows):
        text = cell.texts.get(row["sample_id"], {})
        steps = len(text.get("entropies") or [])
        seen = sum(trigger["text_index"] < min(steps, _SHOWN_STEPS) for trigger in text.get("triggers") or [])
        if not seen or steps < 2:
            continue
        rank = (min(seen, 3), _PER_LINE - abs(_PER_LINE - steps), -place)
        if best is None or rank > best:
            best, chosen = rank, row["sample_id"]
    return chosen


def draw_trace(cell: Cell, sample_id: str, folder: Path) -> Drawing:
    """Draw the trace of one sample."""
    text, row = cell.texts[sample_id], cell.by_sample[sample_id]
    entropies, tokens = text["entropies"][:_SHOWN_STEPS], text["tokens"]
    count = math.ceil(len(entropies) / _PER_LINE)
    length = math.ceil(len(entropies) / count)
    lines = [slice(start, start + length) for start in range(0, len(entropies), length)]
    fired = {trigger["text_index"] for trigger in text["triggers"]}
    ceiling = max([*(value for value in entropies if value is not None), row.get("threshold") or 0.0]) * 1.15
    with canvas(1.0 + 1.9 * len(lines), rows=len(lines), sharey=True) as (figure, panels):
        for axes, part in zip(panels, lines, strict=True):
            _panel(axes, part, entropies, tokens, fired, row.get("threshold"))
            axes.set_ylim(0, ceiling or 1.0)
        panels[-1].set_xlabel("token chosen at this step")
        panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=3)
        score = "no score" if row.get("score") is None else f"score {row['score']:g}"
        note = f"{row.get('model')}; sample {sample_id}, {score}; picked for triggers and length, not score"
        if len(entropies) < len(text["entropies"]):
            note += f"; first {len(entropies)} of {len(text['entropies'])} steps"
        caption(figure, f"{cell.suite}: attention entropy of one answer of {cell.method}", note, cpu_timed=False)
        svg = save(figure, folder, f"entropy-trace-{file_name(cell.suite)}")
    said = f"Attention entropy before each token of sample {sample_id}; dashed: a memory was injected."
    return Drawing("entropy-trace", cell.suite, svg, said)


def _panel(
    axes: Any,
    part: slice,
    entropies: Sequence[float | None],
    tokens: Sequence[str],
    fired: set[int],
    threshold: float | None,
) -> None:
    steps = range(*part.indices(len(entropies)))
    axes.plot(steps, [entropies[step] for step in steps], color=BLUE, marker="o", markersize=3.5, label="entropy")
    if threshold is not None:
        axes.axhline(threshold, color=DARK, linestyle=":", linewidth=1, label=f"threshold {threshold:.3g}")
    here = [step for step in steps if step in fired]
    for step in here:
        axes.axvline(step, color=VERMILLION, linestyle="--", linewidth=0.9, zorder=1)
    axes.plot(
        here,
        [entropies[step] for step in here],
        "D",
        color=VERMILLION,
        markersize=6,
        label="memory injected",
        zorder=4,
    )
    labels = [printable(tokens[step]) if step < len(tokens) else "" for step in steps]
    axes.set_xticks(list(steps), labels, rotation=90, family="DejaVu Sans Mono", fontsize=7, parse_math=False)
    axes.set_xlim(part.start - 0.6, part.stop - 0.4)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("nats")


def printable(token: str) -> str:
    """A token as a tick label: white space made visible, nothing that the font has no glyph for."""
    shown = token.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7")
    return "".join(letter if letter.isprintable() and ord(letter) < 0x2600 else "\u25a1" for letter in shown)[:14]
