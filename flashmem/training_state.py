"""What a training needs to go on after a kill: one safetensors file, replaced at once.

It holds the parameters, the optimiser, the curve, the clock, the early stopping with its best parameters and torch's
random state; the order of the examples follows from the seed and the step. The settings and the examples that decide a
step are written with it, and a training with others is refused instead of being continued as something that is
neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashmem.errors import ConfigError
from flashmem.integrity import require_hash, tensors_hash
from flashmem.training_curves import TrainStep

STATE_FILE = "training.safetensors"


@dataclass
class EarlyStopping:
    """Remembers the best validation loss and the parameters that had it.

    Attributes:
        patience: measurements without a new best after which training stops; None never stops.
        best: lowest validation loss so far, nats a token.
        best_step: the step that had it; 0 before the first measurement.
        waited: measurements since then.
        parameters: copies of the parameters at that step, on the CPU; kept only with a patience.
    """

    patience: int | None = None
    best: float = float("inf")
    best_step: int = 0
    waited: int = 0
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def saw(self, loss: float, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Take note of a measurement after a step."""
        if loss < self.best:
            self.best, self.best_step, self.waited = loss, step, 0
            if self.patience is not None:
                self.parameters = {n: p.detach().to("cpu", copy=True) for n, p in parameters.items()}
        else:
            self.waited += 1

    @property
    def over(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def restore(self, parameters: Mapping[str, Tensor]) -> None:
        """Put the best parameters back, if there are any."""
        with torch.no_grad():
            for name, best in self.parameters.items():
                parameters[name].copy_(best)


@dataclass
class TrainState:
    """The parts of a training that change from step to step.

    Attributes:
        parameters: what is fitted, by name.
        optimiser: over these parameters.
        stopping: see there.
        curve: the steps so far.
        spent: seconds of training so far.
    """

    parameters: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    stopping: EarlyStopping
    curve: list[TrainStep] = field(default_factory=list)
    spent: float = 0.0

    def save(self, folder: Path, terms: Mapping[str, Any]) -> None:
        """Write the state.

        Args:
            folder: made if it is missing.
            terms: JSON values that a training which continues must agree with.
        """
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / (STATE_FILE + ".partial")
        # No sorting of keys: the sentence of a refusal names the first difference in the order of the settings.
        tensors, labels = self._tensors(), {"terms": json.dumps(terms)}
        save_file(tensors, partial, metadata={**labels, "sha256": tensors_hash(tensors, labels)})
        partial.replace(folder / STATE_FILE)

    def load(self, folder: Path, terms: Mapping[str, Any]) -> bool:
        """Take up the state of a folder; False where there is none.

        Raises:
            ConfigError: it belongs to other settings, other examples or another memory, or cannot be read.
            CheckpointError: a hash says that it is damaged.
        """
        file = folder / STATE_FILE
        if not file.exists():
            return False
        try:
            with safe_open(file, "pt") as opened:
                labels = opened.metadata() or {}
            theirs = json.loads(labels.get("terms", "{}"))
            tensors = load_file(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read: remove it to train from the start.") from error
        wanted = labels.pop("sha256", None)
        if wanted is not None:
            require_hash(file, wanted, tensors_hash(tensors, labels), "remove it to train from the start")
        _require_same(file, theirs, terms)
        if {name[2:] for name in tensors if name.startswith("p.")} != set(self.parameters):
            raise ConfigError(f"{file} belongs to another memory: remove it, or train into another folder.")
        self._take(tensors)
        return True

    def _tensors(self) -> dict[str, Tensor]:
        stopping = self.stopping
        tensors = {f"p.{n}": p for n, p in self.parameters.items()}
        tensors |= {f"b.{n}": p for n, p in stopping.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"o.{key}.{name}"] = torch.as_tensor(value)
        rows = [[float("nan") if v is None else float(v) for v in step.as_row()] for step in self.curve]
        tensors["curve"] = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1)
        clock = [self.spent, stopping.best, stopping.best_step, stopping.waited]
        tensors["clock"] = torch.tensor(clock, dtype=torch.float64)
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"p.{name}"])
                self._take_optimiser(name, parameter, tensors)
        self.curve = [TrainStep.from_row(row) for row in tensors["curve"].tolist()]
        self.spent, best, best_step, waited = tensors["clock"].tolist()
        self.stopping.best, self.stopping.best_step, self.stopping.waited = best, int(best_step), int(waited)
        self.stopping.parameters = {n[2:]: t for n, t in tensors.items() if n.startswith("b.")}
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(tensors["rng.cuda"])

    def _take_optimiser(self, name: str, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        found = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition(".")
            slot, _, owner = rest.partition(".")
            if kind == "o" and owner == name:
                found[slot] = tensor if slot == "step" else tensor.to(parameter.device)
        if found:
            self.optimiser.state[parameter] = found


def _require_same(file: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    ours = json.loads(json.dumps(ours))
    changed = [key for key in ours if theirs.get(key) != ours[key]]
    if changed:
        told = ", ".join(f"{key} {theirs.get(key)} there and {ours[key]} here" for key in changed[:3])
        raise ConfigError(
            f"{file} holds a training under other terms ({told}): give the same ones to continue it, remove the file "
            "to start again, or train into another folder."
        )
