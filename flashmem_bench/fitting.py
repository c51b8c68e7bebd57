"""Fitting a memory on suites: examples, training, and the measurement that decides whether it may become a default.

The backbone stays frozen. Examples come from the training split of each suite, either its own targets (`gold`) or
correct answers of the backbone itself, found by sampling and graded by the suite (`self`), so that what the memory
adds can be told from what a teacher adds. Several suites make one joint memory.

After training, the plain backbone and one memory at the prompt end answer the validation split. `harm` is the mean
loss of score over the samples where the memory lowers it (for scores of 0 and 1: the share of samples that the
backbone solved and the memory breaks), `gain` the mean rise where it raises it. Both go into the checkpoint, per
suite and over all.

Everything continues where it stopped: sampled answers, training steps, and a finished checkpoint is not trained
again. Under `accelerate launch` the processes share the sampling, each training step and the measurement; the first
one writes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem_bench.checkpoints import JOINT, SOURCES, checkpoint_folder, read_record
from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.methods.base import BuildContext
from flashmem_bench.models import model_key, training_threads
from flashmem_bench.places import folder_name, require_own
from flashmem_bench.registry import get_method
from flashmem_bench.session import Request, Session, generation_arguments
from flashmem_bench.settings import Settings, resolve
from flashmem_bench.thresholds import spread

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem.memory import MemorySource
    from flashmem.placement import Processes
    from flashmem.training import Example, TrainConfig, TrainReport
    from flashmem_bench.tasks import Sample, Suite

TARGETS = ("gold", "self")
TRAINABLE = tuple(SOURCES)
_SELF_DRAWS = 4
_SELF_TEMPERATURE = 0.8
_SELF_BATCH = 16
_VALIDATION_BATCH = 8


@dataclass(frozen=True)
class FitRequest:
    """What to fit.

    Attributes:
        method: one of `TRAINABLE`.
        targets: gold or self.
        train: The library's training configuration.
        examples: Training samples a suite at most.
        validation: Validation samples a suite at most.
        out: Folder of the checkpoint; None = the place where `run` looks first.
        provisional: It may be used by default although it does harm.
        held_out: Examples of the validation splits on which early stopping measures, over all suites.
    """

    method: str
    targets: str
    train: TrainConfig
    examples: int | None = None
    validation: int = 200
    out: Path | None = None
    provisional: bool = False
    held_out: int = 256

    def __post_init__(self) -> None:
        if self.method not in TRAINABLE:
            raise UsageError(f"train fits {', '.join(TRAINABLE)}; the memory of {self.method} is one of these")
        if self.targets not in TARGETS:
            raise UsageError(f"--targets must be gold or self, not {self.targets!r}")
        places = (self.train.insertion != "prompt-end", self.train.horizon is not None, self.train.keep > 0)
        if self.method == "lora-sft" and any(places):
            raise UsageError("lora-sft has no memories: leave insertion, horizon and keep out")


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
    watcher, together = watcher or Watcher(), joined()
    folder = wanted.out or _default_folder(session.request, wanted)
    require_own(session.request.results_dir, folder)
    finished = (folder / "config.json").exists() and "harm" in read_record(folder).get("metadata", {})
    if together.agree(float(finished)):
        return FitResult(folder, read_record(folder)["metadata"], None)
    session.permit_code()
    suites = [session.suite(name) for name in session.request.suites]
    memory = _new_memory(session, wanted)
    started = time.monotonic()
    report, examples = _train(session, suites, memory, wanted, folder, watcher)
    metadata = _metadata(session, wanted, report, examples, time.monotonic() - started)
    # Without harm and gain this is not yet finished, but it is not lost either.
    if together.main:
        memory.save_pretrained(folder, metadata)
    metadata.update(measure(session, suites, memory, wanted, watcher))
    if together.main:
        memory.save_pretrained(folder, metadata)
        shutil.rmtree(folder / "training", ignore_errors=True)
    together.wait()
    return FitResult(folder, metadata, report)


@lru_cache(maxsize=1)
def joined() -> Processes:
    """Return the processes of this run, joined once; this one alone unless a launcher started several."""
    from flashmem.placement import processes

    return processes()


def _train(
    session: Session, suites: Sequence[Suite], memory: MemorySource, wanted: FitRequest, folder: Path, watcher: Watcher
) -> tuple[TrainReport, int]:
    """Gather the examples and fit the memory; returns the report and the number of examples."""
    from flashmem.training import train_memory
    from flashmem.training_curves import CURVES_FILE

    examples = [example for suite in suites for example in _examples(session, suite, wanted, watcher)]
    if not examples:
        raise BenchError(f"no example to train on: {_why_none(wanted)}")
    # Lessons are for the suites that have some.
    config = wanted.train if any(e.lesson for e in examples) else replace(wanted.train, lessons=())
    held_out: list[Example] = []
    if wanted.train.validate_every is not None:
        share = max(1, wanted.held_out // len(suites))
        held_out = [e for suite in suites for e in _examples(session, suite, wanted, watcher, share)]
    watcher.stage(f"training on {len(examples)} examples", 1.0)
    with training_threads():
        report = train_memory(
            session.backbone,
            memory,
            examples,
            config,
            state_dir=folder / "training",
            on_step=lambda step: watcher.advance(step.progress, f"step {step.step}, loss {step.loss:.4f}"),
            validation=held_out,
            curves=folder / CURVES_FILE,
            processes=joined(),
        )
    return report, len(examples)


def _default_folder(request: Request, wanted: FitRequest) -> Path:
    suite = request.suites[0] if len(request.suites) == 1 else JOINT
    return checkpoint_folder(request.results_dir, request.model, suite, wanted.method, wanted.train.seed)


def _why_none(wanted: FitRequest) -> str:
    if wanted.targets == "self":
        return "the backbone answered none of the training samples right; use --targets gold"
    return "every training sample is longer than the backbone's positions"


def memory_settings(session: Session, method: str) -> Settings:
    """Return the settings under which a new memory of a method is made."""
    spec = get_method(method)
    return resolve(session.method_settings, fixed=spec.fixed, defaults=spec.defaults, method=method)


def _new_memory(session: Session, wanted: FitRequest) -> MemorySource:
    import torch

    from flashmem.memory import new_memory
    from flashmem.monitor import MonitorConfig
    from flashmem_bench.methods.latent import memory_config

    settings = memory_settings(session, wanted.method)
    if settings.memory.trained_trigger:
        raise UsageError("a trained trigger is fitted to a memgen memory that exists: train --trigger-of FOLDER")
    session.backbone.monitor = MonitorConfig(**settings.monitor.model_dump())
    torch.manual_seed(wanted.train.seed)
    return new_memory(memory_config(settings), session.backbone)


def _examples(
    session: Session, suite: Suite, wanted: FitRequest, watcher: Watcher, held_out: int | None = None
) -> Iterator[Example]:
    """Yield the examples of a suite that fit into the backbone: of the training split, or held-out ones."""
    from flashmem.training import Example

    backbone = session.backbone
    room = backbone.max_positions - memory_settings(session, wanted.method).memory.length
    split = "train" if held_out is None else "validation"
    samples = spread(suite.samples(split), wanted.examples if held_out is None else held_out)
    texts: Iterator[tuple[Sample, str]] = ((s, s.target) for s in samples)
    if wanted.targets == "self":
        texts = own_answers(session, suite, samples, _answer_file(session, suite, split), watcher)
    end = end_of_answer(backbone, generation_arguments(backbone, suite, Settings())["eos_token_id"] or [])
    for sample, target in texts:
        lesson = int(sample.doc.get("lesson", 0)) if suite.info.kind == "generated" else 0
        example = Example(backbone.encode_chat(sample.prompt), backbone.encode(target) + end, lesson)
        if len(example.prompt_ids) + len(example.target_ids) <= room:
            yield example


def _answer_file(session: Session, suite: Suite, split: str) -> Path:
    """Where a backbone's own answers are kept: shared by every training on them, whatever its method and seed."""
    model = f"{folder_name(model_key(session.request.model))}-{session.backbone.fingerprint}"
    name = f"{folder_name(suite.name)}-{suite.content_hash[:12]}-{split}.jsonl"
    return session.request.results_dir / "self-answers" / model / name


def end_of_answer(backbone: Backbone, stops: Sequence[int]) -> list[int]:
    """Return the token that ends a training target: one at which generation stops.

    A chat model often has several, and its tokenizer's EOS need not be the one that ends a turn. Taken is the one that
    the chat template writes after an answer; else the tokenizer's own, if generation stops there; else the first.

    Args:
        backbone: Whose template is asked.
        stops: Token ids at which generation stops.
    """
    tokenizer = backbone.tokenizer
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2]
        written = [token for token in backbone.encode(after) if token in stops]
        if written:
            return written[:1]
    own = tokenizer.eos_token_id
    return [own] if own in stops else list(stops[:1])


def own_answers(
    session: Session, suite: Suite, samples: Sequence[Sample], cache: Path, watcher: Watcher
) -> Iterator[tuple[Sample, str]]:
    """Yield the backbone's own right answers: the greedy one if it is right, else the first right draw.

    Args:
        session: The loaded parts.
        suite: Grades the answers.
        samples: Training samples.
        cache: JSON lines of finished samples, one file a process, so that sampling continues where it stopped.
        watcher: Told how far it is.
    """
    together = joined()
    known = _known_answers(cache)
    together.wait()
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Always the same batches, whatever is known already: what is drawn depends on who is in the batch.
    groups = [samples[start : start + _SELF_BATCH] for start in range(0, len(samples), _SELF_BATCH)]
    watcher.stage(f"sampling answers of the backbone on {suite.name}", len(groups))
    own = cache.with_name(f"{cache.stem}.{together.rank}.jsonl") if together.world > 1 else cache
    cut_short = own.exists() and not own.read_bytes().endswith(b"\n")
    with own.open("a", encoding="utf-8") as file:
        file.write("\n" if cut_short else "")
        for index, group in enumerate(groups):
            if index % together.world == together.rank and any(s.sample_id not in known for s in group):
                found = _right_answers(session, suite, group)
                new = {name: text for name, text in found.items() if name not in known}
                file.writelines(json.dumps({"sample_id": name, "text": text}) + "\n" for name, text in new.items())
                file.flush()
            watcher.advance(index + 1)
    together.wait()
    known = _known_answers(cache)
    return ((s, known[s.sample_id]) for s in samples if known[s.sample_id] is not None)


def _known_answers(cache: Path) -> dict[str, Any]:
    """Read what any process has stored; a line that a kill cut short is left out."""
    known: dict[str, Any] = {}
    for file in sorted(cache.parent.glob(f"{cache.stem}*.jsonl")):
        if file == cache or file.stem.removeprefix(f"{cache.stem}.").isdigit():
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                known[entry["sample_id"]] = entry["text"]
    return known


def _right_answers(session: Session, suite: Suite, samples: Sequence[Sample]) -> dict[str, str | None]:
    """Return sample id -> right answer, or None where neither the greedy one nor any draw was right."""
    from transformers import GenerationConfig

    from flashmem.generation import generate

    backbone = session.backbone
    arguments = generation_arguments(backbone, suite, Settings())
    found: dict[str, str | None] = {sample.sample_id: None for sample in samples}
    for draw in range(1 + _SELF_DRAWS):
        open_ones = [sample for sample in samples if found[sample.sample_id] is None]
        if not open_ones:
            break
        sampling = {"do_sample": True, "temperature": _SELF_TEMPERATURE} if draw else {"do_sample": False}
        config = GenerationConfig(**{**arguments, **sampling})
        prompts = [backbone.encode_chat(sample.prompt) for sample in open_ones]
        for sample, answer in zip(
            open_ones, generate(backbone, prompts, generation_config=config, seed=draw), strict=True
        ):
            if answer.finish_reason != "length" and suite.grade(sample, answer.text).score >= 1.0:
                found[sample.sample_id] = answer.text
    return found


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
    from flashmem_bench.likelihood import answering
    from flashmem_bench.methods.latent import LatentMethod, trigger_config
    from flashmem_bench.methods.lora_sft import merged

    samples = joined().mine(samples)
    settings = resolve({}, suite=suite.memory_defaults)
    context = BuildContext(session.backbone, suite, settings, generation_arguments(session.backbone, suite, settings))
    trigger = trigger_config(context, kind="prompt-end")
    lora = memory is not None and memory.config.source == "lora"
    latent = merged(context, memory) if lora else LatentMethod(context, memory, lambda sample: trigger)
    method = answering(latent, suite)
    scores: list[float] = []
    for start in range(0, len(samples), _VALIDATION_BATCH):
        batch = samples[start : start + _VALIDATION_BATCH]
        prompts = [session.backbone.encode_chat(sample.prompt) for sample in batch]
        answers = method.generate(prompts, batch, None, 0)
        scores += [suite.grade(s, a.text).score for s, a in zip(batch, answers, strict=True)]
        on_done(len(scores))
    return joined().merge(scores)


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
        "horizon": train.horizon,
        "examples": examples,
        "best_step": report.best_step,
        "best_validation_loss": report.best_validation_loss,
        "stopped_early": report.stopped_early,
        "steps": report.steps,
        "batch_size": train.batch_size,
        "lr": train.lr,
        "seconds": round(seconds, 1),
        "target_tokens": report.target_tokens,
        "first_loss": _mean(report.losses[:10]),
        "final_loss": _mean(report.losses[-10:]),
        "device": session.backbone.device.type,
    }
