"""Training a memory source while the backbone stays frozen (paper Eq. 6-7).

A training sequence is [x, M, y]: the prompt x is prefilled without gradient, the source writes M from its state, then
[M, y] runs on that cache with gradients through the frozen layers, and cross-entropy counts on y only. Nothing but the
source has parameters that learn; the backbone's gradients stay None.

`insertion="prompt-end"` puts M between prompt and answer, as the paper does. `"mixed"` puts it there in half of the
samples and otherwise inside the answer, either anywhere or where the attention entropy of the plain run is highest:
memories must be trained for the places where the trigger fires. What lies before M then joins the prefix.

Batches hold samples of similar length. The run is resumable: parameters, optimiser, step and order are written to
`state_dir` and the same call continues.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashmem.backbone import Backbone
from flashmem.errors import ConfigError
from flashmem.memory import MemorySource
from flashmem.training_loss import sequence_loss, target_entropies

__all__ = ["Example", "TrainConfig", "TrainReport", "TrainStep", "sequence_loss", "target_entropies", "train_memory"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's (Table 6).

    Attributes:
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        clip: limit of the gradient norm.
        batch_size: samples a step.
        epochs: passes over the examples; ignored when `max_steps` is set.
        max_steps: optimiser steps.
        max_minutes: stop after this much wall time; the schedule then follows time, so it still ends at zero.
        warmup: share of the run with a linear warm-up; cosine decay follows.
        insertion: where M goes.
        seed: order, insertion points.
    """

    lr: float = 1e-5
    weight_decay: float = 0.01
    clip: float = 0.53
    batch_size: int = 64
    epochs: float = 5.0
    max_steps: int | None = None
    max_minutes: float | None = None
    warmup: float = 0.1
    insertion: Literal["prompt-end", "mixed"] = "prompt-end"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.batch_size < 1 or self.epochs <= 0 or not 0 <= self.warmup < 1:
            raise ConfigError("Training needs lr > 0, batch_size >= 1, epochs > 0 and warmup from 0 to below 1.")
        if self.insertion not in ("prompt-end", "mixed"):
            raise ConfigError(f"insertion is {self.insertion!r}; use prompt-end or mixed.")


@dataclass(frozen=True)
class Example:
    """One sample: prompt and answer token ids, the answer with its EOS."""

    prompt_ids: list[int]
    target_ids: list[int]


@dataclass(frozen=True)
class TrainStep:
    """What a step reports: its number (from 1), the share of the run done, mean loss in nats a token, gradient norm."""

    step: int
    progress: float
    loss: float
    grad_norm: float
    lr: float


@dataclass
class TrainReport:
    """What a run leaves: the loss of every step, steps, seconds of this call and tokens trained on."""

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    target_tokens: int = 0


def train_memory(
    backbone: Backbone,
    memory: MemorySource,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    state_dir: str | Path | None = None,
    on_step: Callable[[TrainStep], None] | None = None,
) -> TrainReport:
    """Fit a memory source in place.

    Args:
        backbone: frozen; its parameters are neither changed nor given gradients.
        memory: the source; the parameters in `memory.trained()` are fitted.
        examples: the training set.
        config: how.
        state_dir: where to keep the resumable state; None keeps none.
        on_step: called after every step.

    Raises:
        ConfigError: no examples, or a source without parameters.
    """
    if not examples:
        raise ConfigError("Nothing to train on: the training split is empty.")
    if not memory.trained():
        raise ConfigError("This memory source has no parameters to train.")
    # Steps of 1e-5 vanish in bfloat16 weights: what learns is float32, the passes run in the backbone's dtype.
    memory.float()
    try:
        return _Trainer(backbone, memory, examples, config, state_dir, on_step).run()
    finally:
        memory.to(backbone.dtype)


class _Trainer:
    def __init__(
        self,
        backbone: Backbone,
        memory: MemorySource,
        examples: Sequence[Example],
        config: TrainConfig,
        state_dir: str | Path | None,
        on_step: Callable[[TrainStep], None] | None,
    ) -> None:
        self.backbone, self.memory, self.examples, self.config = backbone, memory, examples, config
        self.on_step = on_step
        self.state_path = Path(state_dir) if state_dir is not None else None
        self.parameters = memory.trained()
        self.optimiser = torch.optim.AdamW(
            list(self.parameters.values()), lr=config.lr, weight_decay=config.weight_decay
        )
        per_epoch = math.ceil(len(examples) / config.batch_size)
        self.total = config.max_steps or max(1, round(config.epochs * per_epoch))
        self.report = TrainReport()
        self.spent = 0.0

    def run(self) -> TrainReport:
        self._resume()
        started = saved = time.monotonic()
        before = self.spent
        self.memory.train()
        for step, batch in self._batches():
            if step < self.report.steps:
                continue
            self.spent = before + time.monotonic() - started
            progress = self._progress(step)
            if progress >= 1.0:
                break
            self._step(batch, step, progress)
            if self.state_path is not None and time.monotonic() - saved > 30:
                self._save()
                saved = time.monotonic()
        self.memory.eval()
        self.report.seconds = time.monotonic() - started
        self.spent = before + self.report.seconds
        if self.state_path is not None:
            self._save()
        return self.report

    def _progress(self, step: int) -> float:
        if self.config.max_minutes is not None:
            return self.spent / (60 * self.config.max_minutes)
        return step / self.total

    def _step(self, batch: list[Example], step: int, progress: float) -> None:
        rate = self.config.lr * _schedule(progress, self.config.warmup, step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        prefixes, targets = self._insert(batch, step)
        mixed = self.backbone.dtype != torch.float32
        with torch.autocast(self.backbone.device.type, self.backbone.dtype, enabled=mixed):
            loss, tokens = sequence_loss(self.backbone, self.memory, prefixes, targets)
        mean = loss / tokens
        self.optimiser.zero_grad(set_to_none=True)
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip)
        self.optimiser.step()
        self.report.losses.append(float(mean.detach()))
        self.report.steps, self.report.target_tokens = step + 1, self.report.target_tokens + tokens
        if self.on_step is not None:
            self.on_step(TrainStep(step + 1, progress, self.report.losses[-1], float(norm), rate))

    def _insert(self, batch: list[Example], step: int) -> tuple[list[list[int]], list[list[int]]]:
        """Split each sample into what lies before M and what lies after it."""
        prompts, targets = [e.prompt_ids for e in batch], [e.target_ids for e in batch]
        if self.config.insertion == "prompt-end":
            return prompts, targets
        chance = random.Random(f"{self.config.seed}|insert|{step}")
        where = [chance.choices(("end", "any", "peak"), (2, 1, 1))[0] for _ in batch]
        entropies = target_entropies(self.backbone, prompts, targets) if "peak" in where else [[] for _ in batch]
        cuts = [_cut(w, len(t), e, chance) for w, t, e in zip(where, targets, entropies, strict=True)]
        return (
            [p + t[:c] for p, t, c in zip(prompts, targets, cuts, strict=True)],
            [t[c:] for t, c in zip(targets, cuts, strict=True)],
        )

    def _batches(self) -> Iterator[tuple[int, list[Example]]]:
        """Batches of similar length in a shuffled order, epoch after epoch, the same for the same seed."""
        step, size = 0, self.config.batch_size
        epoch = 0
        while self.config.max_minutes is not None or step < self.total:
            order = random.Random(f"{self.config.seed}|{epoch}")
            indices = list(range(len(self.examples)))
            order.shuffle(indices)
            batches = []
            for start in range(0, len(indices), size * 16):
                window = sorted(indices[start : start + size * 16], key=self._length)
                batches += [window[i : i + size] for i in range(0, len(window), size)]
            order.shuffle(batches)
            for batch in batches:
                yield step, [self.examples[i] for i in batch]
                step += 1
            epoch += 1

    def _length(self, index: int) -> int:
        return len(self.examples[index].prompt_ids) + len(self.examples[index].target_ids)

    def _save(self) -> None:
        assert self.state_path is not None
        self.state_path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {f"p.{n}": p.detach().cpu().contiguous() for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"o.{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        tensors["losses"] = torch.tensor(self.report.losses, dtype=torch.float64)
        tensors["counts"] = torch.tensor([self.report.steps, self.report.target_tokens])
        tensors["spent"] = torch.tensor([self.spent], dtype=torch.float64)
        partial = self.state_path / "training.safetensors.partial"
        save_file(tensors, partial, metadata={"config": repr(sorted(asdict(self.config).items()))})
        partial.replace(self.state_path / "training.safetensors")

    def _resume(self) -> None:
        file = self.state_path / "training.safetensors" if self.state_path is not None else None
        if file is None or not file.exists():
            return
        tensors: dict[str, Any] = load_file(file)
        if {k[2:] for k in tensors if k.startswith("p.")} != set(self.parameters):
            raise ConfigError(f"{file} belongs to another memory: remove it, or train into another folder.")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"p.{name}"])
                keys = [k for k in tensors if k.startswith("o.") and k.split(".", 2)[2] == name]
                if keys:
                    self.optimiser.state[parameter] = {
                        k.split(".")[1]: tensors[k].to(parameter.device if k.split(".")[1] != "step" else "cpu")
                        for k in keys
                    }
        self.report.losses = tensors["losses"].tolist()
        self.report.steps, self.report.target_tokens = tensors["counts"].tolist()
        self.spent = float(tensors["spent"][0])


def _cut(where: str, length: int, entropies: list[float], chance: random.Random) -> int:
    """How many target tokens lie before M; at least one stays behind it."""
    if where == "end" or length < 2:
        return 0
    if where == "any" or not entropies:
        return chance.randrange(length)
    return max(range(length), key=entropies.__getitem__)


def _schedule(progress: float, warmup: float, step: int) -> float:
    """Linear warm-up, then cosine to zero; the first step of a run is never a step of size zero."""
    if progress < warmup:
        return max(progress / warmup, min(1.0, (step + 1) / 100))
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
