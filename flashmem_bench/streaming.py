"""The samples of a cell as one stream: they enter as seats become free and are handed over as they finish.

A batch of neighbours is as slow as its longest answer. Here a sample that is finished makes room for the next one at
once, so answers come in any order, and each has its own time: from its seat to its last token (`clock.timing_of`).
What is done between the steps of the others, encoding a prompt or grading an answer, is in nobody's time.

One sample must not take the others with it. A prompt that does not fit is found before it enters. Where a batch fails
all the same, nobody can say for whom, so those that were under way are asked once more, one at a time, and the rest
goes on as a stream. Where memory ran out, the stream goes on with half of those that were under way at a time, and
times count no more, since the batch is not what was asked for.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import sentence
from flashmem_bench.methods.base import Entry
from flashmem_bench.peak_memory import PeakMemory
from flashmem_bench.shortage import give_back, is_shortage

if TYPE_CHECKING:
    from flashmem.generation import Generation
    from flashmem_bench.clock import HostClock, Timing
    from flashmem_bench.rows import Prompt
    from flashmem_bench.samples import Sample

_log = logging.getLogger(__name__)


@dataclass
class Answer:
    """A sample of a stream and what became of it.

    Attributes:
        index: Its position in the suite's order.
        started_at: UTC time at which it took its seat, ISO 8601.
        prepare_ms: Time that encoding its prompt took.
        peak_alloc_bytes: Peak of the whole batch while it was under way; None on a CPU.
        timing_valid: False after memory ran out.
        generation: None where it failed.
        error: What went wrong, a sentence; None when nothing did.
    """

    index: int
    sample: Sample
    prompt: Prompt
    started_at: str
    prepare_ms: float
    peak_alloc_bytes: int | None = None
    timing_valid: bool = True
    generation: Generation | None = None
    timing: Timing | None = None
    error: str | None = None


class SampleStream:
    """Answers samples, several at a time.

    Args:
        method: With `stream`, see `methods.base.Method`.
        clock: Times every sample.
        batch_size: Samples under way at once.
        prompt: Encodes the prompt of a sample.
        fits: Raises what is wrong with a prompt that leaves no room for an answer.
        seed: Of a sample.
        stopped: Whether nobody shall enter any more.
        peak: Reads the device's memory.
        note: Told when a batch has failed.
    """

    def __init__(
        self,
        method: Any,
        clock: HostClock,
        batch_size: int,
        *,
        prompt: Callable[[Sample], Prompt],
        fits: Callable[[Prompt], None],
        seed: Callable[[Sample], int],
        stopped: Callable[[], bool],
        peak: PeakMemory,
        note: Callable[[str], None] = lambda text: None,
    ):
        self.method, self.clock, self.batch_size = method, clock, batch_size
        self._prompt, self._fits, self._seed, self._stopped, self._peak = prompt, fits, seed, stopped, peak
        self._note = note
        self._waiting: deque[tuple[int, Sample]] = deque()
        self._under_way: dict[int, Answer] = {}
        self._refused: list[Answer] = []
        self._broken: Exception | None = None
        self._short = False

    def answers(self, samples: Sequence[tuple[int, Sample]]) -> Iterator[Answer]:
        """Yield each sample when it is finished, with its index; the clock stands still until the next is asked for.

        Raises:
            Exception: What encoding a prompt raised; those under way are finished before.
        """
        self._waiting.extend(samples)
        while self._waiting and not self._stopped():
            yield from self._until_a_failure()
            if self._broken is not None:
                raise self._broken

    def _until_a_failure(self) -> Iterator[Answer]:
        self._under_way, problem, short = {}, None, False
        self._start()
        try:
            with closing(self.method.stream(self._entries(), self.clock, self.batch_size)) as finished:
                for number, generation in finished:
                    with self.clock.paused():
                        yield self._finish(number, generation)
                        yield from self._turned_away()
        except Exception as error:
            if not self._under_way:
                raise
            _log.debug("a batch of %d failed", len(self._under_way), exc_info=True)
            problem, short = sentence(error), is_shortage(error)
        if self._under_way and problem is None:
            problem = f"{type(self.method).__name__}.stream ended without an answer"
        # Here the failure's frames are gone, and with them what they held of the device's memory.
        yield from self._turned_away()
        if short:
            self._with_fewer(problem or "")
            yield from self._turned_away()
        elif problem is not None:
            yield from self._one_by_one(problem)

    def _entries(self) -> Iterator[Entry]:
        """Called by the method when a seat is free."""
        for number in count():
            with self.clock.paused():
                answer = self._next()
            if answer is None:
                return
            self._under_way[number] = answer
            yield self._entry(answer)

    def _next(self) -> Answer | None:
        """Prepare the next sample that fits; None where nobody shall enter."""
        while self._waiting and not self._stopped() and self._broken is None:
            index, sample = self._waiting.popleft()
            started, stamp = perf_counter(), datetime.now(UTC).isoformat(timespec="milliseconds")
            try:
                prompt = self._prompt(sample)
            except Exception as error:
                self._broken = error
                return None
            spent = (perf_counter() - started) * 1e3
            answer = Answer(index, sample, prompt, stamp, spent, timing_valid=not self._short)
            try:
                self._fits(prompt)
            except Exception as error:
                answer.error = sentence(error)
                self._refused.append(answer)
                continue
            return answer
        return None

    def _entry(self, answer: Answer) -> Entry:
        return Entry(answer.prompt.ids, answer.sample, self._seed(answer.sample))

    def _finish(self, number: int, generation: Generation) -> Answer:
        peak = self._peak.read()
        if peak is not None:
            for other in self._under_way.values():
                other.peak_alloc_bytes = max(peak, other.peak_alloc_bytes or 0)
            self._peak.reset()
        answer = self._under_way.pop(number)
        answer.generation = generation
        answer.timing = self.clock.timing_of(number, generation.output_tokens)
        return answer

    def _turned_away(self) -> Iterator[Answer]:
        while self._refused:
            yield self._refused.pop(0)

    def _with_fewer(self, problem: str) -> None:
        """Have those that were under way wait again, for a stream of half as many at a time; one alone has failed."""
        give_back()
        left = list(self._under_way.values())
        if len(left) == 1 and self._short:
            left[0].error = f"there is not enough memory for this sample alone ({problem})"
            self._refused += left
            return
        self._short, self.batch_size = True, max(1, len(left) // 2)
        self._waiting.extendleft((answer.index, answer.sample) for answer in reversed(left))
        self._note(f"memory ran out ({problem}); {self.batch_size} at a time from here on, and times do not count")

    def _one_by_one(self, problem: str) -> Iterator[Answer]:
        """Ask those that were under way again; one that was alone already has failed by itself."""
        left = list(self._under_way.values())
        if len(left) > 1:
            self._note(f"a batch failed ({problem}); its {len(left)} samples are asked one by one")
        for answer in left:
            answer.error = problem if len(left) == 1 else None
            if len(left) > 1:
                self._alone(answer)
            yield answer

    def _alone(self, answer: Answer) -> None:
        self._under_way = {0: answer}
        self._start()
        try:
            ((_, generation),) = self.method.stream([self._entry(answer)], self.clock, 1)
            self._finish(0, generation)
        except Exception as error:
            _log.debug("sample %s failed", answer.sample.sample_id, exc_info=True)
            answer.error = sentence(error)

    def _start(self) -> None:
        self._peak.reset()
        self.clock.start()
