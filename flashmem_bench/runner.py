"""Runs the grid of suites and methods, sample by sample, so that nothing finished is ever lost.

A cell is run in the fixed order of its suite's samples. Each finished sample is written while the next one runs, and
the same command continues where it stopped: finished samples are skipped, samples that ended in an error are tried
again, and a larger `--limit` extends the cell.

With `--batch-size` the missing samples are one stream (see `streaming`), and rows come in the order in which samples
finish. A method that cannot stream gets batches of neighbours, made of the suite's order whatever is done already, so
that a batch has the same members in every attempt.

Time is split in two: what the clock counts (from ids on the device to the last token on the host) and `harness_ms`,
the rest of the sample's wall time; waiting for a row's write can only be counted in the row after it. The first
sample is generated once without being recorded, to warm up.

Ctrl-C lets the samples in progress finish; a second one does not wait.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

from flashmem.errors import FlashMemError
from flashmem_bench.clock import HostClock, clock_for
from flashmem_bench.equality import why_equal
from flashmem_bench.errors import sentence
from flashmem_bench.likelihood import answering, room_for
from flashmem_bench.peak_memory import PeakMemory
from flashmem_bench.prepare import Prepared, preflight, prepare
from flashmem_bench.progress import Progress, Silent
from flashmem_bench.registry import get_methods
from flashmem_bench.reuse import PrefixKeeper
from flashmem_bench.rows import (
    Prompt,
    generation_columns,
    grade_columns,
    make_prompt,
    metric_columns,
    sample_row,
    text_record,
    timing_columns,
)
from flashmem_bench.samples import sample_seed
from flashmem_bench.selection import chosen, of_sessions
from flashmem_bench.session import Request, Session
from flashmem_bench.streaming import Answer, SampleStream
from flashmem_bench.voting import curve
from flashmem_bench.writer import RowWriter

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem_bench.methods.base import Method
    from flashmem_bench.store import CellStore
    from flashmem_bench.tasks import Sample

# Prompts up to so many tokens are kept for the next method; longer ones would fill the memory.
_SHORT = 4096
_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The user asked to stop; everything finished is stored."""


@dataclass
class CellResult:
    """What became of one cell.

    Attributes:
        status: complete, partial (some samples failed) or failed (all did, or the cell could not begin).
        error: The first error sentence.
    """

    suite: str
    method: str
    cell: str
    status: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    new_samples: int = 0
    summary: dict[str, Any] = field(default_factory=dict)


def run_grid(
    request: Request,
    *,
    progress: Progress | None = None,
    session: Session | None = None,
    descr: Mapping[str, Any] | None = None,
) -> list[CellResult]:
    """Run every method on every suite of a request.

    Args:
        request: What to run.
        progress: Told what happens.
        session: Loaded parts to share with other calls; its request must name the same model and folders.
        descr: Added to the description of every cell, such as the ablation that it belongs to.

    Raises:
        FlashMemError: A mistake that concerns the whole request.
        Interrupted: The user pressed Ctrl-C.
    """
    session = session or Session(request)
    progress = progress or Silent()
    specs = get_methods(request.methods)
    session.permit_code()
    _ = session.store  # An unwritable folder is found before a model is loaded.
    referred = get_methods(spec.reference for spec in specs if spec.reference)
    for note in preflight(session, request.suites, [*specs, *referred]):
        progress.note(note)
    results: dict[tuple[str, str], CellResult] = {}
    with interruptible() as stop:
        for suite in dict.fromkeys(request.suites):
            for spec in specs:
                needed = [spec.reference] if spec.reference else []
                for name in [*needed, spec.name]:
                    if (suite, name) not in results:
                        mine = _description(descr or {}, name, request.methods)
                        results[suite, name] = _run_one(session, suite, name, results, progress, mine, stop)
    return list(results.values())


def _description(descr: Mapping[str, Any], name: str, wanted: Sequence[str]) -> Mapping[str, Any]:
    """What is added to a cell's description. A point of an axis of methods is not the cell that it is matched to."""
    of_methods = any(mark.get("of") for mark in descr.get("ablation", ()))
    return {} if of_methods and name not in wanted else descr


def _run_one(
    session: Session,
    suite: str,
    method: str,
    results: Mapping[tuple[str, str], CellResult],
    progress: Progress,
    descr: Mapping[str, Any],
    stop: Stop,
) -> CellResult:
    (spec,) = get_methods([method])
    reference = results[suite, spec.reference] if spec.reference else None
    found = [cell for cell in session.store.cells() if reference is not None and cell.cell_id == reference.cell]
    prepared = prepare(session, suite, method, found[0] if found else None, progress.note)
    prepared.descr.update(descr)
    return run_cell(session, prepared, progress, stop)


def run_cell(session: Session, prepared: Prepared, progress: Progress, stop: Stop | None = None) -> CellResult:
    """Run the samples of one cell that are still missing and describe the whole cell."""
    cell = session.store.open_cell(prepared.identity, prepared.descr)
    done = {row["sample_id"] for row in cell.rows() if row.get("error") is None}
    loop = _CellLoop(session, prepared, cell, progress, stop or Stop())
    pending = [batch for batch in loop.batches() if any(s.sample_id not in done for _, s in batch)]
    progress.start(f"{prepared.suite.name} x {prepared.spec.name}", loop.total, min(len(done), loop.total))
    try:
        if pending:
            loop.run(pending, done)
    finally:
        progress.stop()
        cell.close()
    return _result(session, prepared, cell, loop)


def _result(session: Session, prepared: Prepared, cell: CellStore, loop: _CellLoop) -> CellResult:
    wanted = {sample.sample_id for batch in loop.batches() for _, sample in batch}
    # On disk they are in the order in which they were finished.
    rows = sorted((row for row in cell.rows() if row["sample_id"] in wanted), key=lambda row: row["index"])
    errors = [row["error"] for row in rows if row.get("error")]
    status = "complete" if not errors else "failed" if len(errors) == len(rows) else "partial"
    return CellResult(
        suite=prepared.suite.name,
        method=prepared.spec.name,
        cell=cell.cell_id,
        status=status,
        rows=rows,
        error=errors[0] if errors else None,
        new_samples=loop.finished,
        summary=cell.manifest.get("summary", {}),
    )


class _CellLoop:
    """The samples of one cell, one attempt."""

    def __init__(self, session: Session, prepared: Prepared, cell: CellStore, progress: Progress, stop: Stop):
        self.session, self.prepared, self.cell = session, prepared, cell
        self.progress, self.stop = progress, stop
        self.samples = prepared.suite.samples(session.request.split)
        self.chosen = chosen(session.request, self.samples.sessions(), prepared.suite.name)
        self.total = len(self.chosen)
        self._recorded = set(self.chosen)
        self._peak = PeakMemory(session.backbone)
        self.finished, self.attempt = 0, 0
        self._write_ms = 0.0
        self._writer: RowWriter
        self._keeper: PrefixKeeper

    @property
    def backbone(self) -> Backbone:
        return self.session.backbone

    def batches(self) -> Iterator[list[tuple[int, Sample]]]:
        """Yield the batches of the suite's order that hold a sample below the limit."""
        size = self.session.request.batch_size
        if of_sessions(self.session.request):
            yield from ([(index, self.samples[index])] for index in self.chosen)
            return
        for start in range(0, self.total, size):
            stop = min(start + size, len(self.samples))
            yield [(index, self.samples[index]) for index in range(start, stop)]

    def run(self, pending: Sequence[list[tuple[int, Sample]]], done: set[str]) -> None:
        """Generate, grade and store every pending batch."""
        method = answering(self.prepared.spec.make(self.prepared.context), self.prepared.suite)
        clock = clock_for(self.backbone.device.type)
        self._keeper = PrefixKeeper(method, self.session.request)
        self._warm_up(method, pending[0][0][1])
        self.attempt = self.cell.begin_attempt(_environment(self.session))
        try:
            with RowWriter(self.cell) as writer:
                self._writer = writer
                if streams(method, self.session.request):
                    missing = [(n, s) for batch in pending for n, s in batch if s.sample_id not in done]
                    self._run_stream(method, clock, [(n, s) for n, s in missing if n in self._recorded])
                else:
                    self._run_groups(method, clock, pending, done)
        except BaseException:
            self.cell.finish(self._summary("partial"))
            raise
        self.cell.finish(self._summary("complete"))

    def _warm_up(self, method: Method, sample: Sample) -> None:
        """Generate once without recording, so that first-call costs are in no row."""
        try:
            method.warm_up(self._prompt(sample).ids, sample)
        except Exception:  # The same error will be met again, and recorded, by the sample itself.
            _log.debug("the warm-up of %s failed", self.prepared.spec.name, exc_info=True)

    def _prompt(self, sample: Sample) -> Prompt:
        """Encode a prompt; the methods of a grid share the short ones."""
        truncate = self.session.request.truncate
        budget = room_for(self.prepared, sample, truncate)
        key = (self.prepared.suite.name, sample.sample_id, truncate, budget)
        prompt = self.session.prompts.get(key)
        if prompt is None:
            prompt = make_prompt(self.backbone, sample.prompt, truncate, budget)
            if len(prompt.ids) <= _SHORT:
                self.session.prompts[key] = prompt
        return prompt

    def _run_stream(self, method: Method, clock: HostClock, samples: Sequence[tuple[int, Sample]]) -> None:
        """Answer samples as seats become free; the first Ctrl-C lets nobody in any more."""
        stream = SampleStream(
            method,
            clock,
            self.session.request.batch_size,
            prompt=self._prompt,
            fits=self._require_room,
            seed=lambda sample: sample_seed(self.prepared.context.seed, sample.sample_id),
            stopped=lambda: self.stop.asked,
            peak=self._peak,
            note=self.progress.note,
        )
        with closing(stream.answers(samples)) as answers:
            for answer in answers:
                self._keep(answer)
        if self.stop.asked:
            raise Interrupted

    def _require_room(self, prompt: Prompt) -> None:
        from flashmem.sampling import require_room

        require_room(self.backbone, len(prompt.ids), self.prepared.context.generation["max_new_tokens"])

    def _keep(self, answer: Answer) -> None:
        """Grade and store one sample of a stream."""
        began = time.perf_counter()
        sample, generation, error = answer.sample, answer.generation, answer.error
        of = (answer.index, sample, answer.prompt)
        try:
            row = self._row(*of, generation, answer.timing, error, answer.peak_alloc_bytes)
        except FlashMemError:  # What a grader lacks, it lacks for every sample.
            raise
        except Exception as problem:
            _log.debug("grading sample %s failed", sample.sample_id, exc_info=True)
            generation = None
            row = self._row(*of, None, None, sentence(problem), answer.peak_alloc_bytes)
        text = text_record(sample, generation, self.backbone)
        outside = answer.prepare_ms + (time.perf_counter() - began) * 1e3
        row.update(attempt=self.attempt, started_at=answer.started_at, harness_ms=outside + self._write_ms)
        self._store(row, text)

    def _run_groups(
        self, method: Method, clock: HostClock, pending: Sequence[list[tuple[int, Sample]]], done: set[str]
    ) -> None:
        for batch in pending:
            for group in by_key(method, batch):
                self._run_group(method, clock, group, done)
            if self.stop.asked:
                raise Interrupted

    def _run_group(self, method: Method, clock: HostClock, group: Sequence[tuple[int, Sample]], done: set[str]) -> None:
        started = time.perf_counter()
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
        samples = [sample for _, sample in group]
        prompts = [self._prompt(sample) for sample in samples]
        try:
            before = self.samples[group[0][0] - 1] if group[0][0] else None
            reuse = self._keeper.arguments(group, self._prompt, before)
            self._peak.reset()
            clock.start()
            seed = sample_seed(self.prepared.context.seed, samples[0].sample_id)
            generations: Sequence[Any] = method.generate([p.ids for p in prompts], samples, clock, seed, **reuse)
            error = None
        except Exception as problem:  # A sample that fails becomes a row; the run goes on.
            _log.debug("sample %s failed", samples[0].sample_id, exc_info=True)
            generations, error = [None] * len(group), sentence(problem)
        timings = [clock.result(g.output_tokens) if g is not None else None for g in generations]
        peak = self._peak.read()
        rows = [
            self._row(index, sample, prompt, generation, timing, error, peak)
            for (index, sample), prompt, generation, timing in zip(group, prompts, generations, timings, strict=True)
        ]
        texts = [text_record(s, g, self.backbone) for s, g in zip(samples, generations, strict=True)]
        spent = (time.perf_counter() - started) * 1e3
        outside = spent - (timings[0].e2e_ms or 0.0 if timings[0] else 0.0)
        for row, text, sample in zip(rows, texts, samples, strict=True):
            if sample.sample_id in done or row["index"] not in self._recorded:
                continue
            row.update(attempt=self.attempt, started_at=stamp, harness_ms=outside / len(group) + self._write_ms)
            self._store(row, text)

    def _store(self, row: dict[str, Any], text: dict[str, Any]) -> None:
        before = time.perf_counter()
        self._writer.put(row, text)
        self.finished += 1
        self.progress.advance(row)
        self._write_ms = (time.perf_counter() - before) * 1e3

    def _row(
        self,
        index: int,
        sample: Sample,
        prompt: Prompt,
        generation: Any,
        timing: Any,
        error: str | None,
        peak: int | None,
    ) -> dict[str, Any]:
        prepared = self.prepared
        known = {
            "sample_id": sample.sample_id,
            "index": index,
            "stratum": sample.stratum,
            "cluster": sample.cluster,
            "prompt_sha": prompt.sha,
            "prompt_tokens": len(prompt.ids),
            "prompt_truncated": prompt.truncated,
            "beyond_trained_context": prompt.beyond,
            "threshold": prepared.context.threshold(sample.stratum) if "trigger" in prepared.spec.uses else None,
            "peak_alloc_bytes": peak,
            "error": error,
            **self._keeper.columns(sample, generation),
        }
        if generation is None:
            return sample_row(prepared.common, known, {"score_valid": False})
        grade = prepared.suite.grade(sample, generation.text)
        return sample_row(
            prepared.common,
            known,
            generation_columns(generation, sample, self.backbone),
            timing_columns(timing, prepared.context.settings.exec),
            grade_columns(grade, scored=prepared.scored, valid=not prompt.beyond),
            {"grader": prepared.suite.grader},
            metric_columns(curve(prepared.suite, sample, generation.candidates)),
        )

    def _summary(self, status: str) -> dict[str, Any]:
        rows = sorted(self.cell.rows(), key=lambda row: row["index"])
        scores = [row["score"] for row in rows if row.get("score") is not None and row.get("score_valid")]
        errors = [row["error"] for row in rows if row.get("error")]
        return {
            "status": "partial" if errors else status,
            "n": len(rows),
            "score": sum(scores) / len(scores) if scores else None,
            "errors": len(errors),
            "triggers": sum(row["triggers"] or 0 for row in rows),
            "why_equal": why_equal(self.session.store, self.cell, rows),
            **({"why_not_reused": self._keeper.summary()} if self.prepared.suite.prefix_field else {}),
        }


def streams(method: Method, request: Request) -> bool:
    """Return whether a cell is one stream: several samples at a time, and a method that takes them as they come."""
    return request.batch_size > 1 and getattr(method, "stream", None) is not None


def by_key(method: Method, batch: Sequence[tuple[int, Sample]]) -> list[list[tuple[int, Sample]]]:
    """Split a batch into runs of samples that may share one `generate` call."""
    groups: list[list[tuple[int, Sample]]] = []
    keys: list[object] = []
    for entry in batch:
        key = method.batch_key(entry[1])
        if groups and keys[-1] == key:
            groups[-1].append(entry)
        else:
            groups.append([entry])
            keys.append(key)
    return groups


def _environment(session: Session) -> dict[str, Any]:
    from flashmem_bench.environment import describe

    return {"command": session.request.command, **describe(session.backbone)}


@dataclass
class Stop:
    """Whether the user asked to stop."""

    asked: bool = False


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Turn the first Ctrl-C into `Stop.asked`; the second raises KeyboardInterrupt."""
    stop = Stop()

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # Not in the main thread, where signals cannot be caught.
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
