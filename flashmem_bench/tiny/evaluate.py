"""Plain score of a backbone on the bundled tasks by stratum: `python -m flashmem_bench.tiny.evaluate FOLDER`.

A quick look with greedy decoding through transformers' own `generate`, used to judge a training run.
Benchmark numbers come from `flashmem-bench run`, with intervals and through the suites' own graders.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from flashmem_bench.generators import generate
from flashmem_bench.tiny import weights_dir
from flashmem_bench.tiny.corpus import babi_texts, gsm8k_texts
from flashmem_bench.tiny.tokenizer import load_tokenizer


def answer_of(task: str, text: str) -> str:
    """The short answer in a generated text."""
    if task in ("wordmath", "gsm8k"):
        found = re.findall(r"#### *(-?[\d,.]+)", text)
        return found[-1].replace(",", "").rstrip(".") if found else ""
    return text.strip()


def list_scores(row: dict, text: str) -> list[tuple[str, float]]:
    """(kind of line, right or wrong) for each look-up of a hops-list row."""
    got = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    scores = []
    for echo, value in zip(row["echoes"], row["values"], strict=True):
        kind = "two-link" if echo in row["moments"] else "one-link"
        scores.append((kind, float(got.get(echo[:-1], "") == value)))
    return scores


def test_rows(task: str, n: int, data_dir: Path | None) -> list[dict]:
    """Up to `n` test rows of a bundled suite; none when a real suite's file is missing."""
    if task not in ("babi", "gsm8k"):
        return generate(task, "test", n)
    stem = "babi/en_test.jsonl.gz" if task == "babi" else "gsm8k/test.jsonl"
    if data_dir is None or not (data_dir / stem).exists():
        return []
    texts = (babi_texts if task == "babi" else gsm8k_texts)(data_dir / stem)
    texts = texts[:: max(1, len(texts) // n)][:n]
    return [{"prompt": t.prompt, "answer": answer_of(task, t.target), "stratum": "all"} for t in texts]


@torch.inference_mode()
def complete(model, tokenizer, prompts: list[str], max_new_tokens: int, batch_size: int = 64) -> list[str]:
    """Greedy completions in left-padded batches."""
    texts = []
    for start in range(0, len(prompts), batch_size):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def score(model, tokenizer, task: str, rows: list[dict]) -> dict[str, tuple[float, int]]:
    """Mean score and count by stratum."""
    budget = {"hops": 4, "recall": 4, "babi": 8, "wordmath": 64, "hops-list": 100, "gsm8k": 200}[task]
    texts = complete(model, tokenizer, [row["prompt"] for row in rows], budget)
    marks: dict[str, list[float]] = defaultdict(list)
    for row, text in zip(rows, texts, strict=True):
        if task == "hops-list":
            for kind, mark in list_scores(row, text):
                marks[kind].append(mark)
                marks["all"].append(mark)
            continue
        mark = float(answer_of(task, text) == row["answer"])
        for stratum in {row["stratum"], "all"}:
            marks[stratum].append(mark)
    return {stratum: (sum(values) / len(values), len(values)) for stratum, values in sorted(marks.items())}


def main() -> None:
    """Print one JSON line a task."""
    parser = argparse.ArgumentParser(description="Plain scores of the bundled backbone by stratum.")
    parser.add_argument("folder", type=Path, nargs="?", default=weights_dir())
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--tasks", default="hops,hops-list,recall,wordmath,babi,gsm8k")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("FLASHMEM_DATA"))
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    ).eval()
    tokenizer = load_tokenizer(args.folder)
    for task in args.tasks.split(","):
        rows = test_rows(task, args.limit, Path(args.data_dir) if args.data_dir else None)
        if rows:
            result = {
                name: f"{100 * mean:.1f} ({n})" for name, (mean, n) in score(model, tokenizer, task, rows).items()
            }
            print(json.dumps({"task": task, **result}), flush=True)


if __name__ == "__main__":
    main()
