"""From a recipe to results: every training, every threshold, every arm, the report.

Each step is one of the entry points that the other commands use, and each is idempotent: a finished checkpoint, a
threshold of the same backbone and a finished sample are not made again. The same command therefore continues after a
kill. Memories are named to the arms by their folder: what a recipe trained is measured, also where the harm gate would
keep it from being a default, and a sentence says so.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem_bench.checkpoints import HARM_LIMIT, JOINT, checkpoint_root, harm_of, read_record
from flashmem_bench.errors import BenchError, UsageError
from flashmem_bench.limits import Limits
from flashmem_bench.places import folder_name
from flashmem_bench.recipes import Recipe
from flashmem_bench.registry import get_methods
from flashmem_bench.session import Request, Session

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem_bench.fitting import FitRequest, FitResult, Watcher
    from flashmem_bench.runner import CellResult
    from flashmem_bench.tasks import Suite
    from flashmem_bench.thresholds import Thresholds


_LAUNCHER = ("--standalone", "--nproc-per-node")


@dataclass(frozen=True)
class Training:
    """One memory to fit.

    Attributes:
        method: Whose memory.
        suites: On which suites.
        seed: Of the training.
        folder: Of the checkpoint.
    """

    method: str
    suites: tuple[str, ...]
    seed: int
    folder: Path


@dataclass(frozen=True)
class Arms:
    """Methods that run on one suite with one memory, or with none."""

    suite: str
    methods: tuple[str, ...]
    seed: int
    checkpoint: Path | None


@dataclass(frozen=True)
class Place:
    """Where a recipe works: results, data, and what the user allows."""

    results_dir: Path = Path("results")
    data_dir: Path | None = None
    skip_bad_rows: bool = False
    trust_suite: bool = False
    command: str = ""
    allow_code_execution: bool = False
    allow_uncontained_code: bool = False
    workers: int = 1
    limits: Limits = field(default_factory=Limits)
    executor: str = "local"
    ray_address: str = "auto"
    worker_cpus: int = 1


class Parts:
    """What the steps of one recipe share: the backbone and the suites, loaded once."""

    def __init__(self, recipe: Recipe, place: Place):
        self.recipe, self.place = recipe, place
        self._backbone: Backbone | None = None
        self._suites: dict[str, Suite] = {}

    def share(self, session: Session) -> None:
        """Use what another session has loaded."""
        self._backbone, self._suites = session.backbone, session._suites

    def session(self, suites: Sequence[str], methods: Sequence[str], **more: Any) -> Session:
        """Return a session of the recipe's backbone and settings."""
        recipe, place = self.recipe, self.place
        request = Request(
            suites=tuple(suites),
            methods=tuple(methods),
            model=recipe.model,
            device=recipe.device,
            dtype=recipe.dtype,
            placement=recipe.placement.map,
            settings=recipe.settings,
            data_dir=place.data_dir,
            skip_bad_rows=place.skip_bad_rows,
            trust_suite=place.trust_suite,
            allow_code_execution=place.allow_code_execution,
            allow_uncontained_code=place.allow_uncontained_code,
            results_dir=place.results_dir,
            workers=place.workers,
            limits=place.limits,
            executor=place.executor,
            ray_address=place.ray_address,
            worker_cpus=place.worker_cpus,
            command=place.command,
            **more,
        )
        return _Sharing(request, self)


class _Sharing(Session):
    """A session whose backbone and suites outlive it."""

    def __init__(self, request: Request, parts: Parts):
        super().__init__(request, parts._backbone, {})
        self._parts, self._suites = parts, parts._suites

    @property
    def backbone(self) -> Backbone:
        """See `Session.backbone`."""
        self._parts._backbone = super().backbone
        return self._parts._backbone


def require_suites(recipe: Recipe) -> tuple[str, ...]:
    """Return the recipe's suites, each known to exist.

    Raises:
        UsageError: It names none, or one that nobody knows.
    """
    from flashmem_bench.suites import find_suite

    if not recipe.suites:
        raise UsageError("--suite is missing, and the recipe names none under suites")
    for name in recipe.suites:
        find_suite(name)
    return recipe.suites


def trainings(recipe: Recipe, results_dir: Path, out: Path | None = None) -> list[Training]:
    """Return every memory that a recipe fits, in order.

    Args:
        recipe: The recipe.
        results_dir: Where its results go.
        out: Folder of the one checkpoint; None = below `train.out` or the results folder.

    Raises:
        UsageError: Suites that nobody knows, a method without a memory, or one folder for several memories.
    """
    from flashmem_bench.fitting import TRAINABLE

    for method in recipe.train.methods:
        if method not in TRAINABLE:
            raise UsageError(f"train fits {', '.join(TRAINABLE)}; the memory of {method} is one of these")
    root = recipe.train.out or checkpoint_root(results_dir, recipe.model)
    suites = require_suites(recipe)
    groups = [(name,) for name in suites] if recipe.train.scope == "suite" else [suites]
    found = [
        Training(method, group, seed, root / _folder(group) / method / f"seed{seed}")
        for method in recipe.train.methods
        for group in groups
        for seed in recipe.train.seeds
    ]
    if out is None:
        return found
    if len(found) > 1:
        raise UsageError(
            f"--out is the folder of one checkpoint and there are {len(found)}; use train.out in the recipe"
        )
    return [replace(found[0], folder=out)]


def _folder(suites: tuple[str, ...]) -> str:
    from flashmem_bench.suites import find_suite

    return folder_name(find_suite(suites[0]).name) if len(suites) == 1 else JOINT


def fit_request(recipe: Recipe, training: Training) -> FitRequest:
    """Return what the fitting of one memory is asked for."""
    from flashmem.training import TrainConfig
    from flashmem_bench.fitting import FitRequest

    train, early = recipe.train, recipe.train.early_stopping
    config = TrainConfig(
        lr=train.lr,
        weight_decay=train.weight_decay,
        clip=train.clip,
        batch_size=train.batch_size,
        epochs=train.epochs,
        max_steps=train.steps,
        max_minutes=train.minutes,
        warmup=train.warmup,
        insertion=train.insertion,
        seed=training.seed,
        micro_batch_size=train.micro_batch_size,
        activation_checkpointing=train.activation_checkpointing,
        validate_every=early.every if early else None,
        patience=early.patience if early else None,
        keep=train.keep,
        lessons=train.lessons,
        horizon=train.horizon,
        prefix_gib=train.prefix_gib,
        batching=train.batching,
    )
    return FitRequest(
        method=training.method,
        targets=recipe.targets,
        train=config,
        examples=train.examples,
        validation=train.validation,
        out=training.folder,
        provisional=train.provisional,
        held_out=early.examples if early else 256,
    )


def train_all(parts: Parts, wanted: Sequence[Training], watcher: Watcher) -> list[tuple[Training, FitResult]]:
    """Fit the memories that are not there yet."""
    from flashmem_bench.fitting import fit

    found = []
    for training in wanted:
        session = parts.session(training.suites, (training.method,))
        _ = session.store
        result = fit(session, fit_request(parts.recipe, training), watcher)
        found.append((training, result))
    return found


def train_recipe(name: str, parts: Parts, watcher: Watcher) -> None:
    """Fit every memory of a recipe; where it asks for several processes, in those, through `train --recipe`."""
    recipe, place = parts.recipe, parts.place
    wanted = trainings(recipe, place.results_dir)
    if recipe.placement.processes == 1:
        train_all(parts, wanted, watcher)
    elif not all(is_fitted(training.folder) for training in wanted):
        # A quiet parent has a quiet child; its table of memories is printed by the report.
        launch(
            ["train", "--recipe", name, "--quiet", *_place_options(place), *_code_options(place)],
            recipe.placement.processes,
        )


def calibrate_all(parts: Parts, watcher: Watcher) -> None:
    """Measure the thresholds of the recipe's suites that are not there yet, for this backbone and these samples."""
    from flashmem_bench.settings import resolve
    from flashmem_bench.thresholds import file_name, joint_thresholds, threshold_folder

    recipe, place = parts.recipe, parts.place
    found: list[Thresholds] = []
    session = parts.session(recipe.suites, ())
    settings = resolve(session.method_settings)

    def path(thresholds: Thresholds) -> Path:
        folder = threshold_folder(place.results_dir, recipe.model, thresholds.suite)
        return (recipe.calibrate.out / folder.name if recipe.calibrate.out else folder) / file_name(
            thresholds.kind, settings.monitor
        )

    for name in recipe.suites:
        found += _calibrate(parts, name, path, watcher)
    if recipe.calibrate.joint:
        for kind in dict.fromkeys(part.kind for part in found):
            joint = joint_thresholds(session.backbone, [part for part in found if part.kind == kind])
            joint.save(path(joint))


def _calibrate(parts: Parts, name: str, path: Callable[[Thresholds], Path], watcher: Watcher) -> list[Thresholds]:
    """Return the thresholds of a suite, measured unless the stored ones are of the same backbone and samples."""
    from flashmem_bench.methods.base import ENTROPY_KINDS
    from flashmem_bench.session import generation_arguments
    from flashmem_bench.settings import resolve
    from flashmem_bench.thresholds import Thresholds, calibrate_suite, spread

    recipe, session = parts.recipe, parts.session((name,), ())
    suite, backbone = session.suite(name), session.backbone
    settings = resolve(session.method_settings, suite=suite.memory_defaults)
    number = len(spread(suite.samples("calibration"), recipe.calibrate.limit))
    known = []
    for kind in ENTROPY_KINDS:
        file = path(Thresholds(kind, suite.name, backbone.fingerprint, {}, {}))
        stored = Thresholds.load(file) if file.exists() else None
        same = {"samples": number, "seed": recipe.calibrate.seed, "suite_hash": suite.content_hash}
        if stored and stored.fingerprint == backbone.fingerprint and same.items() <= stored.provenance.items():
            known.append(stored)
    if len(known) == len(ENTROPY_KINDS):
        return known
    watcher.stage(f"calibrating {suite.name}", 1.0)
    measured = calibrate_suite(
        backbone,
        suite,
        settings=settings,
        generation=generation_arguments(backbone, suite, settings),
        limit=recipe.calibrate.limit,
        percentile=settings.trigger.percentile,
        seed=recipe.calibrate.seed,
        on_sample=lambda done, total: watcher.advance(done / total, f"{done} of {total} samples"),
    )
    for thresholds in measured.values():
        thresholds.save(path(thresholds))
    return list(measured.values())


def is_fitted(folder: Path) -> bool:
    """Whether a memory is there, trained and measured."""
    return (folder / "config.json").exists() and "harm" in (read_record(folder).get("metadata") or {})


def commands(name: str, parts: Parts) -> list[str]:
    """Return the command lines that do what `reproduce` does, one a step."""
    recipe, place = parts.recipe, parts.place
    options = _place_options(place)
    common = ["--model", recipe.model, "--dtype", recipe.dtype, "--device", recipe.device]
    common += [part for key, value in recipe.settings.items() for part in ("--set", f"{key}={value}")]
    several = ["torchrun", *_LAUNCHER, str(recipe.placement.processes), "-m", "flashmem_bench"]
    front = several if recipe.placement.processes > 1 else ["flashmem-bench"]
    lines = [[*front, "train", "--recipe", name, *options, *_code_options(place)]]
    limit = ["--limit", str(recipe.calibrate.limit)] if recipe.calibrate.limit else []
    joint = ["--joint"] if recipe.calibrate.joint else []
    where = ["--out", str(recipe.calibrate.out)] if recipe.calibrate.out else []
    seed = ["--seed", str(recipe.calibrate.seed)]
    lines += [
        ["flashmem-bench", "calibrate", "--suite", ",".join(recipe.suites), *limit, *seed, *joint, *where, *common,
         *options]
    ]  # fmt: skip
    for arm in arms(recipe, place.results_dir):
        line = [
            "flashmem-bench",
            "run",
            "--suite",
            arm.suite,
            "--method",
            ",".join(arm.methods),
            "--seed",
            str(arm.seed),
        ]
        line += ["--batch-size", str(recipe.run.batch_size)]
        line += ["--limit", str(recipe.run.limit)] if recipe.run.limit else []
        line += ["--checkpoint", str(arm.checkpoint)] if arm.checkpoint else []
        lines.append([*line, *common, *options, *_code_options(place), *_worker_options(place)])
    lines.append(["flashmem-bench", "report", "--results-dir", str(place.results_dir)])
    return [shlex.join(line) for line in lines]


def _place_options(place: Place) -> list[str]:
    options = ["--results-dir", str(place.results_dir)]
    options += ["--data-dir", str(place.data_dir)] if place.data_dir else []
    options += ["--skip-bad-rows"] if place.skip_bad_rows else []
    return options + (["--trust-suite"] if place.trust_suite else [])


def _code_options(place: Place) -> list[str]:
    """What commands that grade need beside; calibrating does not grade."""
    options = ["--allow-code-execution"] if place.allow_code_execution else []
    return options + (["--allow-uncontained-code"] if place.allow_uncontained_code else [])


def _worker_options(place: Place) -> list[str]:
    options = ["--workers", str(place.workers)] if place.workers > 1 else []
    for name in ("executor", "ray_address", "worker_cpus"):
        if getattr(place, name) != getattr(Place, name):
            options += [f"--{name.replace('_', '-')}", str(getattr(place, name))]
    for name, value in vars(place.limits).items():
        if value != getattr(Limits(), name):
            options += [f"--{name.replace('_', '-')}", f"{value:g}"]
    return options


def arms(recipe: Recipe, results_dir: Path) -> Iterator[Arms]:
    """Yield the runs of a recipe: methods without a memory once, the others once a training seed."""
    folders = {(t.method, s, t.seed): t.folder for t in trainings(recipe, results_dir) for s in t.suites}
    for suite in recipe.suites:
        for seed in recipe.run.seeds:
            groups: dict[str | None, list[str]] = {}
            for spec in get_methods(recipe.run.methods):
                groups.setdefault(spec.memory_of, []).append(spec.name)
            for source, methods in groups.items():
                found = [folder for (m, s, _), folder in folders.items() if (m, s) == (source, suite)]
                for folder in found or [None]:
                    yield Arms(suite, tuple(methods), seed, folder)


def run_arms(parts: Parts, progress: Any, say: Callable[[str], None]) -> list[CellResult]:
    """Run every arm of a recipe.

    Raises:
        BenchError: A memory of the recipe is not there.
    """
    from flashmem_bench.runner import run_grid, worker_processes

    results: list[CellResult] = []
    with worker_processes(parts.session((), ()).request) as workers:
        for arm in arms(parts.recipe, parts.place.results_dir):
            if arm.checkpoint is not None:
                say_harm(arm, say)
            session = parts.session(
                (arm.suite,),
                arm.methods,
                seed=arm.seed,
                limit=parts.recipe.run.limit,
                batch_size=parts.recipe.run.batch_size,
                checkpoint=str(arm.checkpoint) if arm.checkpoint else None,
            )
            results += run_grid(session.request, progress=progress, session=session, workers=workers)
    return results


def say_harm(arm: Arms, say: Callable[[str], None]) -> None:
    """Say so where a memory is measured that the harm gate keeps from being a default."""
    if arm.checkpoint is None or not (arm.checkpoint / "config.json").exists():
        raise BenchError(f"the memory {arm.checkpoint} is not there: train it first")
    harm = harm_of(read_record(arm.checkpoint).get("metadata") or {}, arm.suite)
    if harm is not None and harm > HARM_LIMIT:
        say(
            f"{arm.checkpoint} breaks {harm:.1%} of the validation samples of {arm.suite}: "
            "it is no default, and is measured all the same"
        )


def launch(arguments: Sequence[str], processes: int) -> None:
    """Run one of our commands in several processes of this machine, which accelerate then joins.

    torch's launcher starts them, because `accelerate launch` starts only one where there is no GPU.

    Raises:
        BenchError: It failed; the message has the command.
    """
    options = [*_LAUNCHER, str(processes), "-m", "flashmem_bench", *arguments]
    if subprocess.run([sys.executable, "-m", "torch.distributed.run", *options], check=False).returncode != 0:
        raise BenchError(f"this failed: {shlex.join(['torchrun', *options])}")
