"""Traces and their pages: rows stay as they are, files stay in their folder, text of models stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from flashmem_bench.cli import run as command
from flashmem_bench.errors import BenchError, StoreError
from flashmem_bench.report.cells import load_cells
from flashmem_bench.report.stories import write_stories
from flashmem_bench.report.story_charts import shown
from flashmem_bench.report.story_views import history_of, probability
from flashmem_bench.store import ResultStore
from flashmem_bench.tracing import TRACE_VERSION, read_traces, trace_cells, trace_path
from tests.synthetic_results import add_cell
from tests.test_report import Structure

EVIL = "<script>alert('x')</script>"


def run_traced(bench, results: Path, suites: str, methods: str, count: int, **more) -> list[Path]:
    """Run a grid on the shared random backbone, then trace it as the command does."""
    from flashmem_bench.runner import run_grid
    from flashmem_bench.session import Session

    request = bench.request(results, suites, methods, **more)
    session = Session(request, bench.backbone, bench.suites)
    return trace_cells(session, run_grid(request, session=session), count)


def snapshot(results: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in results.glob("runs/*/*/*/*.jsonl")}


def test_command_traces_finished_cells_and_changes_no_row(tmp_path, capsys):
    """On the bundled backbone, from the run to the page."""
    results = tmp_path / "results"
    line = ["run", "--suite", "hops-list", "--method", "flashmem-prompt-end", "--results-dir", str(results), "--json"]
    assert command([*line, "--limit", "2", "--quiet"]) == 0
    before = snapshot(results)
    assert "traces" not in json.loads(capsys.readouterr().out.splitlines()[-1])
    assert command([*line, "--limit", "2", "--quiet", "--trace"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert snapshot(results) == before and document["cells"][0]["new_samples"] == 0
    first, second = [Path(path) for path in document["traces"]]
    stamps = [path.stat().st_mtime_ns for path in (first, second)]
    assert command([*line, "--limit", "2", "--quiet", "--trace-samples", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["traces"] == [str(first)]
    assert [path.stat().st_mtime_ns for path in (first, second)] == stamps
    trace = json.loads(first.read_text())
    assert trace["schema_version"] == TRACE_VERSION and trace["injections"][0]["text_index"] == 0
    assert "".join(trace["answer"]).startswith(trace["text"])

    assert command(["report", "--results-dir", str(results), "--json"]) == 0
    stories = json.loads(capsys.readouterr().out.splitlines()[-1])["stories"]
    report = (results / "report.html").read_text()
    for story in map(Path, stories):
        assert story.parent == results / "stories" and f'href="stories/{story.name}"' in report
        assert_page(story.read_text())
    assert "What it looked at" in Path(stories[0]).read_text()


def assert_page(html: str) -> None:
    """A page is well formed, loads nothing and runs nothing."""
    page = Structure()
    page.feed(html)
    assert page.open == []
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "img"})
    assert all(target == "../report.html" or target.startswith("#memory-") for target in page.loads)
    assert not re.search(r"https?://|@import|url\(|\son\w+=", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_every_kind_of_method_can_be_traced(bench, tmp_path):
    methods = "vanilla,flashmem,flashmem-literal,flashmem-random-trigger,flashmem-noop-memory,flashmem-separate-encoder"
    results = bench.results(tmp_path / "results")
    paths = run_traced(bench, results, "hops", methods, 2, limit=3)
    assert len(paths) == 2 * 6 and all(path.exists() for path in paths)
    stored = {cell.cell_id: cell for cell in ResultStore(results).cells()}
    for cell in stored.values():
        texts, traces = cell.texts(), read_traces(cell.path)
        assert [trace["index"] for trace in traces] == [0, 1]
        for trace in traces:
            text = texts[trace["sample_id"]]
            assert trace["answer_ids"] and trace["cell"] == cell.cell_id
            assert [i["text_index"] for i in trace["injections"]] == [t["text_index"] for t in text["triggers"]]
            if text["entropies"]:
                assert [s["entropy"] for s in trace["steps"]] == pytest.approx(text["entropies"], abs=2e-6, rel=1e-5)
    stories = write_stories(load_cells(ResultStore(results)), results)
    assert len(stories) == 12
    for story in stories:
        assert_page(story.path.read_text())


def test_batches_and_sampling_are_traced_as_they_ran(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    for more in ({"batch_size": 3}, {"settings": {"sampling.temperature": 1.0}}, {"batch_size": 2, "seed": 1}):
        assert len(run_traced(bench, results, "hops", "flashmem", 4, limit=4, **more)) == 4


def test_an_answer_that_is_another_alone_than_in_its_batch_is_said(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    bench.run(results, "hops", "vanilla", limit=3, batch_size=3)
    (texts,) = results.glob("runs/*/*/*/texts.jsonl")
    records = [json.loads(line) for line in texts.read_text().splitlines()]
    for record in records:
        # A line without a checksum is one of an earlier version.
        del record["crc"]
        record["tokens"][0] = "other"
    texts.write_text("".join(json.dumps(record) + "\n" for record in records))
    sentence = r"does not give alone what it gave in a batch of 3 \(they part at token 1\).*--batch-size 1"
    with pytest.raises(BenchError, match=sentence):
        run_traced(bench, results, "hops", "vanilla", 2, limit=3, batch_size=3)


def test_an_answer_that_changed_is_one_sentence(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    bench.run(results, "hops", "vanilla", limit=2)
    (texts,) = results.glob("runs/*/*/*/texts.jsonl")
    records = [json.loads(line) for line in texts.read_text().splitlines()]
    for record in records:
        del record["crc"]
    records[1]["tokens"][0] = "other"
    texts.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(BenchError, match=r"no longer gives its stored answer \(they part at token 1\)") as caught:
        run_traced(bench, results, "hops", "vanilla", 2, limit=2)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    assert [path.stem for path in results.glob("runs/*/*/*/traces/*")] == [records[0]["sample_id"]]


def test_failed_samples_have_no_story(bench, tmp_path):
    from flashmem_bench.session import Session

    results = bench.results(tmp_path / "results")
    (result,) = bench.run(results, "hops", "vanilla", limit=2)
    result.rows[0]["error"] = "no room"
    session = Session(bench.request(results, "hops", "vanilla", limit=2), bench.backbone, bench.suites)
    assert [path.stem for path in trace_cells(session, [result], 2)] == [result.rows[1]["sample_id"]]


def test_a_foreign_method_says_that_it_cannot_be_traced(bench, tmp_path, monkeypatch):
    from flashmem_bench import registry
    from flashmem_bench.methods.base import MethodSpec

    class Foreign:
        def __init__(self, context):
            from flashmem_bench.methods.vanilla import build

            self.inner = build(context)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    spec = MethodSpec(name="vanilla", summary="made elsewhere", build=Foreign)
    monkeypatch.setattr("flashmem_bench.methods.vanilla.SPEC", spec)
    assert registry.get_method("vanilla") is spec
    with pytest.raises(BenchError, match="vanilla cannot be traced"):
        run_traced(bench, bench.results(tmp_path / "results"), "hops", "vanilla", 1, limit=1)


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "a/b", "..", "", "x" * 300, "\u00fc?*"])
def test_no_sample_id_leads_out_of_the_folder(tmp_path, name):
    path = trace_path(tmp_path, name)
    assert path.parent == tmp_path / "traces" and len(path.name) < 120
    assert path != trace_path(tmp_path, f"{name}_")


def scored(text: str, value: float) -> dict:
    return {"token": 7, "text": text, "value": value}


def shift(text: str, token: int, before: float, after: float) -> dict:
    return {"token": token, "text": text, "before": before, "after": after, "rank_before": 2, "rank_after": 1}


def made_trace(sample_id: str, prompt: list[str], blocks: int = 1, long: bool = False, note: str = "") -> dict:
    """A trace as the recorder writes it: two memories of two latents around two tokens."""
    answer = ["<b>", EVIL, "\n", "."]
    injections, position = [], len(prompt)
    for order, index in enumerate((0, 2)):
        position = len(prompt) + index + 2 * order
        weights = [[0.0] * position for _ in range(2)]
        weights[0][0] = weights[1][position - 1] = 1.0
        attention = {"layer": 3, "weights": weights, "positions": None, "rest": [0.0, 0.0], "own": [0.0, 0.0]}
        if long:
            attention |= {"weights": [[0.5, 0.2]] * 2, "positions": [[position // 2, 3]] * 2, "rest": [0.3, 0.3]}
        new = [shift(EVIL, 7, 0.00004, 0.91), shift("</td>", 8, 0.6, 0.01)]
        injections.append(
            {
                "text_index": index,
                "position": position,
                "latents": 2,
                "latent_positions": [],
                "attention": [] if note else [{**attention, "layer": layer} for layer in range(blocks)],
                "attention_note": note,
                "nearest": [[scored(EVIL, 0.4)], [scored("\n", 0.3)]],
                "spoken": [[scored("</style>", 0.7)], [scored("\u0000", 0.1)]],
                "next_token": {"tokens": new, "kl": 1.25, "proposed": new[1], "sampled": new[0]},
            }
        )
    step = {"entropy": 0.5, "output_entropy": 1.5, "above_tau": True, "fired": False}
    return {
        "schema_version": TRACE_VERSION, "cell": "c", "suite": "s", "method": "m", "model": EVIL,
        "sample_id": sample_id, "index": 0, "gold": EVIL, "prompt_ids": [], "prompt": prompt,
        "trigger": "attention-entropy", "tau": 0.4, "sampling_logits": "post", "sinks": 4, "monitor_layer": 2,
        "answer_ids": [], "answer": answer, "text": "".join(answer), "finish_reason": "eos",
        "steps": [{**step, "fired": n in (0, 2)} for n in range(4)], "injections": injections,
    }  # fmt: skip


def page_of(root: Path, trace: dict) -> str:
    """Put a trace beside a made-up row and return its page."""
    cell = add_cell(ResultStore(root), n=1, sample_id=trace["sample_id"])
    path = trace_path(cell.path, trace["sample_id"])
    path.parent.mkdir()
    path.write_text(json.dumps(trace))
    (story,) = write_stories(load_cells(ResultStore(root)), root)
    assert story.path.parent == root / "stories" and story.path.exists()
    return story.path.read_text()


def test_text_of_models_and_data_stays_text(tmp_path):
    html = page_of(tmp_path, made_trace(f"../{EVIL}", ["<|user|>", EVIL, " </div>", "?", "!"]))
    assert_page(html)
    assert EVIL not in html and html.count("&lt;script&gt;alert(") >= 6
    assert "&lt;b&gt;" in html and "&lt;/td&gt;" in html and "</style>" not in html.split("</head>")[1]
    assert "\u0000" not in html


def test_a_page_says_what_a_memory_saw_said_and_changed(tmp_path):
    html = " ".join(page_of(tmp_path, made_trace("plain", ["<|user|>", "Ana", " has", " 3", " pens", "?"])).split())
    assert "At prompt end (attention entropy 0.5000 &gt; tau 0.4000 nats) it looked most at" in html
    assert "KL 1.25 nats" in html and "would have been chosen" in html and "&lt; 0.1 %" in html and "91.0 %" in html
    assert "Memory 2, after 2 text tokens" in html and 'class="h latent"' in html and ">m1.2</span>" in html
    assert html.count('class="map"') == 2 and html.count('circle class="above"') == 4
    # The first latent looks at a sink, the second at the newest position.
    assert 'title="sinks 100 %"' in html and 'title="prompt 100 %"' in html and 'title="latent' not in html


def test_depth_placebos_and_long_histories(tmp_path):
    deep = page_of(tmp_path / "deep", made_trace("deep", ["a", "b", "c", "d", "e"], blocks=2))
    assert deep.count('class="map"') == 4 and "keys of layer 1" in deep and "(last block)" in deep
    placebo = page_of(tmp_path / "placebo", made_trace("p", ["a", "b", "c", "d", "e"], note="A placebo & co."))
    assert 'class="map"' not in placebo and "A placebo &amp; co." in placebo and "nearest input embeddings" in placebo
    words = [f" w{n}" for n in range(6000)]
    long = page_of(tmp_path / "long", made_trace("long", words, long=True))
    for html in (deep, placebo, long):
        assert_page(html)
    assert "w3000" in long and re.search(r"\[29\d\d tokens\]", long) and "not kept 30 %" in long
    history = long.split('class="running history">')[1].split("</div>")[0]
    assert "w3000" in history and "w2500" not in history


def test_history_puts_tokens_and_latents_in_their_places():
    trace = made_trace("x", ["a", "b"])
    assert [entry["text"] for entry in history_of(trace, 0)] == ["a", "b"]
    assert [entry["text"] for entry in history_of(trace, 1)] == ["a", "b", "m1.1", "m1.2", "<b>", EVIL]


def test_cells_of_one_method_have_pages_of_their_own(tmp_path):
    store = ResultStore(tmp_path)
    for settings in ({}, {"trigger.cooldown": 3}):
        cell = add_cell(store, n=1, settings=settings, sample_id="same")
        path = trace_path(cell.path, "same")
        path.parent.mkdir()
        path.write_text(json.dumps(made_trace("same", ["a", "b", "c", "d", "e"])))
    stories = write_stories(load_cells(store), tmp_path)
    assert len({story.path for story in stories}) == 2


def test_a_broken_trace_is_named(tmp_path):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "a.json").write_text('{"schema_version": 99}')
    with pytest.raises(StoreError, match=r"a\.json is no trace of this version; delete it"):
        read_traces(tmp_path)
    assert read_traces(tmp_path / "nothing") == []


def test_labels_show_white_space_and_no_false_certainty():
    assert shown(" a\n\t") == "\u00b7a\u21b5\u21e5" and shown("") == "\u2205" and shown("\x07") == "\u25a1"
    assert len(shown("x" * 90)) == 18
    values = {0.0: "0.0 %", 0.0002: "< 0.1 %", 0.034: "3.4 %", 0.5: "50 %", 0.996: "99.6 %", 0.99999: "> 99.9 %"}
    assert {value: probability(value) for value in values} == values


def test_bad_number_of_samples(capsys):
    assert command(["run", "--suite", "hops", "--method", "vanilla", "--trace-samples", "0"]) == 2
    assert "--trace-samples must be a whole number of at least 1" in capsys.readouterr().err
