"""Suites whose answers are given: requests, grades and rows, with and without a memory, against lm-eval's own."""

from __future__ import annotations

import json
import shutil

import pytest

from flashmem_bench.errors import DataError, UsageError
from flashmem_bench.likelihood import Encoded, ScoringMethod, encode_pairs, encoder, without_context
from flashmem_bench.methods.base import BuildContext
from flashmem_bench.registry import get_method
from flashmem_bench.samples import Likelihoods
from flashmem_bench.settings import Settings, resolve
from flashmem_bench.store import ResultStore
from flashmem_bench.tasks import load_suite
from tests.test_suites import write_jsonl

FRUIT = """
task: fruit
dataset_path: json
dataset_kwargs: {data_files: {test: fruit.jsonl, train: fruit.jsonl}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WORD = """
task: word
dataset_path: json
dataset_kwargs: {data_files: {test: fruit.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
# As in Winogrande: the choices stand in the middle, and one ending is judged behind each of them.
BLANK = """
task: blank
dataset_path: json
dataset_kwargs: {data_files: {test: fruit.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: right
doc_to_choice: "{{choices}}"
doc_to_target: "it is sweet"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
MUTUAL = FRUIT.replace("task: fruit", "task: mutual").replace("metric: acc_norm", "metric: acc_mutual_info")


@pytest.fixture
def suites(tmp_path, monkeypatch):
    """Return a function that loads one of the suites above over eight made-up rows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = ["apple", "red plum", "a pear", "fig"]
    rows = [{"question": f"Which is fruit {n}?", "choices": names, "right": n % 4} for n in range(8)]
    write_jsonl(tmp_path / "fruit.jsonl", rows)

    def load(text: str):
        path = tmp_path / f"{text.split()[1]}.yaml"
        path.write_text(text)
        return load_suite(str(path))

    return load


def method_for(bench, suite, name: str, **changes):
    """Build a method with an untrained memory; its trigger needs no calibration."""
    spec = get_method(name)
    settings = resolve({**changes}, fixed=spec.fixed, method=name)
    context = BuildContext(bench.backbone, suite, settings, {"max_new_tokens": 1, "do_sample": False})
    return ScoringMethod(spec.build(context), suite)


def judged(method, suite, sample) -> Likelihoods:
    prompt = method.backbone.encode_chat(sample.prompt)
    (record,) = method.generate([prompt], [sample], None, 0)
    return Likelihoods.from_text(record.text)


def lm_evals_own(bench, suite, sample) -> list[tuple[float, bool]]:
    """Likelihoods of a sample's requests from lm-eval's Hugging Face model, prompts made by lm-eval as well."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bench.model)
    lm = HFLM(pretrained=model, tokenizer=bench.backbone.tokenizer, batch_size=1, max_length=2048)
    task = suite.task
    context = task.fewshot_context(sample.doc, 0, apply_chat_template=True, chat_template=lm.apply_chat_template)
    built = task.construct_requests(sample.doc, context, apply_chat_template=True, metadata=(None, None, None))
    return lm.loglikelihood(built if isinstance(built, list) else [built], disable_tqdm=True)


@pytest.mark.parametrize("text", [FRUIT, WORD, BLANK, MUTUAL])
def test_without_a_memory_the_numbers_are_lm_evals(text, suites, bench):
    suite = suites(text)
    method = method_for(bench, suite, "vanilla")
    for sample in suite.samples()[:3]:
        found, wanted = judged(method, suite, sample), lm_evals_own(bench, suite, sample)
        assert found.values == pytest.approx([value for value, _ in wanted], abs=1e-4)
        assert list(found.greedy) == [greedy for _, greedy in wanted]
        grade = suite.grade(sample, found.to_text())
        results = suite.task.process_results(sample.doc, wanted)
        assert grade.metrics == {f"{name},none": pytest.approx(float(value)) for name, value in results.items()}
        assert grade.score == grade.metrics["acc,none"] and grade.parse_status == "ok"


def test_a_memory_at_the_prompt_end_changes_every_choice_and_costs_one_context(suites, bench):
    suite = suites(FRUIT)
    sample = suite.samples()[0]
    prompt = bench.backbone.encode_chat(sample.prompt)
    plain = judged(method_for(bench, suite, "vanilla"), suite, sample)
    method = method_for(bench, suite, "flashmem-prompt-end")
    (record,) = method.generate([prompt], [sample], None, 0)
    values = Likelihoods.from_text(record.text).values
    assert all(abs(a - b) > 1e-4 for a, b in zip(values, plain.values, strict=True))
    (trigger,) = record.triggers
    assert (trigger.text_index, trigger.position) == (0, len(prompt))
    tokens = sum(len(bench.backbone.encode(choice)) - 1 for choice in sample.choices)
    assert record.positions_encoded == len(prompt) + trigger.latents + tokens


def test_every_context_of_a_sample_has_its_memory_and_no_context_has_none(suites, bench):
    blank, mutual = suites(BLANK), suites(MUTUAL)
    prompt_of = bench.backbone.encode_chat
    sample = blank.samples()[0]
    (record,) = method_for(bench, blank, "flashmem-prompt-end").generate([prompt_of(sample.prompt)], [sample], None, 0)
    assert len(record.triggers) == len(sample.contexts) == 4 and sample.prompt == "apple"
    sample = mutual.samples()[0]
    (record,) = method_for(bench, mutual, "flashmem-prompt-end").generate([prompt_of(sample.prompt)], [sample], None, 0)
    assert len(record.triggers) == 1
    with_memory = Likelihoods.from_text(record.text).values
    plain = judged(method_for(bench, mutual, "vanilla"), mutual, sample).values
    # The first four stand behind the prompt and its memory, the last four behind nothing.
    assert with_memory[4:] == pytest.approx(plain[4:], abs=1e-5)
    assert with_memory[:4] != pytest.approx(plain[:4], abs=1e-4)


def test_samples_carry_their_choices_and_targets(suites):
    sample = suites(FRUIT).samples()[1]
    assert sample.choices == ("apple", "red plum", "a pear", "fig")
    assert (sample.prompt, sample.target, sample.answer) == ("Which is fruit 1?\nAnswer:", "red plum", "red plum")
    suite = suites(WORD)
    assert suite.samples()[0].choices == (" apple",) and suite.primary_metric == "acc,none"
    assert suite.given_answers and suite.generation.max_new_tokens == 1


def test_the_delimiter_is_lm_evals_and_a_template_takes_it_away(suites):
    suite = suites(FRUIT)
    sample = suite.samples()[0]
    assert suite.requests(sample, templated=False)[1] == (sample.prompt, " red plum")
    assert suite.requests(sample, templated=True)[1] == (sample.prompt, "red plum")


def test_grades_choose_the_likeliest_and_survive_nonsense(suites):
    suite = suites(FRUIT)
    sample = suite.samples()[2]
    grade = suite.grade(sample, Likelihoods((-9.0, -2.2, -2.0, -2.0), (False,) * 4).to_text())
    assert (grade.score, grade.extracted, grade.metrics["acc_norm,none"]) == (1.0, "a pear", 0.0)
    assert suite.grade(sample, "a pear").parse_status == "error"
    assert suite.grade(sample, Likelihoods((-1.0,), (True,)).to_text()).parse_status == "error"


def test_an_empty_choice_is_named(suites, tmp_path):
    suite = suites(FRUIT)
    rows = [{"question": "?", "choices": choices, "right": 0} for choices in (["x", "y"], ["x", ""])]
    write_jsonl(tmp_path / "fruit.jsonl", rows)
    suite = load_suite(str(suite.info.path))
    with pytest.raises(DataError, match="choice of fruit-test-00001 is empty"):
        suite.requests(suite.samples()[1], templated=True)


def test_rows_texts_and_the_report_of_a_run(suites, bench, tmp_path):
    from flashmem_bench.report.tables import build_tables

    suite = suites(FRUIT)
    path = str(suite.info.path)
    results = bench.results(tmp_path / "results")
    joint = results / "checkpoints" / bench.model.name / "joint"
    shutil.copytree(joint, joint.with_name("fruit"))
    bench.suites[path] = suite
    methods = "vanilla,flashmem,flashmem-prompt-end,flashmem-mean-memory,flashmem-random-trigger,memgen,memgen-cached"
    found = bench.run(results, path, f"{methods},lora-sft,prompt-tuning", limit=3,
                      settings={"trigger.threshold": 0.0})  # fmt: skip
    assert [result.status for result in found] == ["complete"] * len(found)
    by_method = {result.method: result.rows for result in found}
    for method, rows in by_method.items():
        assert len(rows) == 3
        for row in rows:
            assert (row["output_tokens"], row["finish_reason"], row["truncated"]) == (0, "scored", False)
            assert row["score"] in (0.0, 1.0) and row["answer_extracted"] in ("apple", "red plum", "a pear", "fig")
            assert row["metric.acc,none"] == row["score"] and "metric.acc_norm,none" in row
            wrote = method not in ("vanilla", "lora-sft")
            assert row["triggers"] == int(wrote) and (row["latent_tokens"] > 0) == wrote
            assert row["e2e_ms"] >= row["prefill_ms"] > 0 and row["tpot_ms"] is None
    encoded = {method: [row["positions_encoded"] for row in rows] for method, rows in by_method.items()}
    assert encoded["flashmem"] == [n + 4 for n in encoded["vanilla"]]
    scores = {row["method"]: row for row in build_tables(ResultStore(results))["runs"].to_dict("records")}
    assert scores["vanilla"]["n_scored"] == 3 and scores["flashmem"]["trigger_rate"] == 1.0
    (cell,) = ResultStore(results).find(suite="fruit", method="memgen")
    (same,) = ResultStore(results).find(suite="fruit", method="memgen-cached")
    for name, text in cell.texts().items():
        ours, theirs = (Likelihoods.from_text(entry["text"]) for entry in (text, same.texts()[name]))
        assert ours.values == pytest.approx(theirs.values, abs=1e-4)


def test_batches_and_evicted_prompts(suites, bench, tmp_path):
    suite = suites(FRUIT)
    path = str(suite.info.path)
    bench.suites[path] = suite
    results = bench.results(tmp_path / "results")
    (one,) = bench.run(results, path, "vanilla", limit=3)
    (four,) = bench.run(results, path, "vanilla", limit=3, batch_size=4)
    keys = ("score", "positions_encoded", "metric.acc_norm,none")
    assert [[row[k] for k in keys] for row in one.rows] == [[row[k] for k in keys] for row in four.rows]
    (evicted,) = bench.run(results, path, "tova", limit=2, settings={"eviction.budget": 8})
    assert all(row["positions_evicted"] > 0 and row["error"] is None for row in evicted.rows)


def test_a_method_that_cannot_judge_says_so_before_anything_is_loaded(suites, bench, tmp_path):
    path = str(suites(FRUIT).info.path)
    with pytest.raises(UsageError, match="cot-sc cannot judge given answers, which is what fruit asks for"):
        bench.run(bench.results(tmp_path / "results"), path, "cot-sc", limit=1)


def test_a_long_prompt_is_cut_so_that_its_longest_choice_fits(suites, bench, tmp_path):
    write_jsonl(tmp_path / "fruit.jsonl", [{"question": "w" * 3000, "choices": ["x", "y" * 40], "right": 0}])
    path = tmp_path / "fruit.yaml"
    path.write_text(FRUIT)
    results = bench.results(tmp_path / "results")
    (refused,) = bench.run(results, str(path), "vanilla", limit=1)
    assert refused.status == "failed" and "--truncate" in refused.error
    (cut,) = bench.run(results, str(path), "vanilla", limit=1, truncate="left")
    (row,) = cut.rows
    assert row["prompt_truncated"] and row["error"] is None and row["prompt_tokens"] == 2048 - 40


def test_contexts_are_encoded_as_lm_eval_does(bench):
    encode, around = encoder(bench.backbone)
    found = encode_pairs(encode, around("Hi"), ["a", "bc"])
    assert found.prompt == bench.backbone.encode_chat("Hi") and found.tail == 0
    # White space at the end of a context: judged with the continuation, still in front of the memory.
    found = encode_pairs(encode, "Hi \n", ["a", "bc"])
    assert found.prompt == encode("Hi \n") and found.tail == 2
    assert found.continuations == [encode("a"), encode("bc")]

    def merging(text: str) -> list[int]:
        """A tokenizer that makes one token of a space and the word behind it."""
        return [hash(word) for word in text.replace(" ", "| ").split("|") if word]

    merged = encode_pairs(merging, "Hi there ", ["you", "all of"])
    assert merged.prompt == merging("Hi there") and (merged.tail, merged.dropped) == (0, 1)
    assert merged.continuations == [merging(" you"), merging(" all of")]
    alone = without_context(bench.backbone, ["a"])
    assert alone == Encoded([bench.backbone.tokenizer.eos_token_id], [encode("a")])


def test_likelihoods_are_stored_without_loss():
    found = Likelihoods((-1.2345678901234567, -0.0), (True, False))
    assert Likelihoods.from_text(found.to_text()) == found
    for text in ("", "[]", "{}", '{"log_likelihoods": 3, "greedy": []}', json.dumps({"log_likelihoods": ["x"]})):
        with pytest.raises(ValueError):
            Likelihoods.from_text(text)


def test_traces_of_given_answers_are_left_out_with_a_sentence(suites, bench, tmp_path):
    from flashmem_bench.session import Session
    from flashmem_bench.tracing import trace_cells

    suite = suites(FRUIT)
    path = str(suite.info.path)
    results = bench.results(tmp_path / "results")
    request = bench.request(results, path, "vanilla", limit=1)
    session = Session(request, bench.backbone, {path: suite, "fruit": suite})
    from flashmem_bench.runner import run_grid

    notes: list[str] = []
    assert trace_cells(session, run_grid(request, session=session), 1, notes.append) == []
    assert "no stories" in notes[0]


def test_calibration_sees_the_prompt_end_alone(suites, bench):
    from flashmem_bench.session import generation_arguments
    from flashmem_bench.thresholds import calibrate_suite

    suite = suites(FRUIT)
    arguments = generation_arguments(bench.backbone, suite, Settings())
    found = calibrate_suite(
        bench.backbone, suite, settings=Settings(), generation=arguments, limit=2, percentile=85.0, seed=0
    )
    entry = found["attention-entropy"].by_stratum[""]
    assert entry.n_steps == entry.n_samples == 1
