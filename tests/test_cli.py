"""The command line: bad input gets one sentence and the right exit code, help is light, commands fit together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashmem_bench.cli import run as command
from flashmem_bench.report.tables import build_tables
from flashmem_bench.store import ResultStore

ROOT = Path(__file__).parent.parent

# Command line, exit code, words of the sentence. {tmp} is an empty folder, {model} the random backbone.
BAD = [
    ("run --suite wordmat --method vanilla", 2, "did you mean wordmath"),
    ("run --suite wordmath --method vanila", 2, "did you mean vanilla"),
    ("run --suite wordmath", 2, "--method is missing"),
    ("run --method vanilla", 2, "--suite is missing"),
    ("run --suite wordmath --method vanilla --set trigger.treshold=1", 2, "did you mean trigger.threshold"),
    ("run --suite wordmath --method vanilla --set trigger.threshold", 2, "key=value"),
    ("run --suite wordmath --method vanilla --set trigger.threshold=nan", 2, "a number of at least 0"),
    ("run --suite wordmath --method vanilla --set trigger.threshold=-0.5", 2, "a number of at least 0"),
    ("run --suite wordmath --method vanilla --set memory.length=0", 2, "from 1 to 256"),
    ("run --suite wordmath --method vanilla --set trigger.percentile=400", 2, "from 0 to 100"),
    ("run --suite wordmath --method flashmem-random-trigger --set trigger.rate=1.5", 2, "from 0 to 1"),
    ("run --suite wordmath --method snapkv --set eviction.budget=2", 2, "from 5 to"),
    ("run --suite wordmath --method h2o --model {model} --set eviction.budget=900000", 2, "choose one from 5 to"),
    ("run --suite wordmath --method cot-sc --set vote.temperature=0", 2, "above 0"),
    ("run --suite wordmath --method memgen-cached --set memory.tail_cache=false", 2, "fixes memory.tail_cache=true"),
    ("run --suite wordmath --method memgen --model {model} --checkpoint {flashmem}", 2, "train --method memgen"),
    ("run --suite wordmath --method flashmem --model {model} --checkpoint {lora}", 2, "train --method flashmem"),
    ("run --suite wordmath --method lora-sft --model {model}", 1, "flashmem-bench train --method lora-sft"),
    ("train --method lora-sft --suite hops --model {model} --insertion mixed", 2, "leave insertion"),
    (
        "train --trigger-of {flashmem} --suite hops --model {model} --steps 1 --out {tmp}/o",
        2,
        "needs a memgen checkpoint",
    ),
    ("train --trigger-of {flashmem} --suite hops --model {model} --steps 1", 2, "needs --suite and --out"),
    ("train --trigger-of {flashmem} --suite hops --model {model} --out {tmp}/o", 2, "needs --steps or --minutes"),
    (
        "train --trigger-of {flashmem} --insertion mixed --suite hops --steps 1 --out {tmp}/o",
        2,
        "does not read --insertion",
    ),
    ("train --method memgen --suite hops --model {model} --set memory.trained_trigger=true", 2, "--trigger-of FOLDER"),
    ("latency --method vanilla,flashmem-matched-fixed --model {model} --contexts 16", 2, "time flashmem instead"),
    ("run --suite wordmath --method vanilla --limit -3", 2, "--limit must be a whole number of at least 1"),
    ("run --suite wordmath --method vanilla --limit 0", 2, "at least 1"),
    ("run --suite wordmath --method vanilla --limit few", 2, "at least 1"),
    ("run --suite wordmath --method vanilla --batch-size 0", 2, "--batch-size"),
    ("run --suite wordmath --method vanilla --truncate right", 2, "left or middle"),
    ("run --suite wordmath --method flashmem-random-trigger --match both", 2, "within or pooled"),
    ("run --suite wordmath --method vanilla --dtype float8 --model {model}", 2, "auto, float32"),
    ("run --suite wordmath --method vanilla --device abacus --model {model}", 2, "not available here"),
    ("run --suite wordmath --method vanilla --model {tmp}/none", 1, "no model folder"),
    ("run --suite wordmath --method vanilla --model no-such-organisation/no-such-model", 1, "Cannot load a model"),
    (
        "run --suite wordmath --method flashmem --model {model}",
        1,
        "flashmem-bench train --method flashmem --suite wordmath",
    ),
    ("run --suite wordmath --method flashmem --model {model} --checkpoint {tmp}/none", 1, "no checkpoint folder"),
    ("run --suite wordmath --method flashmem --model {model} --checkpoint {tmp}", 1, "not a memory checkpoint"),
    ("run --suite {tmp}/none.yaml --method vanilla", 2, "no suite file"),
    ("run --suite gsm8k --method vanilla --model {model}", 1, "Three ways out"),
    ("run --suite gsm8k --method vanilla --model {model} --data-dir {broken}", 1, "row 2 is broken"),
    ("run --suite gsm8k --method vanilla --model {model} --data-dir {hollow}", 1, "empty"),
    ("run --suite wordmath --method vanilla --model {model} --results-dir {readonly}", 1, "cannot write"),
    ("run --suite wordmath --method vanilla --model {model} --results-dir {other}", 1, "schema version 99"),
    ("run --suite wordmath --method vanilla --nonsense", 2, "no such option"),
    ("rum", 2, "no such command"),
    ("ablate", 2, "name an axis"),
    ("ablate monitor-treshold", 2, "did you mean monitor-threshold"),
    ("ablate monitor-threshold --values p400", 2, "from 0 to 100"),
    ("ablate monitor-threshold --values often", 2, "a percentile such as p85"),
    ("ablate monitor-threshold --values -1", 2, "a number of at least 0"),
    ("ablate cooldown --values -1", 2, "from 0 to"),
    ("ablate cooldown --method vanilla", 2, "does not read trigger.cooldown"),
    ("ablate cooldown --method flashmem-literal", 2, "fixes trigger.cooldown"),
    ("ablate trigger --values flashmem-randm-trigger", 2, "did you mean flashmem-random-trigger"),
    ("ablate insertion --values middle", 2, "prompt-end or mixed or firing"),
    ("ablate memory-length --recipe none", 2, "recipe"),
    ("ablate memory-length --train-seed -1", 2, "--train-seed"),
    ("run --suite hops --method vanilla --workers 0", 2, "--workers must be a whole number of at least 1"),
    ("run --suite hops --method vanilla --fail-on-error 2", 2, "--fail-on-error must be a share from 0 to 1"),
    ("run --suite hops --method vanilla --fail-on-error few", 2, "--fail-on-error must be a share from 0 to 1"),
    ("run --suite hops --method vanilla --sample-timeout soon", 2, "--sample-timeout must be a number above 0"),
    ("ablate cooldown --suite hops --cell-timeout 0", 2, "--cell-timeout must be a number above 0"),
    ("reproduce qwen3-4b-gsm8k --worker-memory -1", 2, "--worker-memory must be a number above 0"),
    ("train --method vanilla --suite wordmath", 2, "train fits flashmem, flashmem-separate-encoder"),
    ("train --method flashmem", 2, "--suite is missing"),
    ("train --method flashmem --suite wordmath --lr 0", 2, "--lr must be a number above 0"),
    ("train --method flashmem --suite wordmath --targets silver", 2, "gold or self"),
    ("train --method flashmem --suite wordmath --insertion middle", 2, "prompt-end or mixed or firing"),
    ("train --method flashmem --suite wordmath --micro-batch-size 0", 2, "--micro-batch-size must be a whole number"),
    ("train --method flashmem --suite wordmath --placement many", 2, "single or auto"),
    ("train --recipe qwen3-4b-gsm", 2, "did you mean qwen3-4b-gsm8k"),
    ("plan qwen3-4b-gsm8k --bandwidth none", 2, "--bandwidth must be a number above 0"),
    ("calibrate --suite hop", 2, "did you mean hops"),
    ("report --results-dir {tmp}/none", 1, "there are no results"),
    ("describe scor", 2, "did you mean score"),
    ("list things", 2, "there are suites, methods"),
]


@pytest.fixture(scope="module")
def places(bench, tmp_path_factory):
    """Folders that something is wrong with."""
    root = tmp_path_factory.mktemp("places")
    names = {name: root / name for name in ("tmp", "broken", "hollow", "other")}
    for folder in names.values():
        folder.mkdir()
    row = json.dumps({"question": "q", "answer": "a\n#### 1"})
    for name, content in (("broken", f"{row}\n{{nonsense\n{row}\n"), ("hollow", "")):
        (names[name] / "gsm8k").mkdir()
        for file in ("train.jsonl", "test.jsonl"):
            (names[name] / "gsm8k" / file).write_text(content)
    (names["other"] / "SCHEMA.json").write_text('{"schema_version": 99}')
    # A file where the folder should be: unwritable for every user, root included.
    (root / "file").write_text("")
    trained = bench.results(root / "trained") / "checkpoints" / bench.model.name / "joint"
    memories = {"flashmem": str(trained / "flashmem/seed0"), "lora": str(trained / "lora-sft/seed0")}
    return {**{name: str(path) for name, path in names.items()}, "readonly": str(root / "file" / "results"),
            "model": str(bench.model), **memories}  # fmt: skip


@pytest.mark.parametrize(("line", "code", "words"), BAD, ids=[line for line, _, _ in BAD])
def test_bad_input_gets_one_sentence(places, tmp_path, monkeypatch, capsys, line, code, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The environment variable is read once, when the hub's client is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    assert command([part.format(**places) for part in line.split()]) == code
    captured = capsys.readouterr()
    errors = [text for text in captured.err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and words.lower() in errors[0].lower(), captured.err
    assert "Traceback" not in captured.err + captured.out
    assert not list(tmp_path.glob("results/runs/*/*/*/samples.jsonl"))


def test_debug_gives_the_traceback():
    with pytest.raises(Exception, match="no suite named"):
        command(["run", "--suite", "wordmat", "--method", "vanilla", "--debug"])


def test_unexpected_errors_are_sentences_too(monkeypatch, capsys):
    import flashmem_bench.schema

    monkeypatch.setattr(flashmem_bench.schema, "find_column", lambda name: 1 / 0)
    assert command(["describe", "score"]) == 1
    assert "unexpected ZeroDivisionError" in capsys.readouterr().err


def _python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    "line", ["--help", "run --help", "list methods", "list suites", "list ablations", "describe score"]
)
def test_light_commands_import_nothing_heavy(line):
    heavy = ["torch", "transformers", "pandas", "lm_eval", "datasets", "matplotlib", "scipy", "click"]
    done = _python(
        f"import sys; from flashmem_bench.cli import run; code = run({line.split()!r});"
        f"assert code == 0, code; loaded = [m for m in {heavy!r} if m in sys.modules]; assert not loaded, loaded"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_is_quick():
    def once() -> float:
        before = os.times()
        assert _python("from flashmem_bench.cli import run; run(['--help'])").returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # Processor time, because other tests run beside this one; the best of three, because they share its caches.
    assert min(once() for _ in range(3)) < 0.5


def test_no_module_of_ours_imports_click():
    for path in (*ROOT.glob("flashmem/**/*.py"), *ROOT.glob("flashmem_bench/**/*.py")):
        assert "import click" not in path.read_text(encoding="utf-8"), path


def _json(capsys) -> object:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_run_ablate_report_and_lists_fit_together(bench, tmp_path, capsys):
    results = str(bench.results(tmp_path / "results"))
    common = ["--model", str(bench.model), "--results-dir", results, "--json", "--quiet"]
    assert command(["run", "--suite", "hops", "--method", "vanilla,flashmem", "--limit", "3", *common]) == 0
    document = _json(capsys)
    assert [cell["method"] for cell in document["cells"]] == ["vanilla", "flashmem"]
    assert all(cell["samples"] == cell["new_samples"] == 3 for cell in document["cells"])
    ablate = ["ablate", "monitor-threshold", "--suite", "hops", "--limit", "3", *common]
    assert command([*ablate, "--values", "p50,3.5"]) == 0
    cells = _json(capsys)["cells"]
    assert len(cells) == 3, "the reference is always among the points"
    assert cells[0]["cell"] == document["cells"][1]["cell"] and cells[0]["new_samples"] == 0
    assert command(["ablate", "sink-tokens", "--suite", "hops", "--limit", "1", "--values", "0", *common]) == 0
    assert [cell["status"] for cell in _json(capsys)["cells"]] == ["complete", "complete"]
    assert command(["list", "runs", "--results-dir", results, "--json"]) == 0
    assert len(_json(capsys)) == 5
    assert command(["report", "--results-dir", results, "--json"]) == 0
    assert Path(_json(capsys)["html"]).exists()


def test_values_of_the_threshold_axis():
    from flashmem_bench.ablations import get_axis, points

    made = points(get_axis("monitor-threshold"), ["50", "p85", "99%", "1.5"])
    assert [point.text for point in made] == ["p50", "p85", "p99", "1.5"]
    assert [point.reference for point in made] == [False, True, False, False]
    assert made[3].settings == {"trigger.threshold": 1.5} and made[0].settings == {"trigger.percentile": 50.0}
    unlimited = points(get_axis("max-injections"), ["none"])
    assert [(point.text, point.reference) for point in unlimited] == [("8", True), ("none", False)]
    assert points(get_axis("trigger-interval"))[0].settings == {"trigger.cooldown": 0, "trigger.interval": 8}


def test_whose_keys_the_blocks_read_differs_only_with_more_than_one_block():
    from flashmem_bench.ablations import get_axis, points

    found = {point.text: point.settings for point in points(get_axis("kv-layer"))}
    assert found["last"] == {"memory.kv_layer": "last", "memory.depth": None}
    assert found["all"] == {"memory.kv_layer": "paired", "memory.depth": None}
    assert found["paired"] == {"memory.kv_layer": "paired"}


def test_every_axis_varies_something_that_its_method_reads():
    from flashmem_bench.ablations import AXES, METHOD, points
    from flashmem_bench.registry import get_method, method_names
    from flashmem_bench.settings import FIELDS, resolve

    for axis in AXES:
        made = points(axis)
        assert sum(point.reference for point in made) == 1, axis.name
        assert len({point.text for point in made}) == len(made) > 1
        for point in made:
            spec = get_method(point.method or axis.method)
            # What a memory is comes with its checkpoint; a method must not fix the rest to something else.
            asked = {key: value for key, value in point.settings.items() if not key.startswith("memory.")}
            resolve(asked, fixed=spec.fixed, defaults=spec.defaults, method=spec.name)
            assert spec.memory_of, axis.name
        assert axis.key in FIELDS or axis.key in (METHOD, "train.insertion", "train.targets")
    assert {point.method for axis in AXES for point in points(axis)} - {None} <= set(method_names())


def test_an_axis_of_methods_is_one_sheet(bench, tmp_path, capsys):
    results = bench.results(tmp_path / "results")
    line = ["ablate", "memory-source", "--suite", "hops", "--limit", "3", "--model", str(bench.model), "--quiet"]
    line += ["--values", "flashmem-noop-memory", "--results-dir", str(results)]
    assert command(line) == 0
    sheet = build_tables(ResultStore(results))["ablations"]
    assert list(sheet["value"]) == ["flashmem", "flashmem-noop-memory"] and set(sheet["method"]) == {"flashmem"}
    assert sheet["reference_cell"].nunique() == 1 and sheet["delta_reference"].notna().sum() == 1
    matched = [*line[:1], "trigger", *line[2:-3], "flashmem-random-trigger", *line[-2:]]
    assert command(matched) == 0
    sheet = build_tables(ResultStore(results))["ablations"].query("axis == 'trigger'")
    assert list(sheet["value"]) == ["flashmem", "flashmem-random-trigger"], "the cell it is matched to is no point"


def test_an_ablation_trains_as_long_as_its_recipe_says_but_five_minutes_at_most(tmp_path):
    from flashmem_bench.ablation_training import Schedule

    assert Schedule().length("flashmem-tiny", "hops") == "4 minutes"
    for suite in ("hops-list", "wordmath"):
        assert Schedule().length("flashmem-tiny", suite) == "5 minutes"
    (tmp_path / "steps.yaml").write_text("train: {steps: 70}\n")
    assert Schedule(recipe=str(tmp_path / "steps.yaml")).length("flashmem-tiny", "hops") == "70 steps"
    assert Schedule(minutes=0.5).length("flashmem-tiny", "hops") == "0.5 minutes"


def test_an_axis_of_memories_trains_each_value_once(bench, tmp_path, capsys):
    results, recipe = bench.results(tmp_path / "results"), tmp_path / "small.yaml"
    recipe.write_text("train: {examples: 16, batch_size: 4, validation: 4, targets: gold, lr: 1.0e-3}\n")
    line = ["ablate", "memory-length", "--suite", "hops", "--limit", "3", "--values", "2,8", "--minutes", "0.01"]
    line += ["--recipe", str(recipe), "--model", str(bench.model), "--results-dir", str(results)]
    assert command(line) == 0
    out = capsys.readouterr()
    assert "2 memories of 0.01 minutes are trained first" in out.err + out.out
    sheet = build_tables(ResultStore(results))["ablations"]
    assert list(sheet["value"]) == ["2", "8"] and set(sheet["method"]) == {"flashmem-prompt-end"}
    latents = {cell.rows()[0]["latent_tokens"] for cell in ResultStore(results).cells()}
    assert latents == {2, 8}
    weights = sorted((results / "checkpoints").rglob("ablations/**/model.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    assert len(weights) == 2 and command([*line, "--quiet"]) == 0
    assert [path.stat().st_mtime_ns for path in weights] == before
    other = [*line[:1], "consolidator-depth", *line[2:7], "1", *line[8:], "--quiet"]
    assert other[5:8] == ["3", "--values", "1"] and command(other) == 0
    found = sorted((results / "checkpoints").rglob("ablations/**/model.safetensors"))
    assert found == weights, "the reference of another axis is the same memory"
    sheet = build_tables(ResultStore(results))["ablations"]
    assert set(sheet.loc[sheet["reference"], "axis"]) == {"memory-length", "consolidator-depth"}


def test_a_trigger_is_fitted_to_a_memgen_memory(bench, tmp_path, capsys):
    common = ["--model", str(bench.model), "--results-dir", str(tmp_path / "results"), "--quiet"]
    weaver, both = tmp_path / "weaver", tmp_path / "both"
    fit = ["train", "--suite", "hops-list", "--limit", "12", "--steps", "2", "--lr", "1e-3", *common]
    memory = ["--method", "memgen", "--insertion", "delimiters", "--batch-size", "4", "--validation", "2"]
    assert command([*fit, *memory, "--targets", "gold", "--set", "memory.length=2", "--out", str(weaver)]) == 0
    assert command([*fit, "--trigger-of", str(weaver), "--out", str(both), "--json"]) == 0
    facts = _json(capsys)["metadata"]
    assert facts["method"] == "memgen" and facts["harm"] >= 0, "what was measured of the weaver is kept"
    assert facts["trigger"]["steps"] == 2 and facts["trigger"]["suites"] == ["hops-list"]
    run = ["run", "--suite", "hops-list", "--limit", "3", *common]
    assert command([*run, "--method", "memgen,memgen-cached", "--checkpoint", str(both)]) == 0
    assert command([*run, "--method", "memgen-cached", "--checkpoint", str(weaver)]) == 0
    cells = {(c.get("method"), c.get("settings")["memory"]["trained_trigger"]): c.rows() for c in
             ResultStore(tmp_path / "results").cells()}  # fmt: skip
    assert set(cells) == {("memgen", True), ("memgen-cached", True), ("memgen-cached", False)}
    asked, plain = cells["memgen-cached", True], cells["memgen-cached", False]
    keys = ("score", "output_tokens", "triggers")
    assert [[row[k] for k in keys] for row in asked] == [[row[k] for k in keys] for row in cells["memgen", True]]
    assert sum(row["positions_woven"] for row in asked) > 0 and len(asked) == len(plain) == 3


def test_partial_results_exit_3(bench, tmp_path, capsys, monkeypatch):
    from flashmem.errors import FlashMemError
    from flashmem_bench.methods.latent import LatentMethod

    results, generate = bench.results(tmp_path / "results"), LatentMethod.generate
    bad = bench.suites["hops"].samples()[1].sample_id

    def sometimes(self, prompts, samples, *rest, **more):
        if samples[0].sample_id == bad:
            raise FlashMemError("no room for this one")
        return generate(self, prompts, samples, *rest, **more)

    monkeypatch.setattr(LatentMethod, "generate", sometimes)
    line = ["run", "--suite", "hops", "--method", "vanilla", "--limit", "3", "--model", str(bench.model)]
    assert command([*line, "--results-dir", str(results), "--quiet"]) == 3
    assert (
        "1 of 3 samples of hops x vanilla failed; the first: no room for this one. The same command tries"
        in capsys.readouterr().err
    )


def test_skip_bad_rows(bench, places, tmp_path):
    line = ["run", "--suite", "gsm8k", "--method", "vanilla", "--model", str(bench.model), "--limit", "2", "--quiet"]
    line += ["--results-dir", str(tmp_path / "results"), "--data-dir", places["broken"], "--skip-bad-rows"]
    assert command([*line, "--set", "sampling.temperature=0"]) == 0


def test_train_then_calibrate_then_run(bench, tmp_path, capsys):
    common = ["--model", str(bench.model), "--results-dir", str(tmp_path / "results"), "--quiet", "--json"]
    train = ["train", "--method", "flashmem", "--suite", "hops,recall", "--limit", "24", "--steps", "3"]
    train += ["--batch-size", "4", "--lr", "1e-3", "--validation", "4", "--set", "memory.length=2", "--targets", "gold"]
    assert command([*train, *common]) == 0
    document = _json(capsys)
    facts = document["metadata"]
    assert facts["suites"] == ["hops", "recall"] and facts["steps"] == 3 and facts["examples"] == 48
    assert facts["harm"] >= 0 and set(facts["harm_by_suite"]) == {"hops", "recall"}
    assert not (Path(document["checkpoint"]) / "training").exists()
    assert command([*train, *common]) == 0
    assert _json(capsys)["trained"] is False
    assert command(["calibrate", "--suite", "hops,recall", "--limit", "4", "--joint", *common]) == 0
    rows = _json(capsys)
    assert {(row["suite"], row["kind"]) for row in rows} >= {("hops", "attention-entropy"), ("joint", "output-entropy")}
    assert {row["stratum"] for row in rows if row["suite"] == "recall"} > {"all"}
    assert command(["run", "--suite", "hops,recall", "--method", "flashmem", "--limit", "2", *common]) == 0
    cells = _json(capsys)["cells"]
    assert [cell["samples"] for cell in cells] == [2, 2]


def test_training_on_own_answers_continues_and_says_when_there_are_none(bench, tmp_path, capsys):
    from flashmem_bench.fitting import FitRequest, Watcher, own_answers
    from flashmem_bench.session import Session

    with pytest.raises(Exception, match="gold or self"):
        FitRequest("flashmem", "both", None)
    session = Session(bench.request(tmp_path, "hops", "flashmem"), bench.backbone, bench.suites)
    samples = [bench.suites["hops"].samples("train")[i] for i in range(2)]
    cache = tmp_path / "self.jsonl"
    cache.write_text(json.dumps({"sample_id": samples[0].sample_id, "text": samples[0].answer}) + "\n")
    found = list(own_answers(session, bench.suites["hops"], samples, cache, Watcher()))
    assert [(sample.sample_id, text) for sample, text in found] == [(samples[0].sample_id, samples[0].answer)]
    assert len(cache.read_text().splitlines()) == 2


def test_doctor_reports(tmp_path, capsys):
    code = command(["doctor", "--results-dir", str(tmp_path / "results"), "--json"])
    checks = _json(capsys)
    assert {"versions", "processor", "results", "suites"} <= {check["name"] for check in checks}
    assert code == (1 if any(check["status"] == "broken" for check in checks) else 0)
    (tmp_path / "file").write_text("")
    assert command(["doctor", "--results-dir", str(tmp_path / "file" / "results"), "--json"]) == 1
    broken = [check["name"] for check in _json(capsys) if check["status"] == "broken"]
    assert "results" in broken
