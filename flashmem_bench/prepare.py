"""Turning (suite, method) into a cell that can run: everything found, everything that decides an answer named.

The identity of a cell holds all that can change an answer and nothing else: no path, no limit, no clock. What people
want to know about a cell, but what cannot change an answer, goes into its description.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from flashmem_bench.banks import bank_hash, find_or_make_bank
from flashmem_bench.checkpoints import UNTRAINED, Checkpoint, find_checkpoint
from flashmem_bench.errors import MissingCheckpointError
from flashmem_bench.likelihood import cannot_score
from flashmem_bench.methods.base import BuildContext, MethodSpec, ReferenceSample
from flashmem_bench.models import model_key
from flashmem_bench.privacy import redact, redacted
from flashmem_bench.registry import get_method
from flashmem_bench.schema import ANSWER_VERSION
from flashmem_bench.session import Session, generation_arguments
from flashmem_bench.settings import Settings, resolve
from flashmem_bench.store import cell_id
from flashmem_bench.suites import find_suite, judges_given_answers
from flashmem_bench.thresholds import (
    FoundThresholds,
    calibrate_suite,
    file_name,
    find_thresholds,
    threshold_folder,
    threshold_path,
)

if TYPE_CHECKING:
    from flashmem_bench.cell_store import CellStore
    from flashmem_bench.tasks import Suite

_ATTENTION = "sdpa, monitored layer in one pass"


@dataclass
class CellPlan:
    """A cell by name: what it is, and what people want to know of it.

    Attributes:
        identity: What can change an answer; its hash is the cell's id.
        descr: What people want to know besides.
        common: Sample columns that are the same in every row of the cell.
    """

    spec: MethodSpec
    suite: Suite
    identity: dict[str, Any]
    descr: dict[str, Any]
    common: dict[str, Any]

    @property
    def cell(self) -> str:
        """Id of the cell."""
        return cell_id(self.identity)


@dataclass
class Prepared(CellPlan):
    """A cell that can run.

    Attributes:
        context: What the method is built from.
        scored: False for an untrained memory, whose score stays null.
    """

    context: BuildContext
    scored: bool = True


@dataclass(frozen=True)
class Reference:
    """The cell that a matched method is matched to, as far as it has run.

    Attributes:
        cell: Its id.
        samples: What it did, by sample id, in the order of the suite.
    """

    cell: str
    samples: dict[str, ReferenceSample]


def prepare(
    session: Session,
    suite_name: str,
    method: str,
    reference: Reference | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Prepared:
    """Find what a method needs on a suite and name the cell.

    Args:
        session: The loaded parts.
        suite_name: Name of the suite.
        method: Name of the method.
        reference: What the method is matched to, already run (`read_reference`).
        note: Told what takes a while or should be known.

    Raises:
        MissingCheckpointError: No trained memory or no threshold; the message has the commands.
        UsageError: Settings that contradict the method or its checkpoint.
    """
    request, spec, suite = session.request, get_method(method), session.suite(suite_name)
    checkpoint = _checkpoint(session, spec, suite.name)
    settings = resolve(
        accepted_settings(session, spec),
        suite=suite.memory_defaults,
        fixed=spec.fixed,
        defaults=spec.defaults,
        method=method,
        memory=checkpoint.settings() if checkpoint else None,
    )
    references = reference.samples if reference is not None else {}
    matched = spec.match(request.match, settings, references) if spec.match is not None else {}
    settings = _with_trigger(settings, matched)
    found = _thresholds(session, spec, suite, settings, note)
    context = BuildContext(
        backbone=session.backbone,
        suite=suite,
        settings=settings,
        generation=generation_arguments(session.backbone, suite, settings),
        seed=request.seed,
        memory=checkpoint.path if checkpoint else None,
        thresholds=found.thresholds.at(settings.trigger.percentile) if found else {},
        reference=references,
        match=request.match,
    )
    bank = _bank(session, spec, context, checkpoint, note)
    # Over all samples the settings say all of a match; within a sample the moments lie over the reference's own.
    identity = _identity(session, spec, context, checkpoint, bank, None if matched else reference)
    prepared = Prepared(spec, suite, identity, {}, {}, context, scored=not _untrained(spec, checkpoint))
    prepared.common = _common(session, prepared, checkpoint, found)
    prepared.descr = _description(session, prepared, checkpoint, found)
    for text in checkpoint.notes if checkpoint else ():
        note(text)
    return prepared


def _untrained(spec: MethodSpec, checkpoint: Checkpoint | None) -> bool:
    return spec.memory_of is not None and checkpoint is None


def preflight(session: Session, suites: Sequence[str], specs: Sequence[MethodSpec]) -> list[str]:
    """Find what would stop the grid before anything heavy is loaded; returns what the user should know.

    Raises:
        UsageError: A setting that none of the methods takes, or a method that cannot judge a suite's given answers.
        MissingCheckpointError: A memory or a threshold that is not there.
    """
    request, notes = session.request, []
    for spec in specs:
        settings = resolve(accepted_settings(session, spec), fixed=spec.fixed, method=spec.name)
        kept = [
            f"{key}={value}" for key, value in spec.fixed.items() if session.method_settings.get(key, value) != value
        ]
        notes += [f"{spec.name} keeps {text}, which defines it" for text in kept]
        for name in suites:
            info = find_suite(name)
            suite = info.name
            if not spec.judges and judges_given_answers(info):
                raise cannot_score(spec.name, suite)
            _checkpoint(session, spec, suite)
            kind = spec.threshold_kind(settings)
            if kind is not None and not request.calibrate_missing:
                threshold_path(request.results_dir, request.model, suite, kind, settings)
    return notes


def accepted_settings(session: Session, spec: MethodSpec) -> dict[str, Any]:
    """Return the user's settings for a method; in a grid of several, what a method fixes is left to the others."""
    values = session.method_settings
    if len(session.request.methods) == 1:
        return values
    return {key: value for key, value in values.items() if key not in spec.fixed}


def _checkpoint(session: Session, spec: MethodSpec, suite: str) -> Checkpoint | None:
    request = session.request
    named = request.checkpoint or session.method_settings.get("memory.checkpoint")
    if spec.memory_of is None or named == UNTRAINED:
        return None
    return find_checkpoint(request.results_dir, request.model, suite, spec.memory_of, named)


def _with_trigger(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Put dotted `trigger.*` values into the settings, so that they name the cell."""
    changed = {key.removeprefix("trigger."): value for key, value in changes.items()}
    return settings.model_copy(update={"trigger": settings.trigger.model_copy(update=changed)})


def read_reference(session: Session, suite: str, cell: CellStore) -> Reference:
    """Read what the samples in question did in the reference cell."""
    texts, known = cell.texts(), {}
    samples = session.suite(suite).samples(session.request.split)
    for index in range(min(session.request.limit or len(samples), len(samples))):
        text = texts.get(samples[index].sample_id)
        if text is not None:
            fired = tuple(int(trigger["text_index"]) for trigger in text["triggers"])
            known[samples[index].sample_id] = ReferenceSample(fired, len(text["entropies"]))
    return Reference(cell.cell_id, known)


def _thresholds(
    session: Session, spec: MethodSpec, suite: Suite, settings: Settings, note: Callable[[str], None]
) -> FoundThresholds | None:
    kind = spec.threshold_kind(settings)
    if kind is None:
        return None
    request, backbone = session.request, session.backbone
    where = (request.results_dir, request.model, suite.name, kind, settings, backbone.fingerprint)
    try:
        return find_thresholds(*where)
    except MissingCheckpointError:
        if not request.calibrate_missing:
            raise
    note(f"no {kind} threshold for {suite.name} under these monitor settings yet: calibrating")
    calibrate_into_results(session, suite, settings)
    return find_thresholds(*where)


def calibrate_into_results(session: Session, suite: Suite, settings: Settings, limit: int | None = 64) -> None:
    """Calibrate both kinds for a suite under the settings and store them in the results folder."""
    request = session.request
    found = calibrate_suite(
        session.backbone,
        suite,
        settings=settings,
        generation=generation_arguments(session.backbone, suite, settings),
        limit=limit,
        percentile=85.0,
        seed=0,
    )
    folder = threshold_folder(request.results_dir, request.model, suite.name)
    for kind, thresholds in found.items():
        thresholds.save(folder / file_name(kind, settings.monitor))


def _bank(
    session: Session,
    spec: MethodSpec,
    context: BuildContext,
    checkpoint: Checkpoint | None,
    note: Callable[[str], None],
) -> str | None:
    """Put the bank into the context, making it if need be, and return its hash."""
    if not spec.needs_bank:
        return None
    parts = _memory_parts(session, spec, context, checkpoint)
    name = bank_hash(parts)
    request = session.request
    folders = list(dict.fromkeys([request.own_dir, request.results_dir]))
    context.bank = find_or_make_bank(folders, name, context, note)
    return name


def _memory_parts(
    session: Session, spec: MethodSpec, context: BuildContext, checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """Return everything that decides a memory and its moment, but not which method uses it."""
    backbone = session.backbone
    return {
        "suite": context.suite.name,
        "suite_hash": context.suite.content_hash,
        "model": model_key(session.request.model),
        "fingerprint": backbone.fingerprint,
        "template": _template_hash(backbone),
        "device": backbone.device.type,
        "dtype": _dtype(backbone),
        "attention": _ATTENTION,
        "settings": spec.relevant(context.settings),
        "memory": (checkpoint.weights_sha if checkpoint else UNTRAINED) if spec.memory_of else None,
        "thresholds": {stratum or "": round(tau, 9) for stratum, tau in context.thresholds.items()},
        "generation": context.generation,
        "seed": context.seed,
        "torch": _minor("torch"),
        "transformers": _minor("transformers"),
        # Of the answers, not of the tables: a new column leaves every finished cell where it is.
        "schema": ANSWER_VERSION,
    }


def _identity(
    session: Session,
    spec: MethodSpec,
    context: BuildContext,
    checkpoint: Checkpoint | None,
    bank: str | None,
    reference: Reference | None,
) -> dict[str, Any]:
    request = session.request
    identity = _memory_parts(session, spec, context, checkpoint)
    identity.update(
        method=spec.name,
        split=request.split,
        batch_size=request.batch_size,
        truncate=request.truncate,
        skip_bad_rows=request.skip_bad_rows and context.suite.bad_rows > 0,
    )
    if context.suite.prefix_field:
        # Answers are the same up to rounding, but times are not.
        identity["prefix_reuse"] = request.prefix_reuse
    if bank is not None:
        identity["bank"] = bank
    if spec.reference is not None:
        identity["match"] = request.match
        identity["reference"] = reference.cell if reference is not None else None
    return identity


def _common(
    session: Session, prepared: Prepared, checkpoint: Checkpoint | None, found: FoundThresholds | None
) -> dict[str, Any]:
    request, backbone = session.request, session.backbone
    return {
        "cell": prepared.cell,
        "suite": prepared.suite.name,
        "method": prepared.spec.name,
        "model": model_key(request.model),
        "seed": request.seed,
        "train_seed": checkpoint.train_seed if checkpoint else None,
        "checkpoint_scope": checkpoint.scope if checkpoint else None,
        "tau_source": found.tau_source if found else None,
        "device": backbone.device.type,
        "dtype": _dtype(backbone),
        "batch_size": request.batch_size,
        "exec": prepared.context.settings.exec,
    }


def _description(
    session: Session, prepared: Prepared, checkpoint: Checkpoint | None, found: FoundThresholds | None
) -> dict[str, Any]:
    request = session.request
    return {
        **{key: value for key, value in prepared.common.items() if key != "cell"},
        "settings": redacted(prepared.context.settings.to_json()),
        "thresholds": {stratum or "": tau for stratum, tau in prepared.context.thresholds.items()},
        "threshold_file": redact(str(found.path)) if found else None,
        "checkpoint": redact(str(checkpoint.path)) if checkpoint else None,
        "checkpoint_metadata": _brief(checkpoint.metadata) if checkpoint else None,
        "score_valid": prepared.scored,
        "metric": prepared.suite.primary_metric,
        "limit": request.limit,
        "command": redact(request.command),
        "bad_rows": prepared.suite.bad_rows,
    }


def _brief(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the plain values of a checkpoint's metadata; curves and lists stay with the checkpoint."""
    return {key: value for key, value in metadata.items() if not isinstance(value, list) or len(value) <= 16}


def _dtype(backbone: Any) -> str:
    return str(backbone.dtype).removeprefix("torch.")


def _template_hash(backbone: Any) -> str:
    template = backbone.tokenizer.chat_template or ""
    return hashlib.sha256(str(template).encode()).hexdigest()[:16]


def _minor(package: str) -> str:
    return ".".join(version(package).split(".")[:2])
