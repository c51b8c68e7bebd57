"""Suites of one's own: one YAML and one JSONL in any folder, graders by name, and nothing that runs unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashmem_bench.cli import run as command
from flashmem_bench.errors import DataError, UnknownNameError, UsageError
from flashmem_bench.grading.named import GRADERS
from flashmem_bench.tasks import load_suite
from tests.test_suites import write_jsonl

# The README's example, word for word.
YAML = """\
task: my_sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}\\nEnd with \\"#### \\" and the number."
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 64}
metadata:
  version: 1.0
  flashmem: {grader: numbers, extractor: marked-number, licence: my own}
"""
JSONL = """\
{"question": "Ana has 3 pens and finds 4. How many pens has she?", "answer": "3 + 4 = 7\\n#### 7"}
{"question": "Each of 5 boxes holds 6 cups. How many cups are there?", "answer": "5 * 6 = 30\\n#### 30"}
"""
COMMAND = "run --suite mine/sums.yaml --method vanilla,flashmem"


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """The example's two files in a folder that is not the one where commands run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "sums.yaml").write_text(YAML)
    (folder / "sums.jsonl").write_text(JSONL)
    return folder


def changed(folder: Path, old: str, new: str) -> str:
    path = folder / "sums.yaml"
    assert old in YAML
    path.write_text(YAML.replace(old, new))
    return str(path)


def test_the_example_runs_as_it_is_written(mine, monkeypatch, capfd):
    monkeypatch.chdir(mine.parent)
    assert command([*COMMAND.split(), "--quiet"]) == 0, capfd.readouterr().err
    rows = [json.loads(line) for line in next(mine.parent.glob("results/runs/sums/flashmem/*/samples.jsonl")).open()]
    assert [row["sample_id"] for row in rows] == ["sums-test-00000", "sums-test-00001"]
    assert all(row["score"] in (0.0, 1.0) and row["error"] is None for row in rows)


def test_the_named_grader_reads_the_answer_out_of_the_target(mine):
    suite = load_suite(str(mine / "sums.yaml"))
    sample = suite.samples()[0]
    assert sample.target == "3 + 4 = 7\n#### 7" and suite.primary_metric == "exact_match,marked-number"
    assert suite.grade(sample, "so it is\n#### 7.00").score == 1.0
    assert suite.grade(sample, "#### 8").extracted == "8" and suite.grade(sample, "#### 8").score == 0.0
    assert suite.grade(sample, "7").parse_status == "no_answer"


def test_a_grader_brings_its_own_extractor(mine):
    suite = load_suite(changed(mine, "grader: numbers, extractor: marked-number", "grader: numbers"))
    assert suite.primary_metric == "exact_match,last-number"
    assert suite.grade(suite.samples()[1], "that makes 30").score == 1.0
    words = load_suite(changed(mine, "grader: numbers, extractor: marked-number", "grader: words"))
    assert words.grade(words.samples()[1], "5 * 6 = 30 ").score == 1.0


def test_the_grader_is_part_of_the_suites_content(mine):
    hashes = {
        load_suite(changed(mine, "grader: numbers, extractor: marked-number", how)).content_hash
        for how in ("grader: numbers, extractor: marked-number", "grader: numbers", "grader: words")
    }
    assert len(hashes) == 3
    same = load_suite(changed(mine, "licence: my own", "licence: another, source: somewhere")).content_hash
    (mine / "sums.yaml").write_text(YAML)
    assert load_suite(str(mine / "sums.yaml")).content_hash == same


def test_a_rows_own_gold_wins_over_its_target(mine):
    rows = [{"question": "?", "answer": "no number here", "gold": 12}]
    write_jsonl(mine / "sums.jsonl", rows)
    suite = load_suite(str(mine / "sums.yaml"))
    assert suite.grade(suite.samples()[0], "#### 12").score == 1.0


@pytest.mark.parametrize(
    ("how", "error", "why"),
    [
        ("grader: numbrs", UnknownNameError, "no grader named 'numbrs' .did you mean numbers"),
        ("grader: numbers, extractor: marked_number", UnknownNameError, "did you mean marked-number"),
        ("extractor: last-number", UsageError, "names the extractor last-number and no grader"),
    ],
)
def test_names_that_do_not_exist_are_told(how, error, why, mine):
    with pytest.raises(error, match=why):
        load_suite(changed(mine, "grader: numbers, extractor: marked-number", how))


def test_every_named_grader_says_its_own_metric(mine):
    assert {"numbers", "words"} <= set(GRADERS)
    for name, grader in GRADERS.items():
        suite = load_suite(changed(mine, "grader: numbers, extractor: marked-number", f"grader: {name}"))
        sample = suite.samples()[0]
        assert f"{grader.metric},{grader.extractor}" in suite.grade(sample, sample.target).metrics, name


def test_files_are_looked_for_beside_the_suite_then_where_the_command_runs(mine, tmp_path, monkeypatch):
    other = tmp_path / "elsewhere"
    write_jsonl(other / "sums.jsonl", [{"question": "here?", "answer": "#### 1"}] * 3)
    monkeypatch.chdir(other)
    assert len(load_suite(str(mine / "sums.yaml")).samples()) == 2
    (mine / "sums.jsonl").unlink()
    assert len(load_suite(str(mine / "sums.yaml")).samples()) == 3
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"sums.jsonl, which is neither beside it nor here"):
        load_suite(str(mine / "sums.yaml"))


def test_packed_several_and_bare_files(mine):
    write_jsonl(mine / "a.jsonl.gz", [{"question": "a", "answer": "#### 1"}])
    write_jsonl(mine / "b.jsonl", [{"question": "b", "answer": "#### 2", "hint": "more"}])
    suite = load_suite(changed(mine, "{test: sums.jsonl}", "{test: [a.jsonl.gz, b.jsonl]}"))
    assert [sample.doc["question"] for sample in suite.samples()] == ["a", "b"]
    assert [sample.doc["hint"] for sample in suite.samples()] == [None, "more"]
    bare = YAML.replace("{test: sums.jsonl}", "sums.jsonl").replace("test_split: test", "test_split: train")
    (mine / "sums.yaml").write_text(bare)
    assert len(load_suite(str(mine / "sums.yaml")).samples()) == 2


def test_other_formats_go_through_datasets_and_are_found_beside_the_suite(mine, monkeypatch, tmp_path):
    (mine / "sums.csv").write_text('question,answer\n"one?","#### 1"\n')
    data = f"dataset_path: csv\ndataset_kwargs: {{cache_dir: {tmp_path}, data_files: {{test: sums.csv}}}}"
    path = changed(mine, "dataset_path: json\ndataset_kwargs: {data_files: {test: sums.jsonl}}", data)
    monkeypatch.chdir(tmp_path)
    assert load_suite(path).samples()[0].prompt.startswith("one?")


def test_broken_rows_are_named_and_can_be_left_out(mine):
    write_jsonl(mine / "sums.jsonl", [{"question": "a", "answer": "#### 1"}, "{oops"])
    with pytest.raises(DataError, match=r"sums.jsonl: row 2 is broken.*--skip-bad-rows"):
        load_suite(str(mine / "sums.yaml"))
    suite = load_suite(str(mine / "sums.yaml"), skip_bad_rows=True)
    assert (len(suite.samples()), suite.bad_rows) == (1, 1)
    write_jsonl(mine / "sums.jsonl", [{"question": 3, "answer": "a"}, {"question": "three", "answer": "a"}])
    with pytest.raises(DataError, match="do not agree in type"):
        load_suite(str(mine / "sums.yaml"))
    (mine / "sums.jsonl").write_text("\n")
    with pytest.raises(DataError, match="split 'test' of sums is empty"):
        load_suite(str(mine / "sums.yaml"))
    with pytest.raises(DataError, match="has no data for its split 'dev'; it has test"):
        load_suite(changed(mine, "test_split: test", "test_split: dev"))


# What a file from a stranger may not do

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ question.__class__.__base__.__subclasses__() }}",
    "{{ self._TemplateReference__context }}",
    "{{ question.format.__globals__ }}",
    "{% for f in ().__class__.__bases__ %}{{ f.__subclasses__() }}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
    "{{ '{0.__class__.__mro__}'.format(question) }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_an_escape_from_a_template_is_refused_in_one_sentence(template, mine, monkeypatch, capfd):
    monkeypatch.chdir(mine)
    path = changed(mine, 'doc_to_target: "{{answer}}"', f"doc_to_target: {json.dumps(template)}")
    assert command(["run", "--suite", path, "--method", "vanilla", "--quiet"]) == 1
    error = capfd.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "a template of" in error and "mend the suite file" in error
    assert not (mine / "ran").exists() and not (mine / "results/runs").exists()


def test_an_escape_that_waits_for_a_later_row_is_refused_there(mine, monkeypatch, capfd):
    monkeypatch.chdir(mine)
    bomb = "{% if 'boxes' in question %}{{ question.__class__.__mro__ }}{% endif %}{{question}}"
    path = changed(mine, 'doc_to_text: "{{question}}', f'doc_to_text: "{bomb}')
    suite = load_suite(path)
    assert suite.samples()[0].prompt
    with pytest.raises(DataError, match="fails on row 2 of test: the sandbox that templates run in refuses it"):
        suite.samples()[1]
    with pytest.raises(DataError, match="UndefinedError"):
        load_suite(changed(mine, '"{{answer}}"', '"{{missing}}"'))
    suite = load_suite(changed(mine, '"{{answer}}"', '"{{ 1 / (question | length - 54) }}"'))
    with pytest.raises(DataError, match="fails on row 2 of test: ZeroDivisionError"):
        suite.samples()[1]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("process_docs: !function os.system", "os.system"),
        ("doc_to_text: !function os.system", "os.system"),
        ("custom_dataset: !function os.getcwd", "os.getcwd"),
        ("filter_list: [{name: x, filter: [{function: custom, filter_fn: !function os.system}]}]", "os.system"),
        ("class: os.PathLike", "class"),
        ("unsafe_code: true", "unsafe_code"),
        ("use_prompt: promptsource:x", "use_prompt"),
        ("metric_list: [{metric: accuracy, hf_evaluate: true}]", "hf_evaluate"),
        ("metric_list: [{metric: ./evil.py, aggregation: mean, higher_is_better: true}]", r"metric ./evil.py"),
        ("dataset_path: pandas", "dataset_path pandas"),
        ("dataset_path: webdataset", "dataset_path webdataset"),
        ("dataset_kwargs: {trust_remote_code: true, data_files: {test: sums.jsonl}}", "trust_remote_code"),
    ],
)
def test_code_needs_trust(line, named, mine):
    key = line.partition(":")[0]
    kept = [old for old in YAML.splitlines() if not old.startswith(f"{key}:")]
    (mine / "sums.yaml").write_text("\n".join([*kept, line]) + "\n")
    with pytest.raises(UsageError, match=rf"names code \(.*{named}.*--trust-suite"):
        load_suite(str(mine / "sums.yaml"))


def test_a_pickle_is_never_opened(mine):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (mine / "ran",))

    import pickle

    (mine / "sums.pkl").write_bytes(pickle.dumps(Bomb()))
    path = changed(mine, "dataset_path: json\ndataset_kwargs: {data_files: {test: sums.jsonl}}",
                   "dataset_path: pandas\ndataset_kwargs: {data_files: {test: sums.pkl}}")  # fmt: skip
    with pytest.raises(UsageError, match="--trust-suite"):
        load_suite(path)
    assert not (mine / "ran").exists()
