"""Fitting MemGen's trained trigger: GRPO over the decisions to write a memory (Zhang et al., 2025; Shao et al., 2024).

A group is one prompt answered several times. Texts are greedy and the decisions are drawn from the trigger, so a group
differs in its decisions alone. An answer's advantage is its reward less the mean of its group, in units of the group's
standard deviation; the loss is the advantage times the log-probability of the answer's decisions, averaged over them.
As in the released configuration each group is used once and there is no penalty for leaving the start, so neither a
clip nor a reference model has anything to do. The weaver stays as it was trained.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import GenerationConfig

from flashmem.backbone import Backbone
from flashmem.errors import ConfigError
from flashmem.generation import Generation, generate
from flashmem.memory import new_memory
from flashmem.trigger import TriggerConfig
from flashmem.trigger_model import TriggerModel
from flashmem.weaver import WeaverMemory


@dataclass(frozen=True)
class Case:
    """One training sample: its prompt as token ids, how it is answered (greedily), and what an answer is worth."""

    prompt: list[int]
    generation_config: GenerationConfig
    reward: Callable[[Generation], float]


@dataclass(frozen=True)
class TriggerTraining:
    """How a trigger is fitted.

    Attributes:
        lr: learning rate, constant.
        group: answers a prompt.
        prompts: prompts a step.
        steps: optimiser steps at most; None is no limit.
        minutes: time at most; None is no limit.
        seed: of the order of prompts, of the decisions and of the new weights.
    """

    lr: float = 1e-5
    group: int = 8
    prompts: int = 4
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group < 2 or self.prompts < 1:
            raise ConfigError("A group needs 2 answers or more, and a step 1 prompt or more.")
        if self.steps is None and self.minutes is None:
            raise ConfigError("Say when to stop: steps, minutes or both.")


@dataclass
class TriggerReport:
    """What fitting a trigger saw.

    Attributes:
        rewards: mean reward of each step's answers.
        written: share of the decisions of each step that wrote a memory.
    """

    rewards: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return len(self.rewards)


def with_trigger(memory: WeaverMemory, backbone: Backbone, seed: int = 0) -> WeaverMemory:
    """A weaver with the same weights and a trigger that is not trained yet.

    Raises:
        ConfigError: it has a trained trigger already.
    """
    if memory.config.trained_trigger:
        raise ConfigError("This weaver has a trained trigger already: start from one without.")
    torch.manual_seed(seed)
    grown = new_memory(replace(memory.config, trained_trigger=True), backbone)
    assert isinstance(grown, WeaverMemory)
    mine = grown.trained()
    with torch.no_grad():
        for name, parameter in memory.trained().items():
            mine[name].copy_(parameter)
    grown.metadata = dict(memory.metadata)
    return grown


def train_trigger(
    backbone: Backbone,
    memory: WeaverMemory,
    cases: Sequence[Case],
    config: TriggerTraining,
    *,
    trigger: TriggerConfig,
    on_step: Callable[[TriggerReport], None] | None = None,
) -> TriggerReport:
    """Fit the trigger of a weaver in place.

    Args:
        backbone: frozen.
        memory: a weaver with a trigger (`with_trigger`); only that is changed.
        cases: the training samples.
        config: how.
        trigger: of kind delimiter, with the cap of the method.
        on_step: told of each step.

    Raises:
        ConfigError: a weaver without a trigger, or nothing to train on.
    """
    model = memory.trigger_model
    if model is None or not cases:
        raise ConfigError("Training a trigger needs a weaver that has one, and samples.")
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    model.stream = torch.Generator().manual_seed(config.seed)
    order, report, started = _shuffled(len(cases), config.seed), TriggerReport(), time.monotonic()
    try:
        while not _over(config, report, started):
            optimiser.zero_grad()
            _one_step(backbone, memory, [cases[next(order)] for _ in range(config.prompts)], config, trigger, report)
            optimiser.step()
            if on_step is not None:
                on_step(report)
    finally:
        model.stream = None
    return report


def _one_step(
    backbone: Backbone,
    memory: WeaverMemory,
    cases: Sequence[Case],
    config: TriggerTraining,
    trigger: TriggerConfig,
    report: TriggerReport,
) -> None:
    """Answer each case as a group, leave the gradients at the trigger and note what was seen."""
    assert memory.trigger_model is not None
    rewards: list[float] = []
    decisions: list[bool] = []
    for case in cases:
        prompts = [case.prompt] * config.group
        answers = generate(backbone, prompts, generation_config=case.generation_config, memory=memory, trigger=trigger)
        found = torch.tensor([case.reward(answer) for answer in answers])
        (group_loss(memory.trigger_model, case.prompt, answers, found) / len(cases)).backward()
        rewards += found.tolist()
        decisions += [wanted for answer in answers for _, wanted in answer.verdicts]
    report.rewards.append(sum(rewards) / len(rewards))
    report.written.append(sum(decisions) / max(1, len(decisions)))


def group_loss(model: TriggerModel, prompt: list[int], answers: Sequence[Generation], rewards: Tensor) -> Tensor:
    """Policy-gradient loss of one group.

    Args:
        model: the trigger, whose log-probabilities carry the gradient.
        prompt: token ids, T of them.
        answers: of this prompt, with their verdicts.
        rewards: `[G]`.
    """
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    loss = sum(p.sum() * 0.0 for p in model.parameters())
    for advantage, answer in zip(advantages.tolist(), answers, strict=True):
        if advantage == 0.0 or not answer.verdicts:
            continue
        device = model.head.weight.device
        said = model(torch.tensor([prompt + answer.token_ids], device=device))[0]
        # A decision before token n was taken behind the token at place T + n - 1.
        taken = [said[len(prompt) + at - 1, int(wanted)] for at, wanted in answer.verdicts]
        loss = loss - advantage * torch.stack(taken).mean()
    return loss / len(answers)


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """All indices again and again, each time in another order."""
    stream = random.Random(seed)
    while True:
        yield from stream.sample(range(count), count)


def _over(config: TriggerTraining, report: TriggerReport, started: float) -> bool:
    if config.steps is not None and report.steps >= config.steps:
        return True
    return config.minutes is not None and time.monotonic() - started >= config.minutes * 60
