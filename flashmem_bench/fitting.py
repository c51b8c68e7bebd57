"""Fitting a memory on suites: examples, training, and the measurement that decides whether it may become a default.

The backbone stays frozen. Examples come from the training split of each suite, either its own targets (`gold`) or
correct answers of the backbone itself, found by sampling and graded by the suite (`self`), so that what the memory
adds can be told from what a teacher adds. Several suites make one joint memory.

After training, the plain backbone and one memory at the prompt end answer the validation split. `harm` is the mean
loss of score over the samples where the memory lowers it (for scores of 0 and 1: the share of samples that the
backbone solved and the memory breaks), `gain` the mean rise where it raises it. Both go into the checkpoint, per
suite and over all.

Everything continues where it stopped: sampled answers, training steps, and a finished checkpoint is not trained
again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem_bench.checkpoints import JOINT, checkpoint_folder, read_record
from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.methods.base import BuildContext
from flashmem_bench.models import training_threads
from flashmem_bench.registry import get_method
from flashmem_bench.session import Request, Session, generation_arguments
from flashmem_bench.settings import Settings, resolve
from flashmem_bench.thresholds import spread

if TYPE_CHECKING:
    from flashmem.memory import MemorySource
    from flashmem.training import Example, TrainConfig, TrainReport
    from flashmem_bench.tasks import Sample, Suite

TARGETS = ("gold", "self")
TRAINABLE = ("flashmem", "flashmem-separate-encoder")
_SELF_DRAWS = 4
_SELF_TEMPERATURE = 0.8
_VALIDATION_BATCH = 8


@dataclass(frozen=True)
class FitRequest:
    """What to fit.

    Attributes:
        method: flashmem or flashmem-separate-encoder.
        targets: gold or self.
        train: The library's training configuration.
        examples: Training samples a suite at most.
        validation: Validation samples a suite at most.
        out: Folder of the checkpoint; None = the place where `run` looks first.
        provisional: It may be used by default although it does harm.
    """

    method: str
    targets: str
    train: TrainConfig
    examples: int | None = None
    validation: int = 200
    out: Path | None = None
    provisional: bool = False

    def __post_init__(self) -> None:
        if self.method not in TRAINABLE:
            raise UsageError(f"train fits {' or '.join(TRAINABLE)}; the memory of {self.method} is one of these")
        if self.targets not in TARGETS:
            raise UsageError(f"--targets must be gold or self, not {self.targets!r}")


@dataclass
class FitResult:
    """A fitted memory: where it is, what was measured, and what training reported (None if it was there already)."""

    path: Path
    metadata: dict[str, Any]
    report: TrainReport | None


class Watcher:
    """Told what fitting does; this one is silent."""

    def stage(self, text: str, total: float | None = None) -> None:
        """A stage begins; `total` is its size where it is known."""

    def advance(self, done: float, text: str = "") -> None:
        """`done` of the stage's size is done."""


def fit(session: Session, wanted: FitRequest, watcher: Watcher | None = None) -> FitResult:
    """Fit a memory and measure it.

    Raises:
        BenchError: Nothing to train on.
    """
    from flashmem.training import train_memory

    watcher = watcher or Watcher()
    folder = wanted.out or _default_folder(session.request, wanted)
    if (folder / "config.json").exists() and "harm" in read_record(folder).get("metadata", {}):
        return FitResult(folder, read_record(folder)["metadata"], None)
    suites = [session.suite(name) for name in session.request.suites]
    memory = _new_memory(session, wanted)
    state = folder / "training"
    examples = [example for suite in suites for example in _examples(session, suite, wanted, state, watcher)]
    if not examples:
        raise BenchError(f"no example to train on: {_why_none(wanted)}")
    watcher.stage(f"training on {len(examples)} examples", 1.0)
    started = time.monotonic()
    with training_threads():
        report = train_memory(
            session.backbone,
            memory,
            examples,
            wanted.train,
            state_dir=state,
            on_step=lambda step: watcher.advance(step.progress, f"step {step.step}, loss {step.loss:.4f}"),
        )
    metadata = _metadata(session, wanted, report, len(examples), time.monotonic() - started)
    # Without harm and gain this is not yet finished, but it is not lost either.
    memory.save_pretrained(folder, metadata)
    metadata.update(measure(session, suites, memory, wanted, watcher))
    memory.save_pretrained(folder, metadata)
    shutil.rmtree(state, ignore_errors=True)
    return FitResult(folder, metadata, report)


def _default_folder(request: Request, wanted: FitRequest) -> Path:
    suite = request.suites[0] if len(request.suites) == 1 else JOINT
    return checkpoint_folder(request.results_dir, request.model, suite, wanted.method, wanted.train.seed)


def _why_none(wanted: FitRequest) -> str:
    if wanted.targets == "self":
        return "the backbone answered none of the training samples right; use --targets gold"
    return "every training sample is longer than the backbone's positions"


def memory_settings(session: Session, method: str) -> Settings:
    """Return the settings under which a new memory of a method is made."""
    return resolve(session.method_settings, fixed=get_method(method).fixed, method=method)


def _new_memory(session: Session, wanted: FitRequest) -> MemorySource:
    import torch

    from flashmem.memory import new_memory
    from flashmem.monitor import MonitorConfig
    from flashmem_bench.methods.latent import memory_config

    settings = memory_settings(session, wanted.method)
    session.backbone.monitor = MonitorConfig(**settings.monitor.model_dump())
    torch.manual_seed(wanted.train.seed)
    return new_memory(memory_config(settings), session.backbone)


def _examples(session: Session, suite: Suite, wanted: FitRequest, state: Path, watcher: Watcher) -> Iterator[Example]:
    """Yield the examples of a suite that fit into the backbone."""
    from flashmem.training import Example

    backbone = session.backbone
    room = backbone.max_positions - memory_settings(session, wanted.method).memory.length
    samples = spread(suite.samples("train"), wanted.examples)
    texts = ((s, s.target) for s in samples)
    if wanted.targets == "self":
        texts = own_answers(session, suite, samples, state / f"self-{suite.name}.jsonl", watcher)
    end = [] if backbone.tokenizer.eos_token_id is None else [backbone.tokenizer.eos_token_id]
    for sample, target in texts:
        example = Example(backbone.encode_chat(sample.prompt), backbone.encode(target) + end)
        if len(example.prompt_ids) + len(example.target_ids) <= room:
            yield example


def own_answers(
    session: Session, suite: Suite, samples: Sequence[Sample], cache: Path, watcher: Watcher
) -> Iterator[tuple[Sample, str]]:
    """Yield the backbone's own right answers: the greedy one if it is right, else the first right draw.

    Args:
        session: The loaded parts.
        suite: Grades the answers.
        samples: Training samples.
        cache: JSON lines of finished samples, so that sampling continues where it stopped.
        watcher: Told how far it is.
    """
    known = {}
    if cache.exists():
        lines = cache.read_text(encoding="utf-8").split("\n")[:-1]
        known = {entry["sample_id"]: entry["text"] for entry in map(json.loads, lines)}
    cache.parent.mkdir(parents=True, exist_ok=True)
    watcher.stage(f"sampling answers of the backbone on {suite.name}", len(samples))
    with cache.open("a", encoding="utf-8") as file:
        for index, sample in enumerate(samples):
            if sample.sample_id not in known:
                known[sample.sample_id] = _right_answer(session, suite, sample)
                file.write(json.dumps({"sample_id": sample.sample_id, "text": known[sample.sample_id]}) + "\n")
                file.flush()
            text = known[sample.sample_id]
            if text is not None:
                yield sample, text
            watcher.advance(index + 1)


def _right_answer(session: Session, suite: Suite, sample: Sample) -> str | None:
    from transformers import GenerationConfig

    from flashmem.generation import generate

    backbone = session.backbone
    arguments = generation_arguments(backbone, suite, Settings())
    prompt = backbone.encode_chat(sample.prompt)
    for draw in range(1 + _SELF_DRAWS):
        sampling = {"do_sample": True, "temperature": _SELF_TEMPERATURE} if draw else {"do_sample": False}
        config = GenerationConfig(**{**arguments, **sampling})
        (answer,) = generate(backbone, [prompt], generation_config=config, seed=draw)
        if answer.finish_reason != "length" and suite.grade(sample, answer.text).score >= 1.0:
            return answer.text
    return None


def measure(
    session: Session, suites: Sequence[Suite], memory: MemorySource, wanted: FitRequest, watcher: Watcher
) -> dict[str, Any]:
    """Return harm and gain of one memory at the prompt end on the validation split, per suite and over all."""
    harm, gain, plain, with_memory, total = {}, {}, {}, {}, {}
    for suite in suites:
        samples = spread(suite.samples("validation"), wanted.validation)
        watcher.stage(f"validation on {suite.name}", 2 * len(samples))
        before = _scores(session, suite, samples, None, lambda done: watcher.advance(done))
        after = _scores(session, suite, samples, memory, lambda done, n=len(samples): watcher.advance(n + done))
        harm[suite.name] = _mean([max(0.0, b - a) for b, a in zip(before, after, strict=True)])
        gain[suite.name] = _mean([max(0.0, a - b) for b, a in zip(before, after, strict=True)])
        plain[suite.name], with_memory[suite.name] = _mean(before), _mean(after)
        total[suite.name] = len(samples)
    weight = sum(total.values())
    return {
        "harm": sum(harm[name] * total[name] for name in harm) / weight,
        "gain": sum(gain[name] * total[name] for name in gain) / weight,
        "harm_by_suite": harm,
        "gain_by_suite": gain,
        "vanilla_score_by_suite": plain,
        "memory_score_by_suite": with_memory,
        "validation_samples": total,
    }


def _scores(
    session: Session,
    suite: Suite,
    samples: Sequence[Sample],
    memory: MemorySource | None,
    on_done: Callable[[int], None],
) -> list[float]:
    from flashmem_bench.methods.latent import LatentMethod, trigger_config

    settings = resolve({}, suite=suite.memory_defaults)
    context = BuildContext(session.backbone, suite, settings, generation_arguments(session.backbone, suite, settings))
    trigger = trigger_config(context, kind="prompt-end")
    method = LatentMethod(context, memory, lambda sample: trigger)
    scores: list[float] = []
    for start in range(0, len(samples), _VALIDATION_BATCH):
        batch = samples[start : start + _VALIDATION_BATCH]
        prompts = [session.backbone.encode_chat(sample.prompt) for sample in batch]
        answers = method.generate(prompts, batch, None, 0)
        scores += [suite.grade(s, a.text).score for s, a in zip(batch, answers, strict=True)]
        on_done(len(scores))
    return scores


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0


def _metadata(
    session: Session, wanted: FitRequest, report: TrainReport, examples: int, seconds: float
) -> dict[str, Any]:
    train = wanted.train
    return {
        "method": wanted.method,
        "suites": [session.suite(name).name for name in session.request.suites],
        "suite_hashes": {name: session.suite(name).content_hash for name in session.request.suites},
        "train_seed": train.seed,
        "targets": wanted.targets,
        "provisional": wanted.provisional,
        "insertion": train.insertion,
        "examples": examples,
        "steps": report.steps,
        "batch_size": train.batch_size,
        "lr": train.lr,
        "seconds": round(seconds, 1),
        "target_tokens": report.target_tokens,
        "first_loss": _mean(report.losses[:10]),
        "final_loss": _mean(report.losses[-10:]),
        "device": session.backbone.device.type,
    }
