"""The runner: killed cells continue to the same table, cells extend, errors and interruptions lose nothing."""

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

import psutil
import pytest
import torch

from flashmem.errors import FlashMemError
from flashmem.integrity import sealed
from flashmem.memory import load_memory
from flashmem_bench.checkpoints import find_checkpoint
from flashmem_bench.clock import FakeClock
from flashmem_bench.errors import MissingCheckpointError, UsageError
from flashmem_bench.interrupts import Interrupted, Stop, interruptible
from flashmem_bench.prepare import prepare
from flashmem_bench.rows import make_prompt, trigger_hits
from flashmem_bench.runner import run_cell
from flashmem_bench.session import Session
from flashmem_bench.store import ResultStore
from tests.test_own_suite import JSONL, YAML

# What may differ between two runs of the same cell: clocks, which start made the row, and who answered.
_VARYING = ("_ms", "started_at", "attempt", "overhead_share", "worker", "workers", "timing_valid")


def table(results: Path) -> list[dict]:
    """Rows of all cells without what may differ between two runs."""
    rows = [row for cell in ResultStore(results).cells() for row in sorted(cell.rows(), key=lambda row: row["index"])]
    return [{key: value for key, value in row.items() if not key.endswith(_VARYING)} for row in rows]


def texts(results: Path) -> dict[str, str]:
    return {name: text["text"] for cell in ResultStore(results).cells() for name, text in cell.texts().items()}


def command(bench, results: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "flashmem_bench.cli", "run", "--suite", "hops", "--method", "flashmem", "--model",
            str(bench.model), "--results-dir", str(results), "--limit", "14", "--quiet", *more]  # fmt: skip


def environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}


def lines(results: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in results.glob("runs/*/*/*/samples.jsonl"))


def kill_after(bench, results: Path, rows: int, *more: str) -> None:
    """Start the real command and kill it as soon as that many rows are there; its workers end by themselves."""
    process = subprocess.Popen(command(bench, results, *more), env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while lines(results) < rows and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # Nobody reaps orphans in a container without an init process: those that wait for it have ended.
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert all(worker.status() == psutil.STATUS_ZOMBIE for worker in alive)


def test_killed_three_times_gives_the_table_of_an_undisturbed_run(bench, tmp_path, tally):
    whole, killed = bench.results(tmp_path / "whole"), bench.results(tmp_path / "killed")
    subprocess.run(command(bench, whole), env=environment(), check=True)
    for rows, workers in ((3, "2"), (7, "1"), (11, "2")):
        kill_after(bench, killed, rows, "--workers", workers)
        assert rows <= lines(killed) <= 14
    subprocess.run(command(bench, killed), env=environment(), check=True)
    missing = texts(whole).keys() - texts(killed).keys()
    wrong = sum(row not in table(whole) for row in table(killed)) + (texts(killed) != texts(whole))
    tally("SIGKILL of the command line", 3, lost=len(missing), wrong=wrong)
    assert table(killed) == table(whole)
    (cell,) = ResultStore(killed).cells()
    assert len(cell.rows()) == 14 and lines(killed) >= 14
    assert [attempt["workers"] for attempt in cell.manifest["attempts"]] == [2, 1, 2, 1]
    assert cell.manifest["summary"]["status"] == "complete"
    assert len({row["attempt"] for row in cell.rows()}) > 1


def test_running_again_adds_nothing_and_a_larger_limit_extends(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    (first,) = bench.run(results, "hops", "vanilla", limit=3)
    (again,) = bench.run(results, "hops", "vanilla", limit=3)
    assert (first.new_samples, again.new_samples) == (3, 0)
    (more,) = bench.run(results, "hops", "vanilla", limit=5)
    assert more.new_samples == 2 and more.cell == first.cell
    assert [row["index"] for row in more.rows] == [0, 1, 2, 3, 4]
    (less,) = bench.run(results, "hops", "vanilla", limit=2)
    assert len(less.rows) == 2 and less.new_samples == 0


def test_settings_and_seed_name_other_cells(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    cells = [
        bench.run(results, "hops", "flashmem", limit=1, **more)[0].cell
        for more in ({}, {"seed": 1}, {"settings": {"trigger.percentile": 50.0}}, {"settings": {"trigger.cooldown": 1}},
                     {"batch_size": 2}, {"settings": {"trigger.interval": 5}})
    ]  # fmt: skip
    assert len(set(cells)) == 5
    assert cells[0] == cells[5], "a setting that the trigger does not read must not name another cell"
    vanilla = [bench.run(results, "hops", "vanilla", limit=1, settings=s)[0].cell for s in ({}, {"monitor.sinks": 0})]
    assert vanilla[0] == vanilla[1]


def test_a_changed_suite_prompt_or_checkpoint_names_another_cell(bench, tmp_path, monkeypatch):
    results, mine = bench.results(tmp_path / "results"), tmp_path / "sums.yaml"
    memory = results / "checkpoints" / bench.model.name / "joint" / "flashmem" / "seed0"

    def cell(suite=YAML, rows=JSONL, checkpoint=memory):
        mine.write_text(suite)
        (tmp_path / "sums.jsonl").write_text(rows)
        more = {"checkpoint": str(checkpoint), "settings": {"trigger.threshold": 0.5}}
        session = Session(bench.request(results, str(mine), "flashmem", **more), bench.backbone)
        return prepare(session, str(mine), "flashmem").cell

    changed = load_memory(memory, bench.backbone)
    with torch.no_grad():
        next(changed.parameters())[0] += 1e-3
    changed.save_pretrained(tmp_path / "changed", changed.metadata)
    shutil.copytree(memory, tmp_path / "copied")
    first = cell()
    assert cell() == first and cell(checkpoint=tmp_path / "copied") == first, "neither a path nor a time names a cell"
    others = [
        cell(suite=YAML.replace("End with", "Begin with")),
        cell(rows=JSONL.replace("3 pens", "8 pens")),
        cell(checkpoint=tmp_path / "changed"),
    ]
    monkeypatch.setattr(bench.backbone.tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    assert len({first, *others, cell()}) == 5


def test_batches_give_the_same_answers_and_stop_at_the_limit(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    (one,) = bench.run(results, "hops", "flashmem", limit=5)
    (four,) = bench.run(results, "hops", "flashmem", limit=5, batch_size=4)
    assert [row["index"] for row in four.rows] == [0, 1, 2, 3, 4]
    keys = ("sample_id", "output_tokens", "triggers", "score", "answer_extracted")
    assert [[row[k] for k in keys] for row in one.rows] == [[row[k] for k in keys] for row in four.rows]
    (more,) = bench.run(results, "hops", "flashmem", limit=6, batch_size=4)
    assert more.new_samples == 1


class Grumpy:
    """A method that fails on some samples."""

    def __init__(self, inner, bad, error):
        self.inner, self.bad, self.error = inner, bad, error

    def generate(self, prompts, samples, clock, seed):
        if samples[0].sample_id in self.bad:
            raise self.error
        return self.inner.generate(prompts, samples, clock, seed)

    def warm_up(self, prompt, sample):
        self.inner.warm_up(prompt, sample)

    def batch_key(self, sample):
        return self.inner.batch_key(sample)


def prepared(bench, results, limit, wrap=lambda method: method):
    session = Session(bench.request(results, "hops", "vanilla", limit=limit), bench.backbone, bench.suites)
    cell = prepare(session, "hops", "vanilla")
    build = cell.spec.build
    cell.spec = dataclasses.replace(cell.spec, build=lambda context: wrap(build(context)))
    return session, cell


def test_a_failing_sample_becomes_a_row_and_is_tried_again(bench, tmp_path):
    from flashmem_bench.progress import Silent

    results = bench.results(tmp_path / "results")
    bad = {bench.suites["hops"].samples()[1].sample_id}
    session, cell = prepared(bench, results, 3, lambda m: Grumpy(m, bad, FlashMemError("this one is too long")))
    result = run_cell(session, cell, Silent())
    assert result.status == "partial" and result.error == "this one is too long"
    assert [row["error"] is None for row in result.rows] == [True, False, True]
    assert result.rows[1]["score"] is None and result.rows[1]["prompt_tokens"] > 0
    session, cell = prepared(bench, results, 3)
    result = run_cell(session, cell, Silent())
    assert result.status == "complete" and result.new_samples == 1
    assert [row["index"] for row in sorted(result.rows, key=lambda row: row["index"])] == [0, 1, 2]


def test_interruption_finishes_the_sample_and_continues(bench, tmp_path):
    from flashmem_bench.progress import Silent

    class Pressed(Grumpy):
        def generate(self, prompts, samples, clock, seed):
            stop.asked = samples[0].sample_id in self.bad
            return self.inner.generate(prompts, samples, clock, seed)

    results, stop = bench.results(tmp_path / "results"), Stop()
    second = {bench.suites["hops"].samples()[1].sample_id}
    session, cell = prepared(bench, results, 4, lambda method: Pressed(method, second, None))
    with pytest.raises(Interrupted):
        run_cell(session, cell, Silent(), stop)
    (stored,) = ResultStore(results).cells()
    assert len(stored.rows()) == 2 and stored.manifest["summary"]["status"] == "partial"
    session, cell = prepared(bench, results, 4)
    assert run_cell(session, cell, Silent()).new_samples == 2


def test_whoever_is_stopped_after_the_last_sample_has_a_complete_cell(bench, tmp_path):
    from flashmem_bench.progress import Silent
    from flashmem_bench.report.cells import load_cells

    class Last(Silent):
        def advance(self, row):
            stop.asked = row["index"] == 1

    results, stop = bench.results(tmp_path / "results"), Stop()
    session, cell = prepared(bench, results, 2)
    with pytest.raises(Interrupted):
        run_cell(session, cell, Last(), stop)
    (stored,) = ResultStore(results).cells()
    whole = stored.manifest
    assert whole["summary"]["status"] == "complete" and load_cells(ResultStore(results))[0].status == "complete"

    # Killed between its last row and its summary.
    (attempt,) = whole["attempts"]
    stored.amend(summary={}, attempts=[{key: value for key, value in attempt.items() if key != "finished_at"}])
    assert load_cells(ResultStore(results))[0].status == "partial"
    session, cell = prepared(bench, results, 1)
    run_cell(session, cell, Silent())
    assert load_cells(ResultStore(results))[0].status == "partial", "a smaller limit says nothing of the rest"
    session, cell = prepared(bench, results, 2)
    assert run_cell(session, cell, Silent()).new_samples == 0
    settled = stored.manifest
    assert settled["summary"] == whole["summary"] and settled["attempts"][0]["killed"]
    assert load_cells(ResultStore(results))[0].status == "complete"
    run_cell(session, cell, Silent())
    assert stored.manifest == settled, "nothing is written where nothing is new"


def test_what_another_process_finished_meanwhile_is_not_answered_again(bench, tmp_path):
    from flashmem_bench.progress import Silent

    class Meanwhile(Silent):
        def start(self, title, total, done):
            run_cell(*prepared(bench, results, 3), Silent())

    results = bench.results(tmp_path / "results")
    result = run_cell(*prepared(bench, results, 3), Meanwhile())
    assert result.new_samples == 0 and result.status == "complete"
    assert lines(results) == 3 and len(ResultStore(results).cells()[0].manifest["attempts"]) == 1


def test_first_interrupt_asks_second_one_stops():
    with pytest.raises(KeyboardInterrupt), interruptible() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        signal.raise_signal(signal.SIGINT)


def test_missing_memory_names_the_commands(bench, tmp_path):
    with pytest.raises(MissingCheckpointError) as caught:
        bench.run(tmp_path / "empty", "hops", "vanilla,flashmem", limit=1)
    assert "flashmem-bench train --method flashmem --suite hops --model" in str(caught.value)
    assert "flashmem-bench calibrate --suite hops --model" in str(caught.value)
    assert not ResultStore(tmp_path / "empty").cells(), "nothing runs before everything is found"


def test_harmful_checkpoint_is_not_a_default(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    config = results / "checkpoints" / bench.model.name / "joint" / "flashmem" / "seed0" / "config.json"
    record = json.loads(config.read_text())
    record["metadata"]["harm"] = 0.031
    config.write_text(json.dumps(sealed(record)))
    with pytest.raises(MissingCheckpointError, match=r"breaks 3\.1% of the validation samples"):
        bench.run(results, "hops", "flashmem", limit=1)
    (named,) = bench.run(results, "hops", "flashmem", limit=1, checkpoint=str(config.parent))
    assert named.status == "complete"
    record["metadata"]["provisional"] = True
    config.write_text(json.dumps(sealed(record)))
    found = find_checkpoint(results, str(bench.model), "hops", "flashmem")
    assert found.path == config.parent and "provisional: on hops it breaks 3.1%" in found.notes[0]


def test_foreign_checkpoint_and_threshold_are_refused(bench, tmp_path):
    from flashmem.errors import CheckpointError

    results = bench.results(tmp_path / "results")
    config = results / "checkpoints" / bench.model.name / "joint" / "flashmem" / "seed0" / "config.json"
    record = json.loads(config.read_text())
    config.write_text(json.dumps(sealed({**record, "backbone": {**record["backbone"], "fingerprint": "0" * 16}})))
    with pytest.raises(CheckpointError, match="was trained for"):
        bench.run(results, "hops", "flashmem", limit=1)
    threshold = results / "thresholds" / bench.model.name / "hops" / "attention-entropy.json"
    threshold.write_text(json.dumps(sealed({**json.loads(threshold.read_text()), "fingerprint": "0" * 16})))
    with pytest.raises(CheckpointError, match="calibrated for another backbone"):
        bench.run(results, "hops", "flashmem", limit=1)


def test_settings_that_contradict_method_or_checkpoint(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    with pytest.raises(UsageError, match="flashmem-prompt-end fixes"):
        bench.run(results, "hops", "flashmem-prompt-end", limit=1, settings={"trigger.kind": "always"})
    with pytest.raises(UsageError, match=r"checkpoint has memory\.length=4"):
        bench.run(results, "hops", "flashmem", limit=1, settings={"memory.length": 8})


def test_prompts_are_cut_only_when_asked(bench):
    text = "word " * 600
    positions = bench.backbone.max_positions
    assert len(make_prompt(bench.backbone, text, None, 24).ids) > positions
    left, middle = (make_prompt(bench.backbone, text, how, 24) for how in ("left", "middle"))
    full = bench.backbone.encode_chat(text)
    assert len(left.ids) == len(middle.ids) == positions - 24 and left.truncated and middle.truncated
    assert left.ids == full[-len(left.ids) :]
    assert middle.ids[:100] == full[:100] and middle.ids[-100:] == full[-100:]
    assert not make_prompt(bench.backbone, "short", "left", 24).truncated


def test_a_prompt_beyond_the_positions_is_an_error_row(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    before, bench.backbone.model.config.max_position_embeddings = bench.backbone.max_positions, 90
    try:
        (cell,) = bench.run(results, "hops", "vanilla", limit=2)
        assert cell.status == "failed" and "positions" in cell.error and "--truncate" in cell.error
        (cut,) = bench.run(results, "hops", "vanilla", limit=2, truncate="left")
        assert cut.status == "complete" and all(row["prompt_truncated"] for row in cut.rows)
    finally:
        bench.backbone.model.config.max_position_embeddings = before


def test_beyond_the_trained_context_no_score_is_valid(bench, tmp_path):
    config = bench.backbone.model.config
    config.trained_context = 50
    try:
        (cell,) = bench.run(bench.results(tmp_path / "results"), "hops", "vanilla", limit=2)
    finally:
        del config.trained_context
    assert all(row["beyond_trained_context"] and row["score_valid"] is False for row in cell.rows)
    assert all(row["score"] is not None for row in cell.rows)


def test_trigger_hits():
    moments = ("Ana twice:", "Bob twice:")
    text = "Cid: Dan\nAna twice: Eve\nBob twice: Cid"
    prefixes = ["", "Cid: Dan\nAna twice:", "Cid: Dan\nAna twice: Eve\nBob"]
    assert trigger_hits(prefixes, text, moments) == (1 / 3, 1 / 2)
    assert trigger_hits([], text, moments) == (None, 0.0)
    assert trigger_hits(["Cid:"], "Cid: Dan", moments) == (0.0, None)
    assert trigger_hits(["Joana twice: "], "Joana twice: x", ("ana twice:",)) == (0.0, None)


def test_clock_formulas():
    clock = FakeClock({"prefill": 10.0, "step": 5.0, "monitor": 1.0, "consolidate": 3.0, "inject": 2.0, "sample": 0.5})
    clock.advance(100)
    clock.start()
    with clock.phase("prefill"):
        pass
    for _ in range(3):
        with clock.phase("step"), clock.phase("monitor"):
            pass
        with clock.phase("sample"):
            pass
        clock.token()
    with clock.phase("consolidate"):
        pass
    with clock.phase("inject"):
        pass
    clock.token()
    clock.advance(50)
    timing = clock.result(4)
    assert timing.prefill_ms == 10 and timing.ttft_ms == 16.5 and timing.e2e_ms == 34.5
    assert timing.decode_ms == 24.5 and timing.tpot_ms == pytest.approx(18 / 3)
    assert (timing.monitor_ms, timing.consolidate_ms, timing.inject_ms, timing.sample_ms) == (3, 3, 2, 1.5)
    assert timing.overhead_share == pytest.approx(8 / 24.5)
    assert clock.result(1).tpot_ms is None
    clock.start()
    assert clock.result(0).e2e_ms is None and clock.result(0).overhead_share is None


def test_cuda_clock_pairs_events_and_reads_them_once(monkeypatch):
    """The logic alone: fake events stand for a device."""
    import torch

    from flashmem_bench.clock import CudaEventClock

    now, calls = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at = None

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            assert calls[-1:] == ["sync"], "read before the synchronise"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("sync"))
    clock = CudaEventClock(pairs=3)
    for _ in range(2):
        clock.start()
        calls.clear()
        for milliseconds in (4.0, 5.0):
            with clock.phase("step"), clock.phase("monitor"):
                now[0] += milliseconds
        assert calls == [], "no synchronise in the loop"
        clock.token()
        timing = clock.result(1)
        assert timing.monitor_ms == 9.0 and clock.phase_ms("step") == 9.0 and timing.prefill_ms == 0.0
        assert calls == ["sync"]
    assert clock.pool_misses == 1
    # What is recorded in the middle of a phase is not in it, nor in the token's time.
    clock.start()
    with clock.phase("step"):
        now[0] += 1.0
        with clock.paused():
            now[0] += 500.0
        now[0] += 2.0
    calls.clear()
    assert clock.phase_ms("step") == 2.0 and calls == ["sync"]
