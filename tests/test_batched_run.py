"""`--batch-size`: samples enter as seats become free, and every answer, count and time is the sample's own."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flashmem_bench.answers import streams
from flashmem_bench.clock import FakeClock
from flashmem_bench.interrupts import Interrupted, Stop
from flashmem_bench.peak_memory import PeakMemory
from flashmem_bench.progress import Silent
from flashmem_bench.rows import Prompt
from flashmem_bench.runner import run_cell
from flashmem_bench.samples import Sample
from flashmem_bench.store import ResultStore
from flashmem_bench.streaming import SampleStream
from flashmem_bench.verification import cell_problems

METHODS = (
    "vanilla",
    "lora-sft",
    "flashmem",
    "flashmem-no-monitor",
    "flashmem-random-trigger",
    "flashmem-matched-fixed",
    "flashmem-output-entropy",
    "flashmem-shuffled-memory",
    "flashmem-separate-encoder",
    "memgen",
    "memgen-cached",
)
LIMIT = 12
# So many of the 260 tokens end an answer that answers have all lengths.
ENDS = list(range(0, 260, 5))
# Columns that say what a sample did; times and sums of rounded numbers are not among them.
SAME = (
    "sample_id",
    "index",
    "prompt_sha",
    "prompt_tokens",
    "output_tokens",
    "latent_tokens",
    "positions_encoded",
    "positions_woven",
    "triggers",
    "threshold",
    "above_tau_rate",
    "finish_reason",
    "parse_status",
    "answer_extracted",
    "score",
)


@pytest.fixture(scope="module")
def mixed(bench, tmp_path_factory):
    """The random backbone with many tokens that end an answer, so that answers have all lengths."""
    from flashmem.backbone import Backbone

    model = tmp_path_factory.mktemp("mixed") / bench.model.name
    shutil.copytree(bench.model, model)
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ENDS}))
    return dataclasses.replace(bench, model=model, backbone=Backbone.from_pretrained(str(model)))


class Notes(Silent):
    """Keeps what a user would be told."""

    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def grid(mixed, tmp_path_factory):
    """All methods at three batch sizes: batch size -> method -> result, and the stored cells by id."""
    from flashmem_bench.runner import run_grid
    from flashmem_bench.session import Session

    results, found, notes = mixed.results(tmp_path_factory.mktemp("batched") / "results"), {}, Notes()
    for size in (1, 3, 8):
        more = {"limit": LIMIT, "batch_size": size, "settings": {"trigger.cooldown": 4}}
        request = mixed.request(results, "hops-list", ",".join(METHODS), **more)
        session = Session(request, mixed.backbone, mixed.suites)
        found[size] = {result.method: result for result in run_grid(request, session=session, progress=notes)}
    assert not [text for text in notes.texts if "batch failed" in text], notes.texts
    return found, {cell.cell_id: cell for cell in ResultStore(results).cells()}


def did(result, cell) -> list[dict]:
    """What each sample of a cell did, its text, its tokens and the places of its memories among it."""
    texts = cell.texts()
    return [
        {
            **{key: row[key] for key in SAME},
            "text": texts[row["sample_id"]]["text"],
            "tokens": texts[row["sample_id"]]["tokens"],
            "moments": [trigger["text_index"] for trigger in texts[row["sample_id"]]["triggers"]],
        }
        for row in result.rows
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [3, 8])
def test_a_batch_answers_as_each_sample_alone(grid, method, size):
    found, cells = grid
    alone, together = found[1][method], found[size][method]
    assert together.status == "complete" and together.cell != alone.cell
    assert did(together, cells[together.cell]) == did(alone, cells[alone.cell])
    for row, other in zip(alone.rows, together.rows, strict=True):
        moved = (row["first_kl_nats"] or 0.0, other["first_kl_nats"] or 0.0)
        assert moved[0] == pytest.approx(moved[1], rel=1e-3, abs=1e-5)
    assert [row["index"] for row in together.rows] == list(range(LIMIT)), "on disk they are in another order"


def test_the_grid_tells_the_methods_and_the_orders_apart(grid):
    """Else the comparison above would hold for machinery that never ran."""
    found, cells = grid
    triggers = {name: sum(row["triggers"] for row in result.rows) for name, result in found[8].items()}
    assert triggers["vanilla"] == triggers["lora-sft"] == 0
    assert all(count > 0 for name, count in triggers.items() if name not in ("vanilla", "lora-sft")), triggers
    assert {0} < {row["triggers"] for row in found[8]["flashmem-random-trigger"].rows}, "some samples have no moment"
    assert len({row["output_tokens"] for row in found[8]["vanilla"].rows}) > 3
    stored = [row["index"] for row in cells[found[3]["vanilla"].cell].rows()]
    assert sorted(stored) == list(range(LIMIT)) != stored


@pytest.mark.parametrize("size", [3, 8])
def test_times_of_a_batch_obey_the_formulas(grid, size):
    found, cells = grid
    for result in found[size].values():
        assert not list(cell_problems(cells[result.cell]))
        for row in result.rows:
            assert row["batch_size"] == size and row["attempt"] == 1 and row["error"] is None
            assert 0 < row["prefill_ms"] < row["ttft_ms"] <= row["e2e_ms"]
            assert row["e2e_ms"] == pytest.approx(row["prefill_ms"] + row["decode_ms"])
            assert row["harness_ms"] > 0 and row["started_at"]
            if row["output_tokens"] > 1:
                per_token = (row["e2e_ms"] - row["ttft_ms"]) / (row["output_tokens"] - 1)
                assert row["tpot_ms"] == pytest.approx(per_token)


def test_draws_are_the_samples_own(mixed, tmp_path):
    results, texts = mixed.results(tmp_path / "results"), []
    for size in (1, 3, 8):
        more = {"batch_size": size, "settings": {"sampling.temperature": 1.0, "trigger.cooldown": 4}, "seed": 5}
        (result,) = mixed.run(results, "hops", "flashmem", limit=10, **more)
        (cell,) = [cell for cell in ResultStore(results).cells() if cell.cell_id == result.cell]
        texts.append({name: text["tokens"] for name, text in cell.texts().items()})
    assert texts[0] == texts[1] == texts[2]
    assert len({tuple(tokens) for tokens in texts[0].values()}) > 5


def test_who_cannot_stream_keeps_batches_of_neighbours(bench, tmp_path):
    from flashmem_bench.prepare import prepare
    from flashmem_bench.registry import get_methods
    from flashmem_bench.session import Session

    request = bench.request(bench.results(tmp_path / "results"), "hops", "vanilla", batch_size=2)
    session = Session(request, bench.backbone, bench.suites)
    can = {}
    for spec in get_methods(["vanilla", "memgen", "cot-sc", "snapkv", "tova"]):
        method = spec.build(prepare(session, "hops", spec.name).context)
        can[spec.name] = streams(method, request)
        assert spec.together == can[spec.name]
        assert not streams(method, dataclasses.replace(request, batch_size=1))
    assert can == {"vanilla": True, "memgen": True, "cot-sc": False, "snapkv": False, "tova": False}
    results = bench.run(request.results_dir, "hops", "cot-sc,snapkv", limit=3, batch_size=2)
    assert [result.status for result in results] == ["complete", "complete"]


def command(bench, results: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "flashmem_bench.cli", "run", "--suite", "hops", "--method", "flashmem", "--model",
            str(bench.model), "--results-dir", str(results), "--limit", "16", "--quiet", "--batch-size", "3",
            *more]  # fmt: skip


def environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}


def lines(results: Path) -> list[dict]:
    """Whole rows on disk, in their order."""
    texts = [path.read_text() for path in results.glob("runs/*/*/*/samples.jsonl")]
    return [json.loads(line) for text in texts for line in text.split("\n")[:-1]]


def kill_after(bench, results: Path, rows: int) -> None:
    """Start the real command and kill it as soon as that many rows are there."""
    process = subprocess.Popen(command(bench, results), env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(lines(results)) < rows and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def table(results: Path) -> list[dict]:
    rows = [row for cell in ResultStore(results).cells() for row in cell.rows()]
    return sorted(({key: row[key] for key in SAME} for row in rows), key=lambda row: row["index"])


def test_killed_and_continued_gives_the_table_of_an_undisturbed_run(mixed, tmp_path):
    whole, killed = mixed.results(tmp_path / "whole"), mixed.results(tmp_path / "killed")
    subprocess.run(command(mixed, whole), env=environment(), check=True)
    kill_after(mixed, killed, 6)
    there = [row["sample_id"] for row in lines(killed)]
    assert 6 <= len(there) <= 16
    subprocess.run(command(mixed, killed), env=environment(), check=True)
    assert table(killed) == table(whole) and len(table(whole)) == 16
    after = lines(killed)
    assert [row["sample_id"] for row in after[: len(there)]] == there, "what was there is not answered again"
    (cell,) = ResultStore(killed).cells()
    assert len(after) == len(cell.rows()) == 16 and cell.manifest["summary"]["status"] == "complete"
    assert not list(cell_problems(cell))


def prepared(bench, results: Path, limit: int, wrap=lambda method: method, size: int = 3):
    from flashmem_bench.prepare import prepare
    from flashmem_bench.session import Session

    request = bench.request(results, "hops", "vanilla", limit=limit, batch_size=size)
    session = Session(request, bench.backbone, bench.suites)
    cell = prepare(session, "hops", "vanilla")
    build = cell.spec.build
    cell.spec = dataclasses.replace(cell.spec, build=lambda context: wrap(build(context)))
    return session, cell


class Press(Silent):
    """Presses Ctrl-C when so many samples are finished."""

    def __init__(self, stop: Stop, after: int):
        self.flag, self.after, self.seen = stop, after, 0

    def advance(self, row):
        self.seen += 1
        self.flag.asked = self.flag.asked or self.seen == self.after


def test_the_first_interrupt_lets_those_under_way_finish(mixed, tmp_path):
    results, stop = mixed.results(tmp_path / "results"), Stop()
    entered = []

    class Watched:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def stream(self, entries, clock, batch_size):
            return self.inner.stream(map(self.enter, entries), clock, batch_size)

        def enter(self, entry):
            entered.append(entry.sample.sample_id)
            return entry

    session, cell = prepared(mixed, results, 12, Watched)
    with pytest.raises(Interrupted):
        run_cell(session, cell, Press(stop, 4), stop)
    (stored,) = ResultStore(results).cells()
    rows = stored.rows()
    assert {row["sample_id"] for row in rows} == set(entered) and 4 <= len(rows) < 12
    assert all(row["error"] is None and row["score"] is not None for row in rows)
    assert stored.manifest["summary"]["status"] == "partial"
    session, cell = prepared(mixed, results, 12)
    result = run_cell(session, cell, Silent())
    assert result.new_samples == 12 - len(rows) and len(lines(results)) == 12
    assert [row["index"] for row in result.rows] == list(range(12))


def test_a_second_interrupt_stops_at_once_and_leaves_the_backbone_usable(mixed, tmp_path):
    class Twice(Silent):
        def advance(self, row):
            raise KeyboardInterrupt

    results = mixed.results(tmp_path / "results")
    session, cell = prepared(mixed, results, 6)
    with pytest.raises(KeyboardInterrupt):
        run_cell(session, cell, Twice(), Stop())
    (stored,) = ResultStore(results).cells()
    there = len(stored.rows())
    assert there and stored.manifest["summary"]["status"] == "partial"
    session, cell = prepared(mixed, results, 6)
    assert run_cell(session, cell, Silent()).new_samples == 6 - there


def test_a_prompt_without_room_is_a_row_of_its_own(mixed, tmp_path):
    results = mixed.results(tmp_path / "results")
    lengths = sorted(row["prompt_tokens"] for row in mixed.run(results, "hops", "vanilla", limit=8)[0].rows)
    before, budget = mixed.backbone.max_positions, mixed.suites["hops"].generation.max_new_tokens
    mixed.backbone.model.config.max_position_embeddings = lengths[-1] - 1 + budget
    try:
        (alone,) = mixed.run(mixed.results(tmp_path / "alone"), "hops", "vanilla", limit=8)
        (together,) = mixed.run(results, "hops", "vanilla", limit=8, batch_size=3)
    finally:
        mixed.backbone.model.config.max_position_embeddings = before
    errors = [row["error"] for row in together.rows]
    assert errors == [row["error"] for row in alone.rows] and together.status == "partial"
    assert 0 < sum(error is not None for error in errors) < 8
    assert "positions" in together.error and "--truncate" in together.error
    failed = next(row for row in together.rows if row["error"])
    assert failed["prompt_tokens"] == lengths[-1] and failed["score"] is None and failed["e2e_ms"] is None
    (again,) = mixed.run(results, "hops", "vanilla", limit=8, batch_size=3)
    assert again.status == "complete" and again.new_samples == errors.count(errors[failed["index"]])


def test_all_prompts_without_room_are_rows(mixed, tmp_path):
    before, mixed.backbone.model.config.max_position_embeddings = mixed.backbone.max_positions, 30
    try:
        (result,) = mixed.run(mixed.results(tmp_path / "results"), "hops", "vanilla", limit=4, batch_size=3)
    finally:
        mixed.backbone.model.config.max_position_embeddings = before
    assert result.status == "failed" and len(result.rows) == 4


def test_a_grade_that_fails_is_a_row_of_its_own(mixed, tmp_path, monkeypatch):
    suite, results = mixed.suites["hops"], mixed.results(tmp_path / "results")
    bad, grade = suite.samples()[4].sample_id, suite.grade

    def broken(sample, text):
        if sample.sample_id == bad:
            raise ZeroDivisionError("nothing to divide by")
        return grade(sample, text)

    with monkeypatch.context() as patch:
        patch.setattr(suite, "grade", broken)
        (result,) = mixed.run(results, "hops", "vanilla", limit=8, batch_size=3)
    assert result.status == "partial" and result.error == "ZeroDivisionError: nothing to divide by"
    assert [row["sample_id"] for row in result.rows if row["error"]] == [bad]
    (again,) = mixed.run(results, "hops", "vanilla", limit=8, batch_size=3)
    assert again.status == "complete" and again.new_samples == 1


class Fragile:
    """A method whose batches break as soon as one sample is among them."""

    def __init__(self, inner, bad: str):
        self.inner, self.bad, self.sizes = inner, bad, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def stream(self, entries, clock, batch_size):
        self.sizes.append(batch_size)
        return self.inner.stream(self.checked(entries), clock, batch_size)

    def checked(self, entries):
        for entry in entries:
            if entry.sample.sample_id == self.bad:
                raise ValueError("not this one")
            yield entry


def test_a_batch_that_breaks_blames_the_one_sample_and_goes_on(mixed, tmp_path):
    whole, results = mixed.results(tmp_path / "whole"), mixed.results(tmp_path / "results")
    bad, made = mixed.suites["hops"].samples()[5].sample_id, []

    def fragile(method):
        made.append(Fragile(method, bad))
        return made[-1]

    session, cell = prepared(mixed, results, 12, fragile)
    notes = Notes()
    result = run_cell(session, cell, notes)
    assert any("a batch failed (ValueError: not this one); its" in text for text in notes.texts)
    session, cell = prepared(mixed, whole, 12)
    undisturbed = run_cell(session, cell, Silent())
    assert result.status == "partial" and result.error == "ValueError: not this one"
    assert [row["sample_id"] for row in result.rows if row["error"]] == [bad]
    good = [{key: row[key] for key in SAME} for row in result.rows if not row["error"]]
    assert good == [{key: row[key] for key in SAME} for row in undisturbed.rows if row["sample_id"] != bad]
    assert len(lines(results)) == 12, "nobody is stored twice"
    (sizes,) = [it.sizes for it in made]
    assert sizes[0] == 3 and sizes[-1] == 3 and 2 <= sizes.count(1) <= 3, sizes


class Narrow:
    """A method on a device that has room for so many rows at a time, and a short memory for what it cannot hold."""

    def __init__(self, inner, room: int, error: type[Exception] = MemoryError):
        self.inner, self.room, self.error, self.sizes = inner, room, error, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def generate(self, prompts, *more, **options):
        self._require(len(prompts))
        return self.inner.generate(prompts, *more, **options)

    def stream(self, entries, clock, batch_size):
        return self.inner.stream(self._seated(entries, batch_size), clock, batch_size)

    def _seated(self, entries, batch_size):
        for taken, entry in enumerate(entries):
            self._require(min(taken + 1, batch_size))
            yield entry

    def _require(self, rows: int) -> None:
        self.sizes.append(rows)
        if rows > self.room:
            raise self.error("CUDA out of memory. Tried to allocate 2 GiB")


class Together(Narrow):
    """The same, for a method that does not stream."""

    stream = None


@pytest.mark.parametrize("kind", [Narrow, Together])
@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_a_batch_without_memory_is_split_and_its_times_do_not_count(mixed, tmp_path, kind, error):
    session, cell = prepared(mixed, mixed.results(tmp_path / "results"), 6, lambda method: kind(method, 1, error))
    notes = Notes()
    result = run_cell(session, cell, notes)
    assert result.status == "complete" and any("memory ran out" in text for text in notes.texts)
    assert [row["index"] for row in result.rows] == list(range(6))
    assert {row["timing_valid"] for row in result.rows} == {False}
    session, cell = prepared(mixed, mixed.results(tmp_path / "whole"), 6)
    undisturbed = run_cell(session, cell, Silent())
    assert {row["timing_valid"] for row in undisturbed.rows} == {True}
    assert [{k: row[k] for k in SAME} for row in result.rows] == [{k: row[k] for k in SAME} for row in undisturbed.rows]


@pytest.mark.parametrize("kind", [Narrow, Together])
def test_a_sample_that_is_too_large_alone_is_an_error_row(mixed, tmp_path, kind):
    session, cell = prepared(mixed, mixed.results(tmp_path / "results"), 3, lambda method: kind(method, 0))
    result = run_cell(session, cell, Silent())
    assert result.status == "failed" and len(result.rows) == 3
    assert all("out of memory" in row["error"] and not row["timing_valid"] for row in result.rows)


def test_a_method_that_ends_without_an_answer_leaves_error_rows(mixed, tmp_path):
    class Silently(Fragile):
        def stream(self, entries, clock, batch_size):
            for _ in entries:
                return
            yield

    session, cell = prepared(mixed, mixed.results(tmp_path / "results"), 3, lambda method: Silently(method, ""))
    result = run_cell(session, cell, Silent())
    assert result.status == "failed" and len(result.rows) == 3 and "without an answer" in result.error


# Prompts of seven samples, and what the phases and the harness cost, in milliseconds.
PROMPTS = {f"s{n}": [40 + n] * (5 + 3 * n) for n in range(7)}
COSTS = {"prefill": 100.0, "step": 10.0, "sample": 1.0}
ENCODING, GRADING = 3_000.0, 50_000.0


def timed_answers(bench, width: int) -> list:
    """Seven answers under a clock that only phases, encoding and grading move on."""
    from flashmem_bench.methods.base import BuildContext
    from flashmem_bench.methods.vanilla import build
    from flashmem_bench.settings import Settings

    generation = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": 1}
    clock = FakeClock(COSTS)

    def encode(sample: Sample) -> Prompt:
        clock.advance(ENCODING)
        return Prompt(PROMPTS[sample.sample_id], truncated=False, beyond=False)

    stream = SampleStream(
        build(BuildContext(bench.backbone, bench.suites["hops"], Settings(), generation)),
        clock,
        width,
        prompt=encode,
        fits=lambda prompt: None,
        seed=lambda sample: 0,
        stopped=lambda: False,
        peak=PeakMemory(bench.backbone),
    )
    found = []
    for answer in stream.answers([(n, Sample(f"s{n}", "", "", "", None, {})) for n in range(7)]):
        clock.advance(GRADING)
        found.append(answer)
    return found


def simulated(lengths: list[int], width: int) -> dict[int, tuple[float, float]]:
    """Of each sample the times to its first and to its last token, by the rules of the loop and nothing else."""
    waiting, seated, now, found = list(range(len(lengths))), {}, 0.0, {}
    begun, first = {}, {}
    while waiting or seated:
        before = list(seated)
        for number in [waiting.pop(0) for _ in range(min(width - len(seated), len(waiting)))]:
            seated[number], begun[number] = lengths[number], now
        now += COSTS["prefill"] * (len(seated) > len(before)) + COSTS["step"] * bool(before) + COSTS["sample"]
        for number in list(seated):
            first.setdefault(number, now)
            seated[number] -= 1
            if not seated[number]:
                del seated[number]
                found[number] = first[number] - begun[number], now - begun[number]
    return found


@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_encoding_and_grading_are_in_nobodys_time(bench, width):
    answers = timed_answers(bench, width)
    lengths = {answer.index: answer.generation.output_tokens for answer in answers}
    assert len(lengths) == 7 and len(set(lengths.values())) > 2
    expected = simulated([lengths[n] for n in range(7)], width)
    for answer in answers:
        timing = answer.timing
        assert (timing.ttft_ms, timing.e2e_ms) == pytest.approx(expected[answer.index])
        assert timing.prefill_ms == pytest.approx(COSTS["prefill"]), "its own prefill, not those of others"
        assert timing.decode_ms == pytest.approx(timing.e2e_ms - timing.prefill_ms)
        assert timing.sample_ms == pytest.approx(COSTS["sample"] * lengths[answer.index])
        assert timing.step_ms >= COSTS["step"] * (lengths[answer.index] - 1)
        if width == 1:
            own = COSTS["prefill"] + COSTS["step"] * (lengths[answer.index] - 1) + timing.sample_ms
            assert timing.e2e_ms == pytest.approx(own) and timing.unaccounted_share == pytest.approx(0)


def test_a_clock_stands_still_once_however_often_it_is_paused():
    clock = FakeClock({"step": 5.0})
    clock.start()
    clock.begin([0])
    with clock.phase("step"):
        pass
    with clock.paused():
        clock.advance(70)
        with clock.paused():
            clock.advance(900)
    with clock.phase("step"):
        pass
    clock.token()
    clock.end(0)
    assert clock.timing_of(0, 1).e2e_ms == clock.result(1).e2e_ms == 10.0
    assert clock.result(1).step_ms == 10.0


def test_the_peak_of_a_batch_belongs_to_those_who_were_in_it(bench):
    """A device is not needed to add up peaks."""

    class Peaks(PeakMemory):
        def __init__(self):
            self.values = iter([500, 200, 900, 100, 100, 100, 100])

        def reset(self):
            pass

        def read(self):
            return next(self.values)

    order = ["a", "b", "c"]

    class Scripted:
        """Two seats: b outlives a and c."""

        def stream(self, entries, clock, batch_size):
            from flashmem.generation import Generation

            entries = iter(entries)
            next(entries), next(entries)
            clock.begin([0, 1])
            clock.token()
            for number in (0, 2, 1):
                if number == 2:
                    next(entries)
                    clock.begin([2])
                    clock.token()
                clock.end(number)
                yield number, Generation(prompt_tokens=1, token_ids=[1])

    stream = SampleStream(
        Scripted(),
        FakeClock(),
        2,
        prompt=lambda sample: Prompt([1], truncated=False, beyond=False),
        fits=lambda prompt: None,
        seed=lambda sample: 0,
        stopped=lambda: False,
        peak=Peaks(),
    )
    answers = list(stream.answers([(n, Sample(name, "", "", "", None, {})) for n, name in enumerate(order)]))
    assert {answer.sample.sample_id: answer.peak_alloc_bytes for answer in answers} == {"a": 500, "c": 200, "b": 900}


def test_what_an_axis_will_take_is_told_from_rows_of_its_batch_size(bench, tmp_path):
    from flashmem_bench.ablation_training import Schedule
    from flashmem_bench.ablations import get_axis, points
    from flashmem_bench.sweeps import Sweep, cost_sentence

    results, axis = bench.results(tmp_path / "results"), get_axis("monitor-threshold")
    sweep = Sweep(axis, points(axis, ("0.5", "1.5")), Schedule(), (0,))
    request = bench.request(results, "hops", "flashmem", limit=60_000, batch_size=2)
    bench.run(results, "hops", "vanilla", limit=3)
    assert "minutes" not in cost_sentence(request, sweep)
    (batched,) = bench.run(results, "hops", "vanilla", limit=4, batch_size=2)
    share = sum(row["e2e_ms"] for row in batched.rows) / 4 / 2
    assert f"about {len(sweep.points) * 60_000 * share / 6e4:.1f} minutes" in cost_sentence(request, sweep)
