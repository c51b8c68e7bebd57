"""The claims and `compare`: verdicts on made-up cells whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashmem_bench import claims
from flashmem_bench.cli import run as command
from flashmem_bench.errors import DataError
from flashmem_bench.lines import encode
from flashmem_bench.registry import method_names
from flashmem_bench.report.cells import load_cells
from flashmem_bench.report.claims import claim_records
from flashmem_bench.report.entropy_falls import fall, falls, replay
from flashmem_bench.store import ResultStore
from tests.synthetic_results import add_cell, make_results

RIVALS = {"memgen": 0.6, "memgen-noop-memory": 0.33, "lora-sft": 0.45, "prompt-tuning": 0.4}


def answers(store: ResultStore, latency=(), **more) -> dict[tuple[str, str | None], dict]:
    return {(r["id"], r["suite"]): r for r in claim_records(load_cells(store), latency, **more)}


def scores(store: ResultStore, method: str, values, suite: str = "hops", **changes) -> None:
    """A cell with exactly these scores."""
    cell = add_cell(store, suite, method, len(values), chance=0.5, **changes)
    lines = (cell.path / "samples.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "score": float(value)} for line, value in zip(lines, values, strict=True)]
    (cell.path / "samples.jsonl").write_bytes(b"".join(encode(row) for row in rows))


def right(count: int, n: int = 400, start: int = 0) -> list[int]:
    return [int(start <= i < start + count) for i in range(n)]


def test_every_claim_is_answered_for_every_suite(tmp_path: Path) -> None:
    store = make_results(tmp_path, methods=["vanilla", "flashmem"])
    found = answers(store)
    stated = claims.load_claims()
    for claim in stated:
        suites = [None] if claim.test == "faster" else ["wordmath", "hops"]
        for suite in suites:
            assert found[claim.id, suite]["verdict"] in ("supported", "not supported", "cannot tell")
    for name in ("parity-memgen", "content", "entropy-falls", "one-layer"):
        row = found[name, "hops"]
        assert row["verdict"] == "cannot tell" and row["estimate"] is None and "no " in row["why"]


def test_claims_name_methods_that_exist() -> None:
    names = set(method_names())
    for claim in claims.load_claims():
        assert {claim.a, *claim.b, *claim.assay, *claim.beside} <= names, claim.id


def test_better_needs_every_rival_and_a_p_value_that_survives(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    scores(store, "vanilla", right(200))
    scores(store, "flashmem", right(260))
    for method in ("random", "shuffled", "mean"):
        scores(store, f"flashmem-{method}-memory", right(200))
    scores(store, "flashmem-noop-memory", right(260))
    found = answers(store)
    assert found["beats-vanilla", "hops"]["verdict"] == "supported"
    row = found["content", "hops"]
    assert row["verdict"] == "not supported" and row["b"] == "flashmem-noop-memory"
    assert "flashmem-random-memory +15.0" in row["why"]
    scores(store, "lora-sft", [*right(254), *right(0, 0)])
    small = answers(store)["better-than-lora", "hops"]
    assert small["low"] > 0 and small["p_adjusted"] > 0.05
    assert small["verdict"] == "cannot tell" and "after adjustment" in small["why"]


@pytest.mark.parametrize(
    ("rival", "noop", "verdict", "why"),
    [
        (right(265), right(200), "supported", "no more than"),
        (right(330), right(200), "not supported", "lower"),
        (right(200), right(190), "cannot tell", "has no effect here"),
        (right(265), right(265), "cannot tell", "has no effect here"),
        (right(210), right(100), "cannot tell", "more than half"),
    ],
)
def test_parity_counts_only_where_the_rival_is_worth_something(tmp_path: Path, rival, noop, verdict, why) -> None:
    store = ResultStore(tmp_path)
    scores(store, "vanilla", right(200))
    scores(store, "flashmem", right(266))
    scores(store, "memgen", rival)
    scores(store, "memgen-noop-memory", noop)
    row = answers(store)["parity-memgen", "hops"]
    assert (row["verdict"], why in row["why"]) == (verdict, True), row["why"]


def test_an_assay_that_was_not_run_leaves_parity_open(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for method, count in (("vanilla", 200), ("flashmem", 266), ("memgen", 265)):
        scores(store, method, right(count))
    row = answers(store)["parity-memgen", "hops"]
    assert row["verdict"] == "cannot tell" and "memgen-noop-memory" in row["why"]


def test_no_harm_counts_what_was_right_and_sets_nothing_off(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    scores(store, "vanilla", right(200))
    scores(store, "flashmem", right(200, start=20))
    row = answers(store)["no-harm", "hops"]
    assert row["estimate"] == pytest.approx(0.1) and row["verdict"] == "not supported" and row["n"] == 200
    scores(store, "vanilla", [0.5] * 300, suite="wordmath")
    scores(store, "flashmem", [0.5] * 150 + [0.4] * 150, suite="wordmath")
    graded = answers(store)["no-harm", "wordmath"]
    assert graded["estimate"] == pytest.approx(0.1)
    assert "150 of 300 answers" in graded["why"]


def test_training_seeds_are_in_the_interval(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    scores(store, "vanilla", right(200))
    for seed, count in enumerate((210, 260, 310)):
        scores(store, "flashmem", right(count), train_seed=seed)
    row = answers(store)["beats-vanilla", "hops"]
    alone = 60 / 400
    assert row["seeds"] == 3 and row["estimate"] == pytest.approx(alone)
    assert row["high"] - row["low"] > 0.12, "the spread of the seeds is wider than that of the samples"
    scores(store, "flashmem-random-trigger", right(200), train_seed=1)
    alone = answers(store)["moments-random", "hops"]
    assert alone["seeds"] == 1 and alone["estimate"] == pytest.approx(60 / 400), "run is paired with run by its memory"


def test_five_times_as_fast_is_never_said_of_a_cpu(tmp_path: Path) -> None:
    store = make_results(tmp_path, methods=["vanilla", "flashmem"])

    def timed(device: str, ratio: float) -> list[dict]:
        base = {"model": "m", "device": device, "dtype": "float32", "exec": "eager", "context": 65536}
        return [
            {**base, "method": method, "run": run, "e2e_ms": 100.0 * factor * (1 + run / 100)}
            for method, factor in (("flashmem", 1.0), ("memgen", ratio))
            for run in range(6)
        ]

    assert answers(store, timed("cuda", 6.0))["faster-memgen", None]["verdict"] == "supported"
    assert answers(store, timed("cuda", 4.0))["faster-memgen", None]["verdict"] == "not supported"
    on_cpu = answers(store, timed("cpu", 9.0))["faster-memgen", None]
    assert on_cpu["verdict"] == "cannot tell" and on_cpu["estimate"] == pytest.approx(9.0)
    assert answers(store, timed("cuda", 6.0))["faster-memgen-cached", None]["verdict"] == "cannot tell"


def test_one_layer_is_compared_with_the_best_other_depth(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    scores(store, "vanilla", right(150))
    for value, count in (("1", 260), ("2", 240), ("6", 262)):
        mark = {"axis": "consolidator-depth", "value": value, "reference": value == "1"}
        settings = {"memory.depth": int(value)}
        scores(store, "flashmem-prompt-end", right(count), ablation=[mark], settings=settings)
    row = answers(store)["one-layer", "hops"]
    assert row["b"] == "consolidator-depth 6" and row["estimate"] == pytest.approx(-2 / 400)
    assert row["verdict"] == "supported"


def test_margins_are_those_of_the_day_on_which_the_folder_was_begun(tmp_path: Path) -> None:
    claims.pin(tmp_path, "2026-01-01T00:00:00+00:00")
    document = json.loads((tmp_path / claims.PINNED).read_text())
    document["margins"]["no-harm"] = 0.2
    (tmp_path / claims.PINNED).write_text(json.dumps(document))
    claims.pin(tmp_path, "2026-02-02T00:00:00+00:00")
    margins, at = claims.pinned(tmp_path)
    assert margins["no-harm"] == 0.2 and at == "2026-01-01T00:00:00+00:00"
    store = ResultStore(tmp_path)
    scores(store, "vanilla", right(200))
    scores(store, "flashmem", right(200, start=20))
    row = answers(store, margins=margins, at=at)["no-harm", "hops"]
    assert row["verdict"] == "supported" and row["margin"] == 0.2 and row["margin_fixed_at"] == at


def test_a_folder_that_has_runs_already_fixes_no_margin(tmp_path: Path) -> None:
    make_results(tmp_path, suites=["hops"], methods=["vanilla"], n=3)
    claims.pin(tmp_path, "2026-01-01T00:00:00+00:00")
    assert claims.pinned(tmp_path) == ({}, None)


@pytest.mark.parametrize("broken", [{"test": "sorcery"}, {"colour": "red"}, {"id": "twice"}])
def test_a_broken_claims_file_is_refused(broken: dict) -> None:
    good = {"id": "once", "says": "x", "source": "y", "test": "better", "a": "flashmem", "b": ["vanilla"]}
    entries = [{**good, **broken}, {**good, "id": "twice"}]
    with pytest.raises(DataError, match=r"claims\.yaml"):
        claims.claims_of({"margin": 0.02, "claims": entries})


def test_a_replayed_trigger_keeps_cooldown_and_cap() -> None:
    entropies = [3.0, 3.0, 0.0, 3.0, 3.0, 3.0, 3.0]
    assert replay(entropies, 2.0, cooldown=0, most=None) == [0, 1, 3, 4, 5, 6]
    assert replay(entropies, 2.0, cooldown=3, most=None) == [0, 3, 6]
    assert replay(entropies, 2.0, cooldown=3, most=2) == [0, 3]
    assert replay(entropies, None, cooldown=0, most=None) == []


def test_falls_by_hand() -> None:
    assert falls([4.0, 1.0, 3.0], [0, 2]) == [2.0]
    assert falls([5.0] + [1.0] * 10 + [9.0] * 20, [0]) == [4.0], "ten steps and no more"


def test_regression_to_the_mean_is_no_fall(tmp_path: Path) -> None:
    """Both arms have high steps followed by lower ones; only the arm whose later steps are lower still has a fall."""
    store = ResultStore(tmp_path)
    for method in ("flashmem", "flashmem-watch"):
        add_cell(store, "hops", method, 40, settings={"trigger": {"cooldown": 4, "max_injections": 8}}, threshold=2.0)

    def rewrite(cell, change: float, fired: bool) -> None:
        path = cell.store.path / "texts.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for number, record in enumerate(records):
            record["entropies"] = [3.0 + number / 100, *[1.0 + number / 200 - change] * 6]
            record["triggers"] = [{"text_index": 0}] if fired else []
        path.write_bytes(b"".join(encode(record) for record in records))

    def found(change: float):
        cells = {cell.method: cell for cell in load_cells(store)}
        rewrite(cells["flashmem"], change, True)
        rewrite(cells["flashmem-watch"], 0.0, False)
        cells = {cell.method: cell for cell in load_cells(store)}
        return fall(cells["flashmem"], cells["flashmem-watch"])

    assert found(0.0).interval.estimate == pytest.approx(0.0) and found(0.0).memory > 1.9
    assert found(0.5).interval.estimate == pytest.approx(0.5) and found(0.5).n == 40


def test_the_method_as_it_is_stands_for_itself(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    scores(store, "vanilla", right(200))
    scores(store, "flashmem", right(300), settings={"trigger.kind": "prompt-end"})
    scores(store, "flashmem", right(220, 300))
    assert answers(store)["beats-vanilla", "hops"]["estimate"] == pytest.approx(20 / 300)


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ResultStore(tmp_path)
    scores(store, "vanilla", right(200))
    scores(store, "flashmem", right(240))
    line = ["compare", "flashmem", "vanilla", "--suite", "hops", "--results-dir", str(tmp_path), "--margin", "0.02"]
    assert command(line) == 0
    out = capsys.readouterr().out
    assert "60.0 % against vanilla 50.0 % on 400 samples" in out
    assert (
        "40 answers fixed, 0 broken, of 400; " in out
        and "equal texts" in out
        and "no worse by more than 2.0 %: yes" in out
    )
    assert "CPU timing" in out
    assert command([*line, "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["difference"][0] == pytest.approx(0.1) and document["no_worse"] is True
    cell = next(c for c in load_cells(store) if c.method == "vanilla")
    assert command(["compare", cell.cell_id[:8], "flashmem", *line[3:]]) == 0
    assert "no, it is worse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["flashmem", "memgen"], "run --suite hops --method memgen"),
        (["flashmem", "vanilla", "--margin", "2"], "a share of the score"),
        (["flashmem", "vanilla", "--margin", "-1"], "above 0"),
    ],
)
def test_compare_says_what_is_missing(tmp_path: Path, capsys, arguments, sentence) -> None:
    make_results(tmp_path, suites=["hops"], methods=["vanilla", "flashmem"], n=5)
    assert command(["compare", *arguments, "--suite", "hops", "--results-dir", str(tmp_path)]) in (1, 2)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"batch_size": 8}, {"exec": "graph", "settings": {"exec": "graph"}}])
def test_compare_takes_cells_of_one_batch_size_and_one_execution(tmp_path: Path, capsys, other) -> None:
    store = ResultStore(tmp_path)
    scores(store, "vanilla", right(20, 40))
    scores(store, "flashmem", right(25, 40), **other)
    line = ["compare", "flashmem", "vanilla", "--suite", "hops", "--results-dir", str(tmp_path)]
    assert command(line) == 1
    said = capsys.readouterr().err
    assert "batch 1, eager" in said and "run one of them as the other was" in said
    assert answers(store)["beats-vanilla", "hops"]["why"] == "no run of vanilla to compare with"
    scores(store, "vanilla", right(22, 40), **other)
    assert command([*line, "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["difference"][0] == pytest.approx(3 / 40) and document["unequal"] is None
    assert (document["batch_size"], document["exec"]) == (other.get("batch_size", 1), other.get("exec", "eager"))
    assert command(line) == 0
    assert ("time of a sample in a batch of 8: " in capsys.readouterr().out) == ("batch_size" in other)
    assert answers(store)["beats-vanilla", "hops"]["estimate"] == pytest.approx(3 / 40)


def test_a_claim_is_answered_by_the_run_that_has_its_rivals_beside_it(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    scores(store, "flashmem", right(300), train_seed=0)
    scores(store, "flashmem", right(310), train_seed=1)
    scores(store, "flashmem", right(260), batch_size=8)
    scores(store, "vanilla", right(200), batch_size=8)
    row = answers(store)["beats-vanilla", "hops"]
    assert row["estimate"] == pytest.approx(60 / 400) and row["seeds"] in (1, None)


def test_an_axis_at_two_batch_sizes_keeps_its_points_apart(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    scores(store, "vanilla", right(150))
    for size, counts in ((1, (260, 240)), (8, (100, 390))):
        for value, count in zip(("1", "2"), counts, strict=True):
            mark = {"axis": "consolidator-depth", "value": value, "reference": value == "1"}
            settings = {"memory.depth": int(value)}
            scores(store, "flashmem-prompt-end", right(count), ablation=[mark], settings=settings, batch_size=size)
    row = answers(store)["one-layer", "hops"]
    assert row["estimate"] in (pytest.approx(20 / 400), pytest.approx(-290 / 400))


def test_unequal_cells_are_compared_only_on_request(tmp_path: Path, capsys) -> None:
    store = ResultStore(tmp_path)
    scores(store, "vanilla", right(20, 40))
    scores(store, "flashmem", right(25, 40), dtype="bfloat16")
    line = ["compare", "flashmem", "vanilla", "--suite", "hops", "--results-dir", str(tmp_path)]
    assert command(line) == 1 and "--allow-unequal" in capsys.readouterr().err
    assert command([*line, "--allow-unequal"]) == 0
    assert "not under the same conditions" in capsys.readouterr().out
