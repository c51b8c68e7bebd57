"""The same samples through lm-eval's Hugging Face model and through our `vanilla`: prompts, texts and scores are equal.

In float32 on the bundled backbone, sample by sample. Both are lm-eval's evaluation loop; what differs is who answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from flashmem_bench.lm_eval_model import FlashMemLM
from flashmem_bench.models import bundled_weights
from flashmem_bench.tasks import load_suite
from tests.test_lm_eval_both_ways import arc_row, evaluated
from tests.test_suites import gsm8k_row, write_jsonl

BUNDLED = ("flashmem_hops", "flashmem_recall", "flashmem_wordmath")
SAMPLES = 5


@pytest.fixture(scope="module")
def models() -> tuple[HFLM, FlashMemLM]:
    theirs = HFLM(pretrained=str(bundled_weights()), device="cpu", dtype="float32", batch_size=1)
    return theirs, FlashMemLM(method="vanilla", device="cpu", dtype="float32")


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up rows in the schemas of gsm8k and ARC."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_jsonl(tmp_path / "gsm8k/train.jsonl", [gsm8k_row(n) for n in range(100, 110)])
    write_jsonl(tmp_path / "gsm8k/test.jsonl", [gsm8k_row(n) for n in range(20, 28)])
    write_jsonl(tmp_path / "arc_challenge/test.jsonl", [arc_row(n) for n in range(8)])
    return tmp_path


def both(models: Any, tasks: Any, *, chat: bool, limit: int = SAMPLES) -> list[dict[str, Any]]:
    return [evaluated(model, tasks(), limit=limit, chat=chat) for model in models]


def in_order(found: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return sorted(found["samples"][task], key=lambda sample: (sample["doc_id"], sample["filter"]))


def assert_equal(theirs: dict[str, Any], ours: dict[str, Any], task: str) -> None:
    for one, other in zip(in_order(theirs, task), in_order(ours, task), strict=True):
        assert one["prompt_hash"] == other["prompt_hash"] and one["arguments"] == other["arguments"]
        assert one["resps"] == other["resps"] and one["filtered_resps"] == other["filtered_resps"]
    scores = [{k: v for k, v in found["results"][task].items() if "," in k} for found in (theirs, ours)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("chat", [True, False])
def test_bundled_suites(models: Any, chat: bool) -> None:
    theirs, ours = both(models, lambda: list(BUNDLED), chat=chat)
    for task in BUNDLED:
        assert_equal(theirs, ours, task)
    if chat:
        # Prompts and scores of `run`, which always puts the template around a prompt.
        suite = load_suite("wordmath")
        for sample, found in zip(suite.samples()[:SAMPLES], in_order(ours, "flashmem_wordmath")[::2], strict=True):
            context = found["arguments"][0][0]
            assert models[1].tok_encode(context) == models[1].backbone.encode_chat(sample.prompt)
        assert 0 < theirs["results"]["flashmem_wordmath"]["exact_match,strict-match"] <= 1


def test_a_generating_task_of_lm_eval(models: Any, local: Path) -> None:
    tasks = lambda: [load_suite("lm-eval/gsm8k_cot_zeroshot", data_dir=local).task]
    theirs, ours = both(models, tasks, chat=True, limit=2)
    assert_equal(theirs, ours, "gsm8k_cot_zeroshot")


@pytest.mark.parametrize("chat", [True, False])
def test_a_task_of_given_answers(models: Any, local: Path, chat: bool) -> None:
    theirs, ours = both(models, lambda: [load_suite("lm-eval/arc_challenge", data_dir=local).task], chat=chat)
    for one, other in zip(in_order(theirs, "arc_challenge"), in_order(ours, "arc_challenge"), strict=True):
        assert one["arguments"] == other["arguments"]
        pairs = [[response[0] for response in sample["resps"]] for sample in (one, other)]
        for (value, greedy), (again, same) in zip(*pairs, strict=True):
            assert float(value) == pytest.approx(float(again), abs=1e-4) and str(greedy) == str(same)
        assert (one["acc"], one["acc_norm"]) == (other["acc"], other["acc_norm"])
