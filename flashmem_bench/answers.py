"""The samples of one cell, answered and graded: a stream of finished rows.

Who stores the rows is not known here: the process that asked for them, or another one at the end of a pipe. What is
known is how they are made: in the suite's order, one at a time, in batches of neighbours, or, with `--batch-size` and a
method that can, as one stream (see `streaming`) whose rows come in the order in which samples finish.

Time is split in two: what the clock counts (from ids on the device to the last token on the host) and `harness_ms`,
the rest of the sample's wall time; how long the row before it was kept waiting belongs to it. The first sample is
generated once without being recorded, to warm up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flashmem.errors import FlashMemError
from flashmem_bench.clock import clock_for
from flashmem_bench.errors import sentence
from flashmem_bench.interrupts import Stop
from flashmem_bench.likelihood import answering, room_for
from flashmem_bench.peak_memory import PeakMemory
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
from flashmem_bench.shortage import give_back, is_shortage
from flashmem_bench.streaming import Answer, SampleStream
from flashmem_bench.voting import curve

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem_bench.methods.base import Method
    from flashmem_bench.prepare import Prepared
    from flashmem_bench.session import Request, Session
    from flashmem_bench.tasks import Sample

# Prompts up to so many tokens are kept for the next method; longer ones would fill the memory.
_SHORT = 4096
_log = logging.getLogger(__name__)


@dataclass
class Finished:
    """A sample that is done, failed or not.

    Attributes:
        row: All its columns, but for those that only the one who stores it knows (`attempt`).
        text: Prompt, text, tokens, triggers and entropies.
    """

    row: dict[str, Any]
    text: dict[str, Any]


class CellAnswers:
    """Answers samples of one cell.

    Args:
        session: The loaded parts.
        prepared: The cell.
        stop: Whether the user asked to stop; those under way are finished then, and nobody begins.
        note: Told what the user should know.
        began: Told which samples are begun, see `executors.base.Work`.

    Raises:
        FlashMemError: The method cannot be built.
    """

    def __init__(
        self,
        session: Session,
        prepared: Prepared,
        stop: Stop,
        note: Callable[[str], None] = lambda text: None,
        began: Callable[[Sequence[int], bool], None] = lambda indices, warming: None,
    ):
        self.session, self.prepared, self.stop, self.note, self.began = session, prepared, stop, note, began
        self.samples = prepared.suite.samples(session.request.split)
        self.method = answering(prepared.spec.make(prepared.context), prepared.suite)
        self._clock = clock_for(self.backbone.device.type)
        self._peak = PeakMemory(session.backbone)
        self._keeper = PrefixKeeper(self.method, session.request)
        self._kept_waiting_ms, self._warm = 0.0, False

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return self.session.backbone

    def summary(self) -> dict[str, Any]:
        """Return what the cell's summary should say of the way in which its samples were answered."""
        return {"why_not_reused": self._keeper.summary()} if self.prepared.suite.prefix_field else {}

    def finished(self, batches: Sequence[Sequence[int]], wanted: frozenset[int]) -> Generator[Finished]:
        """Yield each sample when it is done.

        Args:
            batches: Indices of samples that go through `generate` together, in the suite's order.
            wanted: The indices among them that are yielded; the others only keep a batch what it always was.

        Raises:
            FlashMemError: What would fail for every sample, such as a missing grader.
        """
        members = [[(index, self.samples[index]) for index in batch] for batch in batches]
        if not self._warm and not self.stop.asked:
            self._warm_up(*next(entry for batch in members for entry in batch if entry[0] in wanted))
        if streams(self.method, self.session.request):
            yield from self._stream([entry for batch in members for entry in batch if entry[0] in wanted])
            return
        for batch in members:
            if self.stop.asked:
                return
            for group in by_key(self.method, batch):
                if not wanted.isdisjoint(index for index, _ in group):
                    yield from self._group(group, wanted)

    def _warm_up(self, index: int, sample: Sample) -> None:
        """Generate once without recording, so that first-call costs are in no row."""
        self._warm = True
        self.began([index], True)
        try:
            self.method.warm_up(self._prompt(sample).ids, sample)
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

    def _stream(self, samples: Sequence[tuple[int, Sample]]) -> Iterator[Finished]:
        """Answer samples as seats become free."""
        numbers = {sample.sample_id: index for index, sample in samples}
        stream = SampleStream(
            self.method,
            self._clock,
            self.session.request.batch_size,
            prompt=self._prompt,
            fits=self._require_room,
            seed=lambda sample: self._begin(numbers[sample.sample_id], sample),
            stopped=lambda: self.stop.asked,
            peak=self._peak,
            note=self.note,
        )
        with closing(stream.answers(samples)) as answers:
            for answer in answers:
                yield from self._hand_over(self._graded(answer))

    def _begin(self, index: int, sample: Sample) -> int:
        """Say that a sample takes a seat, and return its seed."""
        self.began([index], False)
        return sample_seed(self.prepared.context.seed, sample.sample_id)

    def _require_room(self, prompt: Prompt) -> None:
        from flashmem.sampling import require_room

        require_room(self.backbone, len(prompt.ids), self.prepared.context.generation["max_new_tokens"])

    def _graded(self, answer: Answer) -> Finished:
        """Grade one sample of a stream."""
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
        row.update(started_at=answer.started_at, harness_ms=outside + self._kept_waiting_ms)
        row["timing_valid"] = answer.timing_valid
        return Finished(row, text)

    def _group(
        self, group: Sequence[tuple[int, Sample]], wanted: frozenset[int], *, again: bool = False
    ) -> Iterator[Finished]:
        """Answer samples that share one `generate` call; `again` after memory ran out, when times do not count."""
        self.began([index for index, _ in group], False)
        started = time.perf_counter()
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
        samples = [sample for _, sample in group]
        prompts = [self._prompt(sample) for sample in samples]
        generations, error, short = self._generate(group, prompts)
        if short and not (again and len(group) == 1):
            yield from self._halves(group, wanted, error or "")
            return
        timings = [self._clock.result(g.output_tokens) if g is not None else None for g in generations]
        peak = self._peak.read()
        rows = [
            self._row(index, sample, prompt, generation, timing, error, peak)
            for (index, sample), prompt, generation, timing in zip(group, prompts, generations, timings, strict=True)
        ]
        texts = [text_record(s, g, self.backbone) for s, g in zip(samples, generations, strict=True)]
        spent = (time.perf_counter() - started) * 1e3
        outside = spent - (timings[0].e2e_ms or 0.0 if timings[0] else 0.0)
        for row, text in zip(rows, texts, strict=True):
            if row["index"] in wanted:
                row["timing_valid"] = not again
                row.update(started_at=stamp, harness_ms=outside / len(group) + self._kept_waiting_ms)
                yield from self._hand_over(Finished(row, text))

    def _halves(self, group: Sequence[tuple[int, Sample]], wanted: frozenset[int], problem: str) -> Iterator[Finished]:
        """Answer a batch that was too large in two, or a sample once more now that nothing else is held."""
        self._keeper.forget()
        give_back()
        middle = (len(group) + 1) // 2
        for half in (group[:middle], group[middle:]):
            if half:
                yield from self._group(half, wanted, again=True)
        self.note(
            f"memory ran out ({problem}); {len(group)} samples were answered in parts, and their times do not count"
        )

    def _generate(
        self, group: Sequence[tuple[int, Sample]], prompts: Sequence[Prompt]
    ) -> tuple[Sequence[Any], str | None, bool]:
        """Return a record for each sample, or None for each, what went wrong, and whether that was memory."""
        samples = [sample for _, sample in group]
        try:
            before = self.samples[group[0][0] - 1] if group[0][0] else None
            reuse = self._keeper.arguments(group, self._prompt, before)
            self._peak.reset()
            self._clock.start()
            seed = sample_seed(self.prepared.context.seed, samples[0].sample_id)
            return self.method.generate([p.ids for p in prompts], samples, self._clock, seed, **reuse), None, False
        except Exception as problem:  # A sample that fails becomes a row; the run goes on.
            _log.debug("sample %s failed", samples[0].sample_id, exc_info=True)
            return [None] * len(group), sentence(problem), is_shortage(problem)

    def _hand_over(self, finished: Finished) -> Iterator[Finished]:
        before = time.perf_counter()
        yield finished
        self._kept_waiting_ms = (time.perf_counter() - before) * 1e3
        # A second Ctrl-C that came while the row was stored.
        if self.stop.at_once:
            raise KeyboardInterrupt

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
