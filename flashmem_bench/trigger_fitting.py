"""Fitting MemGen's trained trigger on suites: the reward of an answer is its score.

The weaver of a memgen checkpoint is kept as it is, and a new checkpoint has both. What was measured of the weaver, one
memory at the prompt end, stays true of it and is kept; what the trigger's fitting saw is under `trigger`. It is not
continued where it stopped: at the released sizes a step is a few hundred answers, and nothing in between is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flashmem_bench.checkpoints import fetch, read_record
from flashmem_bench.errors import UsageError
from flashmem_bench.fitting import FitResult, Watcher
from flashmem_bench.registry import get_method
from flashmem_bench.session import Session, generation_arguments
from flashmem_bench.settings import Settings, resolve
from flashmem_bench.thresholds import spread

if TYPE_CHECKING:
    from flashmem.generation import Generation
    from flashmem.trigger import TriggerConfig
    from flashmem.trigger_training import Case, TriggerReport, TriggerTraining
    from flashmem_bench.tasks import Sample, Suite

_ENDS = 10


def fit_trigger(
    session: Session, weaver: str, config: TriggerTraining, out: Path, examples: int | None, watcher: Watcher
) -> FitResult:
    """Fit a trigger to a memgen memory and save both.

    Args:
        session: Of the command; its suites are trained on.
        weaver: Folder or hub id of the memgen checkpoint.
        config: How.
        out: Folder of the new checkpoint.
        examples: Training samples a suite at most.
        watcher: Told how far it is.

    Raises:
        UsageError: The checkpoint is no memgen memory.
        CheckpointError: It does not exist, or was made for another backbone.
        ConfigError: It has a trained trigger already.
    """
    from flashmem.memory import load_memory
    from flashmem.trigger_training import train_trigger, with_trigger
    from flashmem.weaver import WeaverMemory

    if (out / "config.json").exists():
        return FitResult(out, read_record(out)["metadata"], None)
    folder = fetch(weaver)
    record = read_record(folder)
    if record["memory"].get("source") != "weaver":
        raise UsageError(
            f"--trigger-of needs a memgen checkpoint; {weaver} is a {record['memory'].get('source')} memory"
        )
    session.permit_code()
    backbone, started = session.backbone, time.monotonic()
    loaded = load_memory(folder, backbone)
    assert isinstance(loaded, WeaverMemory)
    memory = with_trigger(loaded, backbone, config.seed)
    memory.cached = True
    suites = [session.suite(name) for name in session.request.suites]
    cases = [case for suite in suites for case in _cases(session, suite, examples)]
    watcher.stage(f"fitting the trigger on {len(cases)} samples", 1.0)
    report = train_trigger(
        backbone,
        memory,
        cases,
        config,
        trigger=_trigger(session),
        on_step=lambda seen: watcher.advance(
            _progress(seen, config, time.monotonic() - started), f"step {seen.steps}, reward {seen.rewards[-1]:.3f}"
        ),
    )
    facts = {
        **asdict(config),
        "of": record["weights_sha256"],
        "suites": [suite.name for suite in suites],
        "steps": report.steps,
        "seconds": round(time.monotonic() - started, 1),
        **_seen("reward", report.rewards),
        **_seen("written", report.written),
    }
    memory.save_pretrained(out, {"trigger": facts})
    return FitResult(out, memory.metadata | {"trigger": facts}, None)


def _cases(session: Session, suite: Suite, examples: int | None) -> Iterator[Case]:
    from transformers import GenerationConfig

    from flashmem.trigger_training import Case

    backbone = session.backbone
    arguments = generation_arguments(backbone, suite, Settings())
    config = GenerationConfig(**{**arguments, "do_sample": False})
    for sample in spread(suite.samples("train"), examples):
        prompt = backbone.encode_chat(sample.prompt)
        if len(prompt) + arguments["max_new_tokens"] <= backbone.max_positions:
            yield Case(prompt, config, _reward(suite, sample))


def _reward(suite: Suite, sample: Sample) -> Callable[[Generation], float]:
    def worth(answer: Generation) -> float:
        return float(suite.grade(sample, answer.text).score)

    return worth


def _trigger(session: Session) -> TriggerConfig:
    from flashmem.trigger import TriggerConfig

    spec = get_method("memgen")
    settings = resolve(session.method_settings, fixed=spec.fixed, defaults=spec.defaults, method=spec.name)
    return TriggerConfig(**settings.trigger.model_dump())


def _progress(report: TriggerReport, config: TriggerTraining, seconds: float) -> float:
    shares = [seconds / (config.minutes * 60)] if config.minutes else []
    return min(1.0, max([*shares, report.steps / config.steps if config.steps else 0.0]))


def _seen(name: str, values: list[float]) -> dict[str, float]:
    first, last = values[:_ENDS], values[-_ENDS:]
    return {f"{name}_first": sum(first) / max(1, len(first)), f"{name}_last": sum(last) / max(1, len(last))}
