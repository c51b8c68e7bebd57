"""Suites: finding, loading, data sources, and parity with what lm-eval itself says about the same documents."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from flashmem_bench import hub
from flashmem_bench.errors import DataError, UnknownNameError, UsageError
from flashmem_bench.sources import generated
from flashmem_bench.suites import find_suite, list_suites, suites_dir
from flashmem_bench.tasks import load_suite
from flashmem_bench.thresholds import spread

NAMES = ["babi", "gsm8k", "hops", "hops-list", "recall", "wordmath"]
GENERATED = ["hops", "hops-list", "recall", "wordmath"]
SPLITS = ["test", "calibration", "validation", "train"]


def write_jsonl(path: Path, rows: list) -> Path:
    """Write rows, a string as it is; gzip where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def gsm8k_row(number: int) -> dict:
    return {
        "question": f"Kim has {number} pens and finds {number}. How many?",
        "answer": f"She has {number}+{number} = <<{number}+{number}=x>>{2 * number:,} pens.\n#### {2 * number:,}",
    }


def babi_row(task: str, questions: int, start: int = 0) -> dict:
    """A story of one statement before each question."""
    ids, kinds, texts, answers = [], [], [], []
    for i in range(questions):
        ids += [str(2 * i + 1), str(2 * i + 2)]
        kinds += [0, 1]
        texts += [f"Mary went to place {start + i}.", "Where is Mary?"]
        answers += ["", f"place {start + i}"]
    support = [[] for _ in ids]
    story = {"id": ids, "type": kinds, "text": texts, "answer": answers, "supporting_ids": support}
    return {"config": f"en-{task}", "story": story}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A data folder with made-up rows in the schemas of the real files."""
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    folder = tmp_path / "data"
    write_jsonl(folder / "gsm8k/train.jsonl.gz", [gsm8k_row(n) for n in range(100, 140)])
    write_jsonl(folder / "gsm8k/test.jsonl", [gsm8k_row(n) for n in range(500, 507)])
    # The tenth task before the second in the file: the order of tasks is not the file's.
    stories = [babi_row(task, 2, 10 * n) for task in ("qa1", "qa10", "qa2") for n in range(20)]
    write_jsonl(folder / "babi/en_train.jsonl.gz", stories)
    test_stories = [babi_row("qa1", 3), babi_row("qa1", 1, 50), babi_row("qa10", 1), babi_row("qa2", 2)]
    write_jsonl(folder / "babi/en_test.jsonl.gz", test_stories)
    return folder


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No data folder and no way to the hub."""
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def answers(suite, sample) -> list[str]:
    """Completions worth grading: right, wrong, without an answer, mangled."""
    return [
        sample.target,
        sample.target.upper(),
        "",
        "nothing here",
        f"{sample.answer}\n#### 3,5.",
        "The answer is 12.",
    ]


# Finding


def test_the_bundled_suites_are_listed_with_what_a_reader_needs():
    infos = list_suites()
    assert [info.name for info in infos] == sorted(info.name for info in infos)
    for info in infos:
        assert info.licence and info.title and info.metadata["traps"] and info.metadata["graded_by"], info.name
        assert info.metadata["training_split"] in ("train", None)
        if info.name in NAMES:
            assert info.metadata["training_split"] == "train" and info.metadata["prefix_field"] is None
            assert info.kind == ("generated" if info.name in GENERATED else "real")


def test_an_unknown_suite_names_its_near_misses():
    with pytest.raises(UnknownNameError, match=r"no suite named 'gsm8' .did you mean gsm8k.") as caught:
        find_suite("gsm8")
    assert caught.value.exit_code == 2


def test_the_task_name_of_lm_eval_is_also_accepted():
    assert find_suite("flashmem_hops-list").name == "hops-list"


def test_listing_suites_imports_nothing_heavy():
    code = (
        "import sys; from flashmem_bench.suites import list_suites, find_suite;"
        "list_suites(); find_suite('lm-eval/gsm8k');"
        "print({'torch', 'lm_eval', 'datasets', 'pandas', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Loading, and parity with lm-eval


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_scores_are_lm_evals_own(name, data):
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    suite = load_suite(name, data_dir=data)
    manager = TaskManager(include_path=str(suites_dir()), include_defaults=False, metadata={"data_dir": str(data)})
    task = manager.load(f"flashmem_{name}")["tasks"][f"flashmem_{name}"]
    assert len(task.eval_docs) == len(suite.samples())
    for sample, doc in zip(suite.samples()[:5], task.eval_docs, strict=False):
        assert sample.prompt == task.doc_to_text(doc) == task.fewshot_context(doc, 0)
        assert sample.target == str(task.doc_to_target(doc))
        for text in answers(suite, sample):
            grade = suite.grade(sample, text)
            instance = Instance("generate_until", doc, (sample.prompt, {}), 0, resps=[text])
            for ensemble in task._filters:
                ensemble.apply([instance])
                results = task.process_results(doc, [instance.filtered_resps[ensemble.name]])
                assert {
                    f"{key},{ensemble.name}": value for key, value in results.items()
                }.items() <= grade.metrics.items()
            assert grade.score == grade.metrics[suite.primary_metric]


def test_lm_evals_own_evaluation_runs_our_folder_and_agrees(data):
    """The whole way through `lm_eval --include_path suites`, with a model that always says the same."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Constant(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return ["#### 1,000" for _ in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    names = [f"flashmem_{name}" for name in NAMES]
    manager = TaskManager(include_path=str(suites_dir()), include_defaults=False, metadata={"data_dir": str(data)})
    found = lm_eval.simple_evaluate(Constant(), tasks=names, limit=7, task_manager=manager, bootstrap_iters=0)
    for name in NAMES:
        suite = load_suite(name, data_dir=data)
        grades = [suite.grade(sample, "#### 1,000") for sample in suite.samples()[:7]]
        mean = sum(grade.score for grade in grades) / len(grades)
        assert found["results"][f"flashmem_{name}"][suite.primary_metric] == pytest.approx(mean), name
    assert found["results"]["flashmem_gsm8k"]["exact_match,strict-match"] == pytest.approx(1 / 7)


@pytest.mark.parametrize("name", NAMES)
def test_the_target_scores_full_marks_and_silence_is_no_answer(name, data):
    suite = load_suite(name, data_dir=data)
    for split in SPLITS:
        sample = suite.samples(split)[0]
        right, silent = suite.grade(sample, sample.target), suite.grade(sample, "")
        assert (right.score, right.parse_status) == (1.0, "ok")
        assert (silent.score, silent.parse_status, silent.extracted) == (0.0, "no_answer", None)
        assert all(type(value) is float for value in right.metrics.values())
    wrong = suite.grade(suite.samples()[0], "#### 987654321")
    assert (wrong.score, wrong.parse_status) == (0.0, "no_answer" if name == "hops-list" else "ok")


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_unique_ordered_and_split_without_overlap(name, data):
    suite = load_suite(name, data_dir=data)
    prompts = {}
    for split in ("test", "calibration", "train"):
        samples = suite.samples(split)[:300]
        assert len({sample.sample_id for sample in samples}) == len(samples)
        prompts[split] = {sample.prompt for sample in samples}
    if name != "babi":
        assert not prompts["test"] & prompts["train"] and not prompts["calibration"] & prompts["train"]
    again = load_suite(name, data_dir=data).samples()
    assert [sample.sample_id for sample in again[:20]] == [sample.sample_id for sample in suite.samples()[:20]]


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_greedy_and_fits_the_target(name, data):
    suite = load_suite(name, data_dir=data)
    assert suite.generation.temperature == 0.0 and suite.generation.stop == ()
    longest = max(len(sample.target.split()) for sample in suite.samples()[:100])
    assert suite.generation.max_new_tokens > longest


def test_hops_list_knows_its_right_moments():
    suite = load_suite("hops-list")
    for sample in suite.samples()[:20]:
        assert sample.moments
        for moment in sample.moments:
            assert sample.target.count(f"{moment} ") == 1
    sample = suite.samples()[0]
    swapped = "\n".join(f"{moment} nobody" for moment in sample.moments)
    others = [line for line in sample.target.splitlines() if not line.startswith(sample.moments)]
    metrics = suite.grade(sample, "\n".join([*others, swapped])).metrics
    assert metrics["two_link,echoed-lines"] == 0.0 and metrics["one_link,echoed-lines"] == 1.0


def test_recall_calibrates_by_length_and_takes_lengths_from_outside():
    suite = load_suite("recall", settings={"pairs": [64, 128]})
    assert suite.calibrate_by == "stratum"
    assert [sample.stratum for sample in suite.samples()[:4]] == ["n=64", "n=128", "n=64", "n=128"]
    assert suite.content_hash != load_suite("recall").content_hash
    with pytest.raises(UsageError, match="generator of recall refuses"):
        load_suite("recall", settings={"pears": 3})


def test_a_grader_that_fails_costs_one_sample_not_the_run(data, monkeypatch):
    suite = load_suite("gsm8k", data_dir=data)
    monkeypatch.setattr(suite.task, "process_results", lambda doc, results: 1 / 0)
    assert suite.grade(suite.samples()[0], "x").parse_status == "error"


def test_content_hash_is_the_same_in_every_process_and_follows_the_data(data):
    code = (
        "import sys; from flashmem_bench.tasks import load_suite;"
        "print(*[load_suite(name, data_dir=sys.argv[1]).content_hash for name in sys.argv[2:]])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(data), *NAMES], capture_output=True, text=True, check=True, env=env
    )
    here = [load_suite(name, data_dir=data).content_hash for name in NAMES]
    assert done.stdout.split() == here and len(set(here)) == len(NAMES)
    assert load_suite("hops", seed=1).content_hash != load_suite("hops").content_hash
    write_jsonl(data / "gsm8k/test.jsonl", [gsm8k_row(9)])
    assert load_suite("gsm8k", data_dir=data).content_hash != here[NAMES.index("gsm8k")]


# Real data


def test_gsm8k_rows_splits_and_fields(data):
    suite = load_suite("gsm8k", data_dir=data)
    first = suite.samples()[0]
    assert first.sample_id == "gsm8k-test-00001" and first.answer == "1000"
    assert first.prompt == gsm8k_row(500)["question"] + '\nReason step by step, then end with "#### " and the number.'
    assert first.target == "She has 500+500 = 1,000 pens.\n#### 1,000"
    sizes = {split: len(suite.samples(split)) for split in SPLITS}
    # 5 % of 40 rows.
    assert sizes == {"test": 7, "train": 38, "calibration": 2, "validation": 2}
    assert suite.samples("calibration")[0].sample_id == "gsm8k-train-00039"


def test_gsm8k_first_prompt_does_not_render_the_rest(data, monkeypatch):
    suite = load_suite("gsm8k", data_dir=data)
    rendered = []
    monkeypatch.setattr(suite, "render", lambda *args: rendered.append(args) or "sample")
    assert suite.samples()[3] == "sample" and len(rendered) == 1


def test_the_data_folder_may_come_from_the_environment(data, monkeypatch):
    monkeypatch.setenv("FLASHMEM_DATA", str(data))
    assert len(load_suite("gsm8k").samples()) == 7


def test_babi_ids_context_and_order(data):
    suite = load_suite("babi", data_dir=data)
    samples = suite.samples()
    assert [sample.sample_id for sample in samples] == [
        "qa1-0001-02",
        "qa2-0001-02",
        "qa10-0001-02",
        "qa1-0001-04",
        "qa2-0001-04",
        "qa1-0001-06",
        "qa1-0002-02",
    ]
    assert [sample.stratum for sample in samples[:3]] == ["qa1", "qa2", "qa10"]
    # The third question of the story: its statements, none of the earlier questions.
    statements = [f"Mary went to place {n}." for n in range(3)]
    assert samples[5].prompt == "\n".join([*statements, "Where is Mary?"])
    assert samples[5].answer == samples[5].target == "place 2"


def test_babi_holds_out_the_last_stories_of_every_task(data):
    suite = load_suite("babi", data_dir=data)
    # One of twenty stories a task, two questions each.
    held_out = {sample.sample_id[:-3] for sample in suite.samples("calibration")}
    assert held_out == {"qa1-0020", "qa2-0020", "qa10-0020"}
    assert len(suite.samples("calibration")) == 6 and len(suite.samples("train")) == 114


def test_a_left_out_story_renames_no_other(data):
    rows = [babi_row("qa1", 1), '{"config": "en-qa1"}', babi_row("qa1", 1, 7)]
    write_jsonl(data / "babi/en_test.jsonl.gz", rows)
    suite = load_suite("babi", data_dir=data, skip_bad_rows=True)
    assert [sample.sample_id for sample in suite.samples()] == ["qa1-0001-02", "qa1-0003-02"]
    assert suite.bad_rows == 1


# Bad input


@pytest.mark.parametrize(
    ("suite", "file", "broken", "why"),
    [
        ("gsm8k", "test.jsonl", "{not json", "not JSON"),
        ("gsm8k", "test.jsonl", "[1, 2]", "not a JSON object"),
        ("gsm8k", "test.jsonl", {"question": "x"}, "'answer' is missing"),
        ("gsm8k", "test.jsonl", {"question": 4, "answer": "#### 4"}, "'question' is not text"),
        ("gsm8k", "test.jsonl", {"question": "x", "answer": "no mark"}, "no '#### <number>'"),
        ("gsm8k", "test.jsonl", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "not JSON"),
        ("babi", "en_test.jsonl.gz", {"config": "en-qa1"}, "'story' is missing"),
        ("babi", "en_test.jsonl.gz", {"config": "en-qa1", "story": {"id": ["1"]}}, "'story.type' is missing"),
        (
            "babi",
            "en_test.jsonl.gz",
            {"config": "en-qa1", "story": {"id": ["1"], "type": [1], "text": ["Q?"], "answer": [""]}},
            "has no answer",
        ),
    ],
)
def test_a_broken_row_is_named_and_can_be_left_out(suite, file, broken, why, data):
    path = data / suite / file
    good = gsm8k_row(3) if suite == "gsm8k" else babi_row("qa1", 1)
    write_jsonl(path, [good, good, broken, good])
    with pytest.raises(DataError, match="row 3 is broken") as caught:
        load_suite(suite, data_dir=data)
    assert str(path) in str(caught.value) and why in str(caught.value) and "--skip-bad-rows" in str(caught.value)
    loaded = load_suite(suite, data_dir=data, skip_bad_rows=True)
    assert (len(loaded.samples()), loaded.bad_rows) == (3, 1)


def test_blank_lines_are_no_rows_but_count_in_row_numbers(data):
    write_jsonl(data / "gsm8k/test.jsonl", [gsm8k_row(1), "", "oops"])
    with pytest.raises(DataError, match="row 3"):
        load_suite("gsm8k", data_dir=data)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_split_is_an_error(content, data):
    (data / "gsm8k/test.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="split 'test' of gsm8k is empty"):
        load_suite("gsm8k", data_dir=data)


def test_a_split_of_broken_rows_only_is_empty_and_says_why(data):
    write_jsonl(data / "gsm8k/test.jsonl", ["x", "y"])
    with pytest.raises(DataError, match=r"2 broken rows left out"):
        load_suite("gsm8k", data_dir=data, skip_bad_rows=True)


def test_a_damaged_archive_is_one_sentence(data):
    whole = gzip.compress(json.dumps(babi_row("qa1", 1)).encode() * 50)
    (data / "babi/en_test.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        load_suite("babi", data_dir=data)


def test_a_missing_file_or_folder_is_not_filled_from_elsewhere(data, tmp_path, no_hub):
    (data / "gsm8k/test.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds neither test.jsonl nor test.jsonl.gz"):
        load_suite("gsm8k", data_dir=data)
    with pytest.raises(DataError, match="does not exist; check --data-dir"):
        load_suite("gsm8k", data_dir=tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["gsm8k", "babi"])
def test_without_data_or_network_the_error_names_three_ways_out_at_once(name, no_hub, tmp_path):
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        load_suite(name, data_dir=tmp_path)
    assert time.monotonic() - started < 10
    for way in ("--data-dir", "FLASHMEM_DATA", "network", "datasets cache", f"{name}/"):
        assert way in str(caught.value)


def test_a_hub_that_does_not_answer_is_given_up_soon(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_answers", lambda deadline_s: time.sleep(30))
    started = time.monotonic()
    assert not hub.hub_reachable(0.2)
    assert time.monotonic() - started < 2


def test_offline_mode_is_put_back(monkeypatch):
    import datasets

    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    before = datasets.config.HF_HUB_OFFLINE
    with hub.quick_hub() as reachable:
        assert not reachable and datasets.config.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE == before


def test_gsm8k_from_the_hub_equals_gsm8k_from_the_folder(data, monkeypatch):
    from flashmem_bench.sources import maths

    rows = {"train": [gsm8k_row(n) for n in range(100, 140)], "test": [gsm8k_row(n) for n in range(500, 507)]}
    monkeypatch.setattr(maths, "hub_rows", lambda repo, config, split: rows[split])
    local, remote = load_suite("gsm8k", data_dir=data), load_suite("gsm8k")
    assert remote.content_hash == local.content_hash
    assert [sample.prompt for sample in remote.samples()] == [sample.prompt for sample in local.samples()]


FILL_CACHE_AND_LOAD = """
import pathlib, sys, datasets
from datasets.arrow_writer import ArrowWriter
features = datasets.Features({"question": datasets.Value("string"), "answer": datasets.Value("string")})
folder = pathlib.Path(datasets.config.HF_DATASETS_CACHE) / "openai___gsm8k/main/0.0.0/0123abcd"
folder.mkdir(parents=True)
splits = {}
for name in ("train", "test"):
    writer = ArrowWriter(path=str(folder / f"gsm8k-{name}.arrow"), features=features)
    for n in range(7):
        writer.write({"question": f"{name} {n}?", "answer": f"#### {n}"})
    rows, size = writer.finalize()
    splits[name] = {"name": name, "num_bytes": size, "num_examples": rows, "dataset_name": "gsm8k"}
datasets.DatasetInfo(features=features, splits=splits, builder_name="parquet", dataset_name="gsm8k",
                     config_name="main", version="0.0.0").write_to_directory(str(folder))
from flashmem_bench.tasks import load_suite
print(*[sample.answer for sample in load_suite("gsm8k").samples()])
"""


def test_without_network_a_filled_datasets_cache_is_enough(tmp_path, no_hub):
    env = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    env.pop("HF_DATASETS_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", FILL_CACHE_AND_LOAD], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == [str(n) for n in range(7)]


def test_an_unknown_split_is_refused():
    with pytest.raises(UsageError, match="no split named 'dev'"):
        load_suite("hops").samples("dev")


# Suite files of one's own, and lm-eval's tasks

OWN = """
task: my_capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}}}
test_split: test
training_split: train
output_type: generate_until
doc_to_text: "{prompt}"
doc_to_target: "{{{{capital}}}}"
num_fewshot: {shots}
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
{more}
"""


@pytest.fixture
def own_suite(tmp_path, monkeypatch):
    """Return a function that writes a suite file of one's own over five made-up rows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"land": f"Land{n}", "capital": f"Town{n}"} for n in range(5)]
    file = write_jsonl(tmp_path / "capitals.jsonl", rows)

    def write(prompt="Capital of {{land}}?", shots=0, more="") -> str:
        path = tmp_path / "my_capitals.yaml"
        path.write_text(OWN.format(file=file, prompt=prompt, shots=shots, more=more))
        return str(path)

    return write


def test_a_suite_file_of_ones_own_runs_without_trust(own_suite):
    suite = load_suite(own_suite())
    sample = suite.samples()[1]
    assert (suite.name, sample.sample_id) == ("my_capitals", "my_capitals-test-00001")
    assert sample.prompt == "Capital of Land1?" and suite.generation.stop == ("\n",)
    assert suite.grade(sample, "Town1").score == 1.0
    assert len(suite.samples("train")) == 4 and len(suite.samples("calibration")) == 1


def test_few_shot_prompts_are_lm_evals_whatever_is_looked_at_first(own_suite):
    from lm_eval.tasks import TaskManager

    path = own_suite(shots=2)
    task = TaskManager(include_defaults=False).load(path)["tasks"]["my_capitals"]
    task.set_fewshot_seed(1234)
    theirs = [task.fewshot_context(doc, 2) for doc in task.eval_docs]
    suite = load_suite(path)
    assert suite.samples()[3].prompt == theirs[3]
    assert [sample.prompt for sample in suite.samples()] == theirs


@pytest.mark.parametrize(
    "more",
    [
        "process_docs: !function evil.run",
        "include: base.yaml\nprocess_docs: null",
        "include: base.yaml",
        "unsafe_code: true",
    ],
)
def test_code_outside_the_package_needs_trust(more, own_suite, tmp_path):
    (tmp_path / "evil.py").write_text(
        "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\ndef run(d): return d\n"
    )
    (tmp_path / "base.yaml").write_text("process_docs: !function evil.run\n")
    path = own_suite(more=more)
    with pytest.raises(UsageError, match="--trust-suite"):
        load_suite(path)
    assert not (tmp_path / "evil.ran").exists()
    if "unsafe" not in more:
        assert len(load_suite(path, trust_suite=True).samples()) == 5
        assert (tmp_path / "evil.ran").exists()


def test_python_tags_are_never_loaded(own_suite):
    with pytest.raises(DataError, match="not valid YAML"):
        load_suite(own_suite(more="description: !!python/object/apply:os.getcwd []"), trust_suite=True)


def test_templates_run_in_a_sandbox(own_suite):
    with pytest.raises(DataError, match=r"unsafe|SecurityError"):
        load_suite(own_suite(prompt="{{ ''.__class__.__mro__[1].__subclasses__() }}"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("task: [", "not valid YAML"),
        ("- a\n- b\n", "not a mapping"),
        ("include: x.yaml\ntask: x\n", "includes itself"),
    ],
)
def test_a_broken_suite_file_is_one_sentence(content, why, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=why):
        load_suite(str(path))


def test_a_missing_suite_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="there is no suite file"):
        find_suite(str(tmp_path / "none.yaml"))


def test_a_task_of_lm_eval_is_found_by_its_exact_name():
    assert find_suite("lm-eval/gsm8k").path.name == "gsm8k.yaml"
    with pytest.raises(UnknownNameError, match="did you mean lm-eval/gsm8k"):
        find_suite("lm-eval/gsm8kk")


def test_a_task_of_lm_eval_loads_with_its_own_prompt(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([gsm8k_row(n) for n in range(30)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict(train=rows, test=rows))
    suite = load_suite("lm-eval/gsm8k")
    sample = suite.samples()[0]
    assert sample.prompt.count("Question:") == 6 and sample.prompt.endswith("\nAnswer:")
    assert suite.grade(sample, "#### 0").score == 1.0 and suite.grade(sample, "none").parse_status == "no_answer"
    assert suite.primary_metric == "exact_match,strict-match" and suite.generation.max_new_tokens == 256


def test_tasks_that_score_whole_texts_are_refused():
    with pytest.raises(UsageError, match="loglikelihood_rolling task, which has no prompt"):
        load_suite("lm-eval/wikitext")


def test_a_task_of_lm_eval_without_network_fails_soon(no_hub):
    started = time.monotonic()
    with pytest.raises(DataError, match="no data for lm-eval/gsm8k") as caught:
        load_suite("lm-eval/gsm8k")
    for way in ("gsm8k/test.jsonl[.gz]", "gsm8k/train.jsonl[.gz]", "--data-dir", "FLASHMEM_DATA", "network", "HF_HOME"):
        assert way in str(caught.value)
    assert time.monotonic() - started < 10


# With the real files, where somebody has them


@pytest.mark.skipif(not os.environ.get("FLASHMEM_DATA"), reason="FLASHMEM_DATA is not set")
def test_the_real_files_have_the_published_sizes():
    folder = Path(os.environ["FLASHMEM_DATA"])
    if (folder / "gsm8k").is_dir():
        suite = load_suite("gsm8k")
        assert len(suite.samples()) == 1319
        assert len(suite.samples("train")) + len(suite.samples("calibration")) == 7473
        assert all(suite.grade(sample, sample.target).score == 1.0 for sample in suite.samples())
    if (folder / "babi").is_dir():
        samples = load_suite("babi").samples()
        assert len(samples) == 20000 and len({sample.stratum for sample in samples[:20]}) == 20


def test_settings_of_the_training_split_leave_the_others_alone():
    suite = load_suite("hops")
    train = suite.samples("train")
    assert {train[i].doc["k"] for i in range(48)} == {2} and {train[-1 - i].doc["k"] for i in range(48)} == {1, 2}
    for split in ("test", "validation"):
        assert {suite.samples(split)[i].doc["k"] for i in range(48)} == {1, 2, 3, 4}
    chosen = load_suite("hops", settings={"facts": 7})
    assert {chosen.samples(split)[i].doc["facts"] for split in ("train", "test") for i in range(12)} == {7}


@pytest.mark.parametrize(("count", "limit"), [(200, 100), (16000, 8000), (2000, 300), (7, 5)])
def test_a_spread_choice_covers_the_rows_and_every_stratum_that_takes_turns(count, limit):
    chosen = spread(range(count), limit)
    assert chosen == sorted(set(chosen)) and len(chosen) == limit
    assert chosen == spread(range(count), limit)
    assert max(b - a for a, b in pairwise([-1, *chosen, count])) <= 2 * -(-count // limit)
    if limit >= 100:
        shares = [sum(index % 4 == turn for index in chosen) / limit for turn in range(4)]
        assert max(shares) < 0.33 and min(shares) > 0.17
    assert spread(range(count), None) == spread(range(count), count) == list(range(count))


def test_lessons_are_equal_parts_of_the_training_split_alone():
    flashmem, sizes = {"alias": "hops"}, {"test": 6, "train": 12}
    lessons = [{"k": [2]}, {"k": [2, 1]}, {"facts": 5}]
    splits = generated(flashmem=flashmem, sizes=sizes, training=lessons)
    rows = list(splits["train"])
    assert [row["lesson"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({row["id"] for row in rows}) == 12
    assert {row["k"] for row in rows[:4]} == {2} and {row["k"] for row in rows[4:8]} == {1, 2}
    assert {row["facts"] for row in rows[:8]} == {12} and {row["facts"] for row in rows[8:]} == {5}
    assert not any("lesson" in row for row in splits["test"])
    plain = generated(flashmem=flashmem, sizes=sizes, training=lessons[0])
    assert not any("lesson" in row for row in plain["train"])
