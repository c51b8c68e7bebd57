"""How the memories behind the results were trained: their curves as one tidy table and a figure a backbone and suite.

The curves lie beside the checkpoints (`curves.csv`). Shown are those below `<results>/checkpoints` and those beside the
checkpoints that the cells name, the bundled ones included; a checkpoint without a curve, such as one from a hub, is
left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flashmem_bench.report.cells import Cell
from flashmem_bench.report.figures import Drawing, file_name
from flashmem_bench.report.measures import Record
from flashmem_bench.report.style import canvas, caption, look, save

_CURVES = "curves.csv"
_DASHES = ("-", "--", ":", "-.")
# Steps over which the drawn loss is averaged, as a share of all.
_SMOOTH = 50


def training_records(cells: Sequence[Cell], root: Path) -> list[Record]:
    """One record a step of every training whose curve is known.

    Args:
        cells: whose checkpoints are looked up.
        root: the results folder.
    """
    return [record for folder in _folders(cells, root) for record in _records(folder, root)]


def _folders(cells: Sequence[Cell], root: Path) -> list[Path]:
    # A manifest names nobody's home folder.
    told = {str(cell.manifest.get("descr", {}).get("checkpoint")) for cell in cells}
    named = {_here(Path(path).expanduser(), root) for path in told}
    below = (root / "checkpoints").glob(f"**/{_CURVES}")
    found = {path.resolve() for path in [*named, *(path.parent for path in below)] if (path / _CURVES).is_file()}
    return sorted(path for path in found if (path / "config.json").is_file())


def _here(named: Path, root: Path) -> Path:
    """The folder that a cell names, or its copy in this results folder, where that was moved or copied."""
    if "checkpoints" not in named.parts:
        return named
    inside = named.parts[len(named.parts) - named.parts[::-1].index("checkpoints") :]
    copy = root.joinpath("checkpoints", *inside)
    return copy if copy.is_dir() else named


def _records(folder: Path, root: Path) -> Iterator[Record]:
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts, backbone = record["metadata"], record["backbone"]["name"]
        curve = pd.read_csv(folder / _CURVES)
    except (OSError, ValueError, KeyError, TypeError):
        return
    inside = folder.is_relative_to(root.resolve())
    known = {
        "checkpoint": str(folder.relative_to(root.resolve())) if inside else "/".join(folder.parts[-4:]),
        "model": backbone,
        "suites": ",".join(facts.get("suites", [])),
        "method": facts.get("method"),
        "train_seed": facts.get("train_seed"),
        "best_step": facts.get("best_step"),
    }
    for row in curve.to_dict("records"):
        yield {**known, **{str(key): None if value != value else value for key, value in row.items()}}


def draw_training(training: pd.DataFrame, folder: Path) -> list[Drawing]:
    """Loss against steps, one figure for each backbone and suites: lines are training, marks are held out."""
    drawings = []
    for (model, suites), part in training.groupby(["model", "suites"], sort=True):
        title = f"{suites.replace(',', ', ')}: training on {model}"
        with canvas(3.4) as (figure, (axes,)):
            for place, ((method, seed, _), one) in enumerate(part.groupby(["method", "train_seed", "checkpoint"])):
                _curve(axes, one, f"{method}, seed {seed}", str(method), place)
            axes.set_xlabel("optimiser step")
            axes.set_ylabel("loss, nats a target token")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
            note = "lines: training, running mean; marks: held-out examples; ringed: the parameters that were kept"
            caption(figure, title, note, cpu_timed=False)
            svg = save(figure, folder, f"training-{file_name(model)}-{file_name(suites)}"[:120])
        drawings.append(Drawing("training", "", svg, f"Training curves of the memories on {suites}, {model}."))
    return drawings


def _curve(axes: Any, one: pd.DataFrame, label: str, method: str, place: int) -> None:
    style = look(method, place)
    width = max(1, len(one) // _SMOOTH)
    smooth = one["loss_nats_token"].astype(float).rolling(width, min_periods=1).mean()
    axes.plot(one["step"], smooth, color=style.color, linestyle=_DASHES[place % len(_DASHES)], label=label)
    held = one[one["validation_loss_nats_token"].notna()]
    axes.plot(held["step"], held["validation_loss_nats_token"], style.marker, color=style.color, markersize=4)
    best = held[held["step"] == held["best_step"]]
    axes.plot(
        best["step"], best["validation_loss_nats_token"], "o", markersize=10, markerfacecolor="none", color=style.color
    )
