"""lm-eval's tasks through our harness, and our methods and files through lm-eval's own evaluation."""

from __future__ import annotations

import json
import subprocess
import sys

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from flashmem_bench.errors import DataError, UsageError
from flashmem_bench.lm_eval_model import FlashMemLM
from flashmem_bench.store import ResultStore
from flashmem_bench.suites import suites_dir
from flashmem_bench.tasks import load_suite
from tests.test_suites import gsm8k_row, write_jsonl

ARC = {"text": ["Ice", "Steam", "Rain", "Dew"], "label": ["A", "B", "C", "D"]}


def arc_row(number: int) -> dict:
    return {"id": f"q{number}", "question": f"What is {number}?", "choices": ARC, "answerKey": "ABCD"[number % 4]}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with made-up rows in the schemas of the real files; no way to the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    folder = tmp_path / "data"
    write_jsonl(folder / "gsm8k/train.jsonl.gz", [gsm8k_row(n) for n in range(100, 140)])
    write_jsonl(folder / "gsm8k/test.jsonl", [gsm8k_row(n) for n in range(500, 507)])
    write_jsonl(folder / "arc_challenge/test.jsonl", [arc_row(n) for n in range(6)])
    write_jsonl(folder / "arc_challenge/validation.jsonl", [arc_row(n) for n in range(20, 24)])
    return folder


# lm-eval's tasks through our harness


def test_a_task_of_lm_eval_reads_the_data_folder(data, monkeypatch):
    suite = load_suite("lm-eval/gsm8k", data_dir=data)
    sample = suite.samples()[0]
    assert sample.sample_id == "gsm8k-test-00000" and len(suite.samples()) == 7
    # Five examples from the training rows, as the task says.
    assert sample.prompt.count("Question:") == 6 and sample.prompt.endswith(
        "Kim has 500 pens and finds 500. How many?\nAnswer:"
    )
    assert suite.grade(sample, "#### 1000").score == 1.0
    monkeypatch.setenv("FLASHMEM_DATA", str(data))
    assert load_suite("lm-eval/gsm8k").content_hash == suite.content_hash


def test_rows_of_the_folder_are_those_of_the_hub(data, monkeypatch):
    import datasets

    local = load_suite("lm-eval/gsm8k", data_dir=data)
    train = datasets.Dataset.from_list([gsm8k_row(n) for n in range(100, 140)])
    test = datasets.Dataset.from_list([gsm8k_row(n) for n in range(500, 507)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict(train=train, test=test))
    remote = load_suite("lm-eval/gsm8k")
    assert remote.content_hash == local.content_hash
    assert [sample.prompt for sample in remote.samples()] == [sample.prompt for sample in local.samples()]


def test_absent_files_are_left_out_where_nothing_needs_them(data):
    suite = load_suite("lm-eval/arc_challenge", data_dir=data)
    assert [sample.answer for sample in suite.samples()][:5] == ["Ice", "Steam", "Rain", "Dew", "Ice"]
    assert suite.primary_metric == "acc,none" and len(suite.samples("calibration")) == 4
    with pytest.raises(UsageError, match="no data for train"):
        suite.samples("train")
    (data / "arc_challenge/validation.jsonl").unlink()
    with pytest.raises(UsageError, match="no data for calibration"):
        load_suite("lm-eval/arc_challenge", data_dir=data).samples("calibration")
    (data / "arc_challenge/test.jsonl").unlink()
    with pytest.raises(DataError, match=r"arc_challenge holds neither test.jsonl nor test.jsonl.gz"):
        load_suite("lm-eval/arc_challenge", data_dir=data)
    (data / "gsm8k/train.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"gsm8k holds neither train.jsonl"):
        load_suite("lm-eval/gsm8k", data_dir=data)


def test_a_folder_named_after_the_data_set_serves_tasks_over_it_with_one_configuration(data):
    suite = load_suite("lm-eval/gsm8k_cot_zeroshot", data_dir=data)
    assert len(suite.samples()) == 7
    # arc_easy is another configuration of the data set behind arc_challenge.
    (data / "arc_challenge").rename(data / "ai2_arc")
    with pytest.raises(DataError, match=r"no data for lm-eval/arc_easy.*arc_easy/test.jsonl\[.gz\]"):
        load_suite("lm-eval/arc_easy", data_dir=data)


def test_broken_rows_of_a_task_are_named_and_can_be_left_out(data):
    path = write_jsonl(data / "arc_challenge/test.jsonl", [arc_row(0), "{oops", arc_row(1)])
    with pytest.raises(DataError, match="row 2 is broken") as caught:
        load_suite("lm-eval/arc_challenge", data_dir=data)
    assert str(path) in str(caught.value)
    suite = load_suite("lm-eval/arc_challenge", data_dir=data, skip_bad_rows=True)
    assert (len(suite.samples()), suite.bad_rows) == (2, 1)


def test_tasks_of_lm_eval_run_and_are_reported_like_our_own(data, bench, tmp_path):
    results = bench.results(tmp_path / "results")
    for name in ("lm-eval/gsm8k", "lm-eval/arc_challenge"):
        bench.suites[name] = load_suite(name, data_dir=data)
    (generated, judged) = bench.run(results, "lm-eval/gsm8k,lm-eval/arc_challenge", "vanilla", limit=2)
    assert generated.status == judged.status == "complete"
    assert [row["finish_reason"] for row in judged.rows] == ["scored", "scored"]
    assert {cell.get("suite") for cell in ResultStore(results).cells()} == {"lm-eval/gsm8k", "lm-eval/arc_challenge"}


# Our methods as a model of lm-eval


def evaluated(lm, tasks, *, limit: int = 3, chat: bool = True):
    """Run lm-eval's evaluation of tasks, or of suites of ours by name, less the notes on the machine that it takes."""
    if isinstance(tasks[0], str):
        manager = TaskManager(include_path=str(suites_dir()), include_defaults=False)
        tasks = manager.load(tasks)["tasks"].values()
    for task in tasks:
        task.set_fewshot_seed(1234)
    return lm_eval.evaluate(
        lm, {"tasks": {task.task_name: task for task in tasks}}, limit=limit, bootstrap_iters=0,
        apply_chat_template=chat, fewshot_as_multiturn=False,
    )  # fmt: skip


@pytest.fixture
def results(bench, tmp_path):
    return bench.results(tmp_path / "results")


@pytest.mark.parametrize("method", ["vanilla", "flashmem", "flashmem-prompt-end", "snapkv", "lora-sft"])
def test_lm_evals_evaluation_gives_the_answers_of_a_run(method, bench, results):
    """The method, its memory, its threshold for the stratum and its prompts are those of `run`."""
    lm = FlashMemLM(model=str(bench.model), method=method, results_dir=results, backbone=bench.backbone)
    found = evaluated(lm, ["flashmem_recall"])
    theirs = sorted(found["samples"]["flashmem_recall"], key=lambda sample: sample["doc_id"])
    (result,) = bench.run(results, "recall", method, limit=3)
    (cell,) = ResultStore(results).find(suite="recall", method=method)
    texts = cell.texts()
    budget = bench.suites["recall"].generation.max_new_tokens
    for row, sample, record in zip(result.rows, theirs, lm.generations, strict=True):
        assert sample["resps"] == [[texts[row["sample_id"]]["text"]]]
        assert row["score"] == sample["exact_match"] and row["triggers"] == len(record.triggers)
        assert row["positions_encoded"] == record.positions_encoded and record.output_tokens <= budget
    score = found["results"]["flashmem_recall"]["exact_match,first-line"]
    assert score == pytest.approx(sum(row["score"] for row in result.rows) / 3)


@pytest.mark.parametrize("method", ["vanilla", "flashmem", "snapkv", "memgen-cached"])
def test_batches_of_lm_eval_give_the_answers_of_single_requests(method, bench, results):
    """The record of each request stands at its place, whichever was finished first."""
    found = []
    for size in (1, 3):
        lm = FlashMemLM(
            model=str(bench.model), method=method, results_dir=results, backbone=bench.backbone, batch_size=size,
            settings="sampling.temperature=1.0",
        )  # fmt: skip
        evaluation = evaluated(lm, ["flashmem_hops"], limit=7)
        samples = sorted(evaluation["samples"]["flashmem_hops"], key=lambda sample: sample["doc_id"])
        texts = [sample["resps"][0][0] for sample in samples]
        assert [record.text for record in lm.generations] == texts
        found.append([(record.token_ids, [t.text_index for t in record.triggers]) for record in lm.generations])
    assert found[0] == found[1] and len(found[0]) == 7


def test_likelihoods_through_lm_eval_are_those_of_a_run(data, bench, results):
    """The same given answers with a memory at the prompt end, both ways."""
    name = "lm-eval/arc_challenge"
    bench.suites[name] = suite = load_suite(name, data_dir=data)
    joint = results / "checkpoints" / bench.model.name / "joint"
    lm = FlashMemLM(
        model=str(bench.model), method="flashmem-prompt-end", checkpoint=str(joint / "flashmem" / "seed0"),
        results_dir=results, backbone=bench.backbone,
    )  # fmt: skip
    found = evaluated(lm, [suite.task])
    (result,) = bench.run(results, name, "flashmem-prompt-end", limit=3, checkpoint=str(joint / "flashmem" / "seed0"))
    (cell,) = ResultStore(results).find(suite=name, method="flashmem-prompt-end")
    for row, sample in zip(result.rows, found["samples"]["arc_challenge"], strict=True):
        values = json.loads(cell.texts()[row["sample_id"]]["text"])["log_likelihoods"]
        assert [float(pair[0][0]) for pair in sample["resps"]] == pytest.approx(values, abs=1e-5)
        assert row["metric.acc_norm,none"] == sample["acc_norm"]
    # One record a question: its four answers share the context and the memory.
    assert [len(record.triggers) for record in lm.generations] == [1, 1, 1]


def test_prompts_without_a_template_are_plain_text(bench, results):
    lm = FlashMemLM(model=str(bench.model), method="vanilla", results_dir=results, backbone=bench.backbone)
    plain = evaluated(lm, ["flashmem_hops"], limit=1, chat=False)
    prompt = load_suite("hops").samples()[0].prompt
    assert plain["samples"]["flashmem_hops"][0]["arguments"][0][0] == prompt
    assert lm.generations[0].prompt_tokens == len(bench.backbone.encode(prompt))
    assert lm.tokenizer_name == bench.model.name and lm.chat_template(True) == bench.backbone.tokenizer.chat_template


def test_settings_seeds_and_repeats(bench, results):
    from lm_eval.api.instance import Instance

    def draws(seed: int) -> list[str]:
        lm = FlashMemLM(
            model=str(bench.model), method="flashmem", suite="hops", results_dir=results, seed=seed,
            settings="trigger.threshold=0;trigger.max_injections=1", backbone=bench.backbone,
        )  # fmt: skip
        arguments = ("Say something", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": ["zz"]})
        request = Instance("generate_until", {}, arguments, 0, metadata=("any", 0, 3))
        texts = lm.generate_until([request] * 3)
        assert [len(record.triggers) for record in lm.generations] == [1, 1, 1]
        return texts

    assert len(set(draws(0))) == 3 and draws(0) == draws(0) != draws(1)


def test_a_prompt_that_is_too_long_is_cut_on_the_left_and_said(bench, results, caplog):
    from lm_eval.api.instance import Instance

    lm = FlashMemLM(model=str(bench.model), method="vanilla", results_dir=results, backbone=bench.backbone)
    long = Instance("generate_until", {}, ("w" * 3000, {"max_gen_toks": 4}), 0, metadata=("any", 0, 1))
    lm.generate_until([long])
    assert lm.generations[0].prompt_tokens == 2044 and "cut on the left" in caplog.text
    likely = Instance("loglikelihood", {}, ("w" * 3000, "abc"), 0, metadata=("any", 0, 1))
    lm.loglikelihood([likely])
    assert lm.generations[0].prompt_tokens == 2045


def test_what_cannot_be_is_refused_in_a_sentence(bench, results):
    from lm_eval.api.instance import Instance

    options = {"model": str(bench.model), "results_dir": results, "backbone": bench.backbone}
    with pytest.raises(UsageError, match="matched to a flashmem cell"):
        FlashMemLM(method="flashmem-random-trigger", **options)
    request = Instance("loglikelihood", {}, ("a", "b"), 0, metadata=("hellaswag", 0, 1))
    with pytest.raises(UsageError, match="cot-sc cannot judge given answers, which is what lm-eval/hellaswag"):
        FlashMemLM(method="cot-sc", **options).loglikelihood([request])
    with pytest.raises(NotImplementedError, match="has no prompt"):
        FlashMemLM(method="vanilla", **options).loglikelihood_rolling([request])


def test_a_placebo_takes_its_memories_from_the_suite(bench, results, monkeypatch):
    monkeypatch.setattr("flashmem_bench.banks.MIN_OTHERS", 2)
    lm = FlashMemLM(
        model=str(bench.model), method="flashmem-mean-memory", results_dir=results, backbone=bench.backbone,
        settings={"trigger.threshold": 0.0},
    )  # fmt: skip
    evaluated(lm, ["flashmem_hops"], limit=1)
    assert lm.generations[0].triggers and list((results / "banks").glob("*.safetensors"))


def test_simple_evaluate_finds_the_model_by_name(bench, results):
    # The device is what lm-eval's command line gives unasked.
    arguments = {"model": str(bench.model), "method": "vanilla", "results_dir": str(results), "device": "cuda:0"}
    found = lm_eval.simple_evaluate(
        model="flashmem", model_args=arguments, tasks=["flashmem_hops"], limit=1, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(suites_dir()), include_defaults=False),
    )  # fmt: skip
    assert "exact_match,first-line" in found["results"]["flashmem_hops"]
    # Registering ours must not keep lm-eval from knowing its own.
    code = (
        "import flashmem_bench.lm_eval_model; from lm_eval.api.registry import get_model;"
        "print(get_model('hf').__name__, get_model('flashmem').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["HFLM", "FlashMemLM"]


# Names


def test_our_files_keep_clear_of_lm_evals_names(data):
    """Both answer to their own name: indexed together only where somebody has half a minute, see below."""
    ours = TaskManager(include_path=str(suites_dir()), include_defaults=False)
    assert "flashmem_gsm8k" in ours.all_tasks and "gsm8k" not in ours.all_tasks
    assert all(name.startswith("flashmem_") for name in ours.all_tasks)
    own, theirs = load_suite("gsm8k", data_dir=data), load_suite("lm-eval/gsm8k", data_dir=data)
    assert (own.task.config.task, theirs.task.config.task) == ("flashmem_gsm8k", "gsm8k")
    assert own.samples()[0].prompt != theirs.samples()[0].prompt


@pytest.mark.slow
def test_with_every_task_indexed_both_names_are_there(data):
    manager = TaskManager(include_path=str(suites_dir()), metadata={"data_dir": str(data)})
    assert {"gsm8k", "flashmem_gsm8k", "arc_challenge"} <= set(manager.all_tasks)
    assert manager.task_index["gsm8k"].yaml_path.parent.name == "gsm8k"
    loaded = manager.load(["flashmem_gsm8k"])["tasks"]["flashmem_gsm8k"]
    assert len(loaded.eval_docs) == 7
