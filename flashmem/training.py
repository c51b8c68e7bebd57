"""Training a memory source while the backbone stays frozen (paper Eq. 6-7).

A training sequence is [x, M, y]: the prompt x is prefilled without gradient, the source writes M from its state, then
[M, y] runs on that cache with gradients through the frozen layers, and cross-entropy counts on y only. Nothing but the
source has parameters that learn; the backbone's gradients stay None.

`insertion="prompt-end"` puts M between prompt and answer, as the paper does. `"mixed"` puts it there in half of the
samples and otherwise inside the answer, either anywhere or where the attention entropy of the plain run is highest:
memories must be trained for the places where the trigger fires. What lies before M then joins the prefix.

The loss of a step is the mean over all its target tokens, wherever they are computed: a batch in one piece, in micro
batches one after the other, or spread over processes gives the same step. The run is resumable: everything that it
needs is written to `state_dir` and the same call continues. With a patience it stops when the loss on held-out
examples no longer falls, and ends with the parameters that had the lowest.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flashmem.backbone import Backbone
from flashmem.errors import ConfigError
from flashmem.lora import LoRA
from flashmem.memory import MemorySource
from flashmem.placement import Processes
from flashmem.prefixes import PrefixStore
from flashmem.training_curves import TrainStep, write_curves
from flashmem.training_data import BATCHINGS, INSERTIONS, Example, Lessons, Placed, cut, examples_hash, place
from flashmem.training_loss import adapted_loss, chained_loss, sequence_loss, target_entropies
from flashmem.training_state import EarlyStopping, TrainState

__all__ = ["Example", "TrainConfig", "TrainReport", "TrainStep", "sequence_loss", "target_entropies", "train_memory"]

# What has no part in the mathematics of a step, so that a run may continue with another value of it.
_FREE = ("micro_batch_size", "activation_checkpointing", "prefix_gib")
_SAVE_EVERY_S = 30.0
# Writing the state of a large memory takes seconds: never more than this share of the time.
_SAVE_SHARE = 0.05


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's (Table 6).

    Attributes:
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        clip: limit of the gradient norm.
        batch_size: samples a step, over all processes.
        epochs: passes over the examples; ignored when `max_steps` is set.
        max_steps: optimiser steps.
        max_minutes: stop after this much wall time; the schedule then follows time, so it still ends at zero.
        warmup: share of the run with a linear warm-up; cosine decay follows.
        insertion: where M goes.
        seed: order, insertion points.
        micro_batch_size: samples that a process computes at once; None is all of its share of a step.
        activation_checkpointing: run layers again in the backward pass instead of keeping what they computed.
        validate_every: steps between two measurements on the validation examples; None measures never.
        lessons: shares of the run at which the examples of lesson 1, 2, ... take over from those before; with none, all
            examples are used from the first step.
        keep: weight of KL(plain || with memory) on the target tokens that the plain backbone gets right; 0 is the
            paper's loss.
        horizon: target tokens after M that count, since in a long answer a memory before one token drowns among those
            that it cannot help; None is all of them, the paper's loss.
        batching: who shares a step: "random", or "length" for examples of similar length (see `training_data.batches`).
        prefix_gib: encoded prefixes are kept for later epochs, up to so many GiB; 0 encodes them again at every step.
        patience: measurements without a new lowest loss after which training stops; None never stops early.
    """

    lr: float = 1e-5
    weight_decay: float = 0.01
    clip: float = 0.53
    batch_size: int = 64
    epochs: float = 5.0
    max_steps: int | None = None
    max_minutes: float | None = None
    warmup: float = 0.1
    insertion: Literal["prompt-end", "mixed", "firing", "delimiters"] = "prompt-end"
    seed: int = 0
    micro_batch_size: int | None = None
    activation_checkpointing: bool = False
    validate_every: int | None = None
    patience: int | None = None
    keep: float = 0.0
    lessons: tuple[float, ...] = ()
    horizon: int | None = None
    prefix_gib: float = 0.0
    batching: Literal["random", "length"] = "random"

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.batch_size < 1 or self.epochs <= 0 or not 0 <= self.warmup < 1:
            raise ConfigError("Training needs lr > 0, batch_size >= 1, epochs > 0 and warmup from 0 to below 1.")
        for name in ("keep", "prefix_gib"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.insertion not in INSERTIONS:
            raise ConfigError(f"insertion is {self.insertion!r}; use one of {', '.join(INSERTIONS)}.")
        if self.batching not in BATCHINGS:
            raise ConfigError(f"batching is {self.batching!r}; use one of {', '.join(BATCHINGS)}.")
        for name in ("micro_batch_size", "validate_every", "patience", "horizon"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more, or None.")
        if list(self.lessons) != sorted(set(self.lessons)) or any(not 0 < start < 1 for start in self.lessons):
            raise ConfigError(f"lessons are {self.lessons}; they must rise and lie between 0 and 1.")
        if self.insertion == "delimiters" and (self.keep or self.horizon or self.activation_checkpointing):
            raise ConfigError("keep, horizon and activation_checkpointing need one memory an answer, not delimiters.")
        if self.patience is not None and self.validate_every is None:
            raise ConfigError("Early stopping (patience) needs validate_every: steps between two measurements.")


@dataclass
class TrainReport:
    """What a run leaves.

    Attributes:
        losses: the loss of every step, nats a token.
        steps: optimiser steps, those before an interruption included.
        seconds: of this call.
        target_tokens: tokens trained on.
        curve: every step.
        best_step: the step whose parameters the memory has; None where it has those of the last one.
        best_validation_loss: lowest validation loss, nats a token; None where it was not measured.
        stopped_early: whether patience ended the run.
    """

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    target_tokens: int = 0
    curve: list[TrainStep] = field(default_factory=list)
    best_step: int | None = None
    best_validation_loss: float | None = None
    stopped_early: bool = False


def train_memory(
    backbone: Backbone,
    memory: MemorySource,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    state_dir: str | Path | None = None,
    on_step: Callable[[TrainStep], None] | None = None,
    validation: Sequence[Example] = (),
    curves: str | Path | None = None,
    processes: Processes | None = None,
) -> TrainReport:
    """Fit a memory source in place.

    Args:
        backbone: frozen; its parameters are neither changed nor given gradients.
        memory: the source; the parameters in `memory.trained()` are fitted.
        examples: the training set.
        config: how.
        state_dir: where to keep the resumable state; None keeps none.
        on_step: called after every step.
        validation: held-out examples for `config.validate_every`.
        curves: csv file to keep one row a step in (see `flashmem.training_curves`); None keeps none.
        processes: the processes that share each step (see `flashmem.placement.processes`); None is this one alone.

    Raises:
        ConfigError: no examples, no validation examples where they are needed, a source without parameters, or a state
            that belongs to another training.
    """
    if not examples:
        raise ConfigError("Nothing to train on: the training split is empty.")
    if config.validate_every is not None and not validation:
        raise ConfigError(
            "Early stopping measures on held-out examples, and there are none: give some, or leave it out."
        )
    if not memory.trained():
        raise ConfigError("This memory source has no parameters to train.")
    # Steps of 1e-5 vanish in bfloat16 weights: what learns is float32, the passes run in the backbone's dtype.
    memory.float()
    try:
        trainer = _Trainer(backbone, memory, examples, config, processes or Processes())
        trainer.validation, trainer.on_step = validation, on_step
        trainer.state_dir = Path(state_dir) if state_dir is not None else None
        trainer.curves = Path(curves) if curves is not None else None
        return trainer.run()
    finally:
        memory.to(backbone.dtype)


class _Trainer:
    validation: Sequence[Example] = ()
    on_step: Callable[[TrainStep], None] | None = None
    state_dir: Path | None = None
    curves: Path | None = None

    def __init__(
        self,
        backbone: Backbone,
        memory: MemorySource,
        examples: Sequence[Example],
        config: TrainConfig,
        processes: Processes,
    ) -> None:
        self.backbone, self.memory, self.examples, self.config = backbone, memory, examples, config
        if isinstance(memory, LoRA) and config != replace(config, insertion="prompt-end", horizon=None, keep=0.0):
            raise ConfigError("LoRA has no memories: leave insertion, horizon and keep out.")
        self.processes = processes
        parameters = memory.trained()
        optimiser = torch.optim.AdamW(list(parameters.values()), lr=config.lr, weight_decay=config.weight_decay)
        self.state = TrainState(parameters, optimiser, EarlyStopping(config.patience))
        per_epoch = math.ceil(len(examples) / config.batch_size)
        self.total = config.max_steps or max(1, round(config.epochs * per_epoch))
        prompts, room = (example.prompt_ids for example in examples), int(config.prefix_gib * 2**30)
        self.prefill = PrefixStore(backbone, prompts, room).prefill if room else None
        self._started = time.monotonic()
        self._before = 0.0

    def run(self) -> TrainReport:
        self.processes.share(self.state.parameters.values())
        if self.state_dir is not None:
            self.state.load(self.state_dir, self._terms())
        self._started, self._before = time.monotonic(), self.state.spent
        next_save = _SAVE_EVERY_S
        self.memory.train()
        for step, batch in self._steps():
            self._step(batch, step)
            if self._since_start() > next_save:
                next_save = self._since_start() + self._save()
        self._conclude()
        self.memory.eval()
        return self._report()

    def _steps(self) -> Iterator[tuple[int, list[Example]]]:
        """The steps that are left, until the run is done."""
        config, seen = self.config, [taken.progress for taken in self.state.curve]
        lessons = Lessons(self.examples, config.lessons, config.batch_size, config.seed, seen, config.batching)
        for step in itertools.count(len(seen)):
            self._tick()
            progress = self._progress(step)
            if progress >= 1.0 or self.state.stopping.over:
                return
            yield step, lessons.next(progress)

    def _since_start(self) -> float:
        return time.monotonic() - self._started

    def _tick(self) -> None:
        self.state.spent = self._before + self._since_start()
        if self.config.max_minutes is not None:
            self.state.spent = self.processes.agree(self.state.spent)

    def _progress(self, step: int) -> float:
        if self.config.max_minutes is not None:
            return self.state.spent / (60 * self.config.max_minutes)
        return step / self.total

    def _step(self, batch: list[Example], step: int) -> None:
        progress = self._progress(step)
        rate = self.config.lr * _schedule(progress, self.config.warmup, step)
        for group in self.state.optimiser.param_groups:
            group["lr"] = rate
        self.state.optimiser.zero_grad(set_to_none=True)
        loss, tokens = self._backward(place(batch, self.config.insertion, f"{self.config.seed}|insert|{step}"))
        norm = torch.nn.utils.clip_grad_norm_(list(self.state.parameters.values()), self.config.clip)
        self.state.optimiser.step()
        before = self.state.curve[-1].target_tokens if self.state.curve else 0
        self.state.curve.append(TrainStep(step + 1, progress, loss, float(norm), rate, None, before + tokens))
        if self.config.validate_every is not None and (step + 1) % self.config.validate_every == 0:
            self._validate()
        self.state.curve[-1] = replace(self.state.curve[-1], seconds=self._before + self._since_start())
        if self.on_step is not None:
            self.on_step(self.state.curve[-1])

    def _backward(self, rows: Sequence[Placed]) -> tuple[float, int]:
        """Leave the gradient of a whole step in the parameters; returns its mean loss and its target tokens."""
        insertion, horizon = self.config.insertion, self.config.horizon
        parts = [cut(self.backbone, part, insertion, horizon) for part in self._parts(rows, len(rows))]
        mine = sum(len(piece) for _, answers in parts for pieces in answers for piece in pieces)
        tokens = round(float(self.processes.sum(torch.tensor([float(mine)]))[0]))
        total = torch.zeros(1, device=self.backbone.device)
        for prefixes, answers in parts:
            loss = self._loss(prefixes, answers)[0] / tokens
            loss.backward()
            total += loss.detach()
        return self._sum_gradients(total), tokens

    def _parts(self, rows: Sequence[Placed], most: int) -> list[list[Placed]]:
        """This process's micro batches. Neighbours are of similar length, so every n-th row makes equal shares."""
        share = self.processes.mine(rows)
        size = self.config.micro_batch_size or most
        return [share[start : start + size] for start in range(0, len(share), size)]

    def _loss(self, prefixes: list[list[int]], answers: list[list[list[int]]]) -> tuple[Tensor, int]:
        mixed = self.backbone.dtype != torch.float32
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        with torch.autocast(self.backbone.device.type, self.backbone.dtype, enabled=mixed):
            if isinstance(self.memory, LoRA):
                return adapted_loss(self.backbone, self.memory, prefixes, [pieces[0] for pieces in answers])
            if any(len(pieces) > 1 for pieces in answers):
                return chained_loss(self.backbone, self.memory, prefixes, answers, self.prefill)
            targets = [pieces[0] for pieces in answers]
            return sequence_loss(
                self.backbone,
                self.memory,
                prefixes,
                targets,
                recompute=recompute,
                keep=self.config.keep,
                prefill=self.prefill,
            )

    def _sum_gradients(self, loss: Tensor) -> float:
        """Add up gradients and loss over the processes, in one message; returns the loss."""
        if self.processes.world == 1:
            return float(loss)
        parameters = list(self.state.parameters.values())
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = self.processes.sum(torch.cat([loss, *(part.flatten() for part in parts)]))
        sizes = [p.numel() for p in parameters]
        for parameter, part in zip(parameters, flat[1:].split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        return float(flat[0])

    def _validate(self) -> None:
        """Measure the validation loss, note it in the curve and in the early stopping."""
        self.memory.eval()
        rows = place(self.validation, self.config.insertion, f"{self.config.seed}|validation")
        counted = torch.zeros(2, dtype=torch.float32)
        with torch.no_grad():
            for part in self._parts(rows, self.config.batch_size):
                loss, tokens = self._loss(*cut(self.backbone, part, self.config.insertion, self.config.horizon))
                counted += torch.tensor([float(loss), float(tokens)])
        self.memory.train()
        loss, tokens = self.processes.sum(counted).tolist()
        last = self.state.curve[-1]
        self.state.curve[-1] = replace(last, validation_loss=loss / tokens)
        self.state.stopping.saw(loss / tokens, last.step, self.state.parameters)

    def _conclude(self) -> None:
        """Measure the last step too, write everything, and take the best parameters."""
        last = self.state.curve[-1] if self.state.curve else None
        if self.config.validate_every is not None and last is not None and last.validation_loss is None:
            self._validate()
        self.state.spent = self._before + self._since_start()
        self._save()
        self.state.stopping.restore(self.state.parameters)

    def _save(self) -> float:
        """Write state and curve; returns the seconds until the next time."""
        started = time.monotonic()
        if self.processes.main:
            self.state.spent = self._before + self._since_start()
            if self.state_dir is not None:
                self.state.save(self.state_dir, self._terms())
            if self.curves is not None:
                write_curves(self.curves, self.state.curve)
        return max(_SAVE_EVERY_S, (time.monotonic() - started) / _SAVE_SHARE)

    def _terms(self) -> dict[str, Any]:
        """What a state must agree with to be this training's."""
        terms = {name: value for name, value in asdict(self.config).items() if name not in _FREE}
        terms["examples"] = examples_hash(self.examples)
        terms["validation_examples"] = examples_hash(self.validation)
        return {**terms, "memory": asdict(self.memory.config), "backbone": self.backbone.fingerprint}

    def _report(self) -> TrainReport:
        curve, stopping = self.state.curve, self.state.stopping
        return TrainReport(
            losses=[step.loss for step in curve],
            steps=len(curve),
            seconds=self._since_start(),
            target_tokens=curve[-1].target_tokens if curve else 0,
            curve=curve,
            best_step=stopping.best_step if stopping.parameters else None,
            best_validation_loss=stopping.best if stopping.best_step else None,
            stopped_early=stopping.over,
        )


def _schedule(progress: float, warmup: float, step: int) -> float:
    """Linear warm-up, then cosine to zero; the first step of a run is never a step of size zero."""
    if progress < warmup:
        return max(progress / warmup, min(1.0, (step + 1) / 100))
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
