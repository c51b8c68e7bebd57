"""Coordinates of the drawings in a story: the entropy curve and the heat map of attention.

Only numbers are made here; the template turns them into SVG, so that all text is escaped in one place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Context = dict[str, Any]

# Letters of a token's name, elsewhere and on an axis; the width of one there.
LETTERS, STEP_LETTERS, NAME_LETTERS = 18, 13, 9
_LETTER = 6.7

# Entropy curves, in SVG units: attention above, output below, each on a scale of its own.
_WIDTH, _LEFT, _TOP = 1130, 46, 30
_HEIGHTS, _BETWEEN = {"entropy": 120, "output_entropy": 84}, 18
_PER_LINE, _WIDEST_STEP = 58, 46
# Heat map.
_MAP_WIDTH, _MAP_LEFT, _ROW, _NAMES = 700, 30, 15, 8
_LABEL_GAP = 17
# A cell fainter than this cannot be seen and is not drawn.
_FAINT = 0.02


def shown(piece: str, letters: int = LETTERS) -> str:
    """A token as a label: white space made visible, control characters as boxes, cut to a few letters."""
    marks = piece.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7")
    plain = "".join(letter if letter.isprintable() else "\u25a1" for letter in marks) or "\u2205"
    return plain if len(plain) <= letters else plain[: letters - 1] + "\u2026"


def entropy_panels(trace: Context) -> list[Context]:
    """The steps in lines of equal length, each with its curves, marks and the tokens on its axis."""
    steps = trace["steps"]
    if not steps:
        return []
    lines = math.ceil(len(steps) / _PER_LINE)
    length = math.ceil(len(steps) / lines)
    spacing = min(_WIDEST_STEP, (_WIDTH - _LEFT - 40) / length)
    starts = range(0, len(steps), length)
    return [_panel(trace, range(start, min(start + length, len(steps))), spacing) for start in starts]


def watched_entropy(trace: Context) -> str:
    """Name of the entropy that the trigger compares with tau."""
    return "output_entropy" if trace["trigger"] == "output-entropy" else "entropy"


def _panel(trace: Context, steps: range, spacing: float) -> Context:
    places = {step: round(_LEFT + spacing * (step - steps.start + 0.5), 1) for step in steps}
    right = round(_LEFT + spacing * len(steps), 1)
    first = _curve(trace, "entropy", places, _TOP)
    second = _curve(trace, "output_entropy", places, first["bottom"] + _BETWEEN)
    fired = {injection["text_index"]: number for number, injection in enumerate(trace["injections"], start=1)}
    names = [shown(trace["answer"][step], STEP_LETTERS) if step < len(trace["answer"]) else "" for step in steps]
    return {
        "width": max(right + 40, 330),
        "height": second["bottom"] + 16 + round(_LETTER * max(len(name) for name in names)),
        "left": _LEFT,
        "right": right,
        "curves": [first, second],
        "bottom": second["bottom"],
        "steps": [
            {"x": x, "memory": fired.get(step), "name": name}
            for (step, x), name in zip(places.items(), names, strict=True)
        ],
    }


def _curve(trace: Context, name: str, places: dict[int, float], top: int) -> Context:
    """One entropy over the steps of a line; the scale is that of the whole answer."""
    watched = watched_entropy(trace) == name
    tau = trace["tau"] if watched else None
    most = 1.1 * max([*(step[name] for step in trace["steps"]), tau or 0.0]) or 1.0
    height = _HEIGHTS[name]

    def y(value: float) -> float:
        return round(top + height * (1 - value / most), 1)

    points = [
        {
            "x": x,
            "y": y(trace["steps"][step][name]),
            "value": trace["steps"][step][name],
            "step": step,
            "above": watched and bool(trace["steps"][step]["above_tau"]),
        }
        for step, x in places.items()
    ]
    return {
        "kind": name.replace("_", "-"),
        "label": "output" if name == "output_entropy" else "attention",
        "top": top,
        "bottom": top + height,
        "points": points,
        "line": " ".join(f"{point['x']},{point['y']}" for point in points),
        "tau": None if tau is None else y(tau),
        "ticks": [{"y": y(value), "text": f"{value:g}"} for value in _ticks(most)],
    }


def _ticks(top: float) -> list[float]:
    """Round numbers from 0, three to five of them."""
    raw = top / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    return [round(step * count, 10) for count in range(int(top / step) + 1)]


def heat_map(rows: Sequence[dict[int, float]], kinds: Sequence[str], names: Sequence[str], sinks: int) -> Context:
    """Latents by history positions.

    Args:
        rows: for each latent its weight by position; positions that are missing were too light to be kept.
        kinds: for each position prompt, answer or latent.
        names: for each position the text to name it by.
        sinks: positions at the start that do not set the scale.
    """
    total = len(kinds)
    columns = min(total, _MAP_WIDTH // 2)
    cell = _MAP_WIDTH / columns
    labels = _labels(rows, names, sinks, total)
    strongest = max((weight for row in rows for place, weight in row.items() if place >= sinks), default=0.0) or 1.0
    cells = []
    for number, row in enumerate(rows):
        heaviest: dict[int, tuple[float, int]] = {}
        for place, weight in row.items():
            column = place * columns // total
            heaviest[column] = max(heaviest.get(column, (0.0, 0)), (weight, place))
        cells += [
            {
                "x": round(_MAP_LEFT + column * cell, 2),
                "y": number * _ROW,
                "shade": round(shade, 3),
                "hover": f"latent {number + 1}, position {place}, {names[place]}: {100 * weight:.1f} %",
            }
            for column, (weight, place) in sorted(heaviest.items())
            if (shade := min(1.0, weight / strongest) ** 0.5) > _FAINT
        ]
    return {
        "width": _MAP_WIDTH + _MAP_LEFT + 12,
        "left": _MAP_LEFT,
        "cell": round(max(cell, 2.5), 2),
        "row": _ROW,
        "bottom": len(rows) * _ROW,
        "height": len(rows) * _ROW + 30 + round(_LETTER * max((len(label["name"]) for label in labels), default=0)),
        "cells": cells,
        "latents": len(rows),
        "bands": _bands(kinds),
        "labels": labels,
        "binned": columns < total,
    }


def _bands(kinds: Sequence[str]) -> list[Context]:
    """Runs of positions of one kind, as stretches of the axis."""
    bands: list[Context] = []
    scale = _MAP_WIDTH / len(kinds)
    for place, kind in enumerate(kinds):
        if bands and bands[-1]["kind"] == kind:
            bands[-1]["count"] += 1
        else:
            bands.append({"kind": kind, "start": place, "count": 1})
    return [
        {
            "kind": band["kind"],
            "count": band["count"],
            "x": round(_MAP_LEFT + band["start"] * scale, 2),
            "width": round(band["count"] * scale, 2),
        }
        for band in bands
    ]


def _labels(rows: Sequence[dict[int, float]], names: Sequence[str], sinks: int, total: int) -> list[Context]:
    """The heaviest positions by name, moved apart until no two names overlap."""
    mass: dict[int, float] = {}
    for row in rows:
        for place, weight in row.items():
            if place >= sinks:
                mass[place] = mass.get(place, 0.0) + weight
    chosen = sorted(sorted(mass, key=lambda place: -mass[place])[:_NAMES])
    spots = [_MAP_LEFT + (place + 0.5) * _MAP_WIDTH / total for place in chosen]
    for index in range(1, len(spots)):
        spots[index] = max(spots[index], spots[index - 1] + _LABEL_GAP)
    limit = float(_MAP_LEFT + _MAP_WIDTH)
    for index in reversed(range(len(spots))):
        spots[index] = min(spots[index], limit)
        limit = spots[index] - _LABEL_GAP
    return [
        {
            "at": round(_MAP_LEFT + (place + 0.5) * _MAP_WIDTH / total, 1),
            "x": round(spot, 1),
            "name": f"{shown(names[place], NAME_LETTERS)} {100 * mass[place] / len(rows):.0f} %",
        }
        for place, spot in zip(chosen, spots, strict=True)
    ]
