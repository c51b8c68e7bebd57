"""The curve of a training: one row a step, kept as a tidy csv beside the checkpoint.

The file is always written whole from the rows that the resumable state holds, so a training that was killed and
continued has every step once.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

CURVES_FILE = "curves.csv"
CURVE_COLUMNS = (
    "step",
    "progress",
    "loss_nats_token",
    "validation_loss_nats_token",
    "grad_norm",
    "lr",
    "target_tokens",
    "seconds",
)


@dataclass(frozen=True)
class TrainStep:
    """What a step reports.

    Attributes:
        step: its number, from 1.
        progress: share of the run that was done when it began.
        loss: mean over the step's target tokens, nats a token.
        grad_norm: before clipping.
        lr: learning rate of the step.
        validation_loss: after the step, nats a token; None where it was not measured.
        target_tokens: target tokens trained on up to here.
        seconds: of training up to here, validation included, interruptions not.
    """

    step: int
    progress: float
    loss: float
    grad_norm: float
    lr: float
    validation_loss: float | None = None
    target_tokens: int = 0
    seconds: float = 0.0

    def as_row(self) -> list[float | None]:
        """The values in the order of `CURVE_COLUMNS`."""
        step, progress, loss, norm, lr, validation, tokens, seconds = astuple(self)
        return [step, progress, loss, validation, norm, lr, tokens, seconds]

    @classmethod
    def from_row(cls, row: Sequence[float]) -> TrainStep:
        """What `as_row` gave, where a value that was not measured may be NaN."""
        step, progress, loss, validation, norm, lr, tokens, seconds = row
        known = None if validation is None or validation != validation else validation
        return cls(int(step), progress, loss, norm, lr, known, int(tokens), seconds)


def write_curves(path: Path, steps: Sequence[TrainStep]) -> None:
    """Write the table, replacing an older one at once; a value that was not measured is an empty field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CURVE_COLUMNS)
        writer.writerows([_short(value) for value in step.as_row()] for step in steps)
    partial.replace(path)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.8g}"
