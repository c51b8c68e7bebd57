"""A results folder with made-up cells, written through the store, for the tests of the report."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashmem_bench.cell_store import CellStore
from flashmem_bench.schema import blank_sample
from flashmem_bench.store import ResultStore

# method -> chance of a right answer, mean triggers a sample, cost factor against vanilla
METHODS = {
    "vanilla": (0.35, 0.0, 1.0),
    "flashmem": (0.62, 1.6, 1.25),
    "flashmem-literal": (0.55, 4.0, 1.7),
    "flashmem-prompt-end": (0.58, 1.0, 1.1),
    "flashmem-no-monitor": (0.50, 3.2, 1.5),
    "flashmem-fixed-trigger": (0.57, 1.4, 1.2),
    "flashmem-random-trigger": (0.52, 1.6, 1.25),
    "flashmem-output-entropy": (0.60, 1.5, 1.18),
    "flashmem-separate-encoder": (0.63, 1.6, 1.9),
    "flashmem-random-memory": (0.34, 1.6, 1.25),
    "flashmem-shuffled-memory": (0.36, 1.6, 1.26),
    "flashmem-mean-memory": (0.37, 1.6, 1.25),
    "flashmem-noop-memory": (0.35, 1.6, 1.24),
}
WORDS = "Ana has 3 + 4 = 7 \n apples and <b> $5 left, so the answer is #### 12".split(" ")


def make_results(
    root: Path,
    suites: Iterable[str] = ("wordmath", "hops"),
    methods: Iterable[str] = tuple(METHODS),
    n: int = 60,
    **changes: Any,
) -> ResultStore:
    """Write one finished cell for each suite and method; ``changes`` override columns of every row."""
    store = ResultStore(root)
    for suite in suites:
        for method in methods:
            add_cell(store, suite, method, n, **changes)
    return store


def add_cell(
    store: ResultStore,
    suite: str = "wordmath",
    method: str = "flashmem",
    n: int = 60,
    *,
    settings: dict[str, Any] | None = None,
    ablation: list[dict[str, Any]] | None = None,
    chance: float | None = None,
    triggers: float | None = None,
    finish: bool = True,
    text: str | None = None,
    **changes: Any,
) -> CellStore:
    """Write one cell whose rows depend only on the arguments."""
    probability, usual, factor = METHODS.get(method, (0.5, 1.0, 1.3))
    probability = probability if chance is None else chance
    triggers = usual if triggers is None else triggers
    identity = {
        "suite": suite,
        "method": method,
        "seed": changes.get("seed", 0),
        "settings": settings or {},
        "device": changes.get("device", "cpu"),
        "dtype": changes.get("dtype", "float32"),
        "batch_size": changes.get("batch_size", 1),
        "memory": f"memory of seed {changes.get('train_seed', 0)}",
    }
    cell = store.open_cell(identity, {"suite": suite, "method": method, "ablation": ablation or []})
    cell.begin_attempt({"cpu": "synthetic"})
    for index in range(n):
        noise = random.Random(f"{suite}-{index}")
        own = random.Random(f"{suite}-{method}-{index}-{settings}-{probability}-{changes.get('train_seed', 0)}")
        row, record = _sample(suite, method, index, probability, triggers, factor, noise, own)
        if text is not None:
            record["text"] = text
        row.update(changes)
        cell.append(row, record)
    if finish:
        cell.finish({"why_equal": "no trigger" if method == "flashmem-noop-memory" else None})
    cell.close()
    return cell


def _sample(
    suite: str,
    method: str,
    index: int,
    probability: float,
    triggers: float,
    factor: float,
    noise: random.Random,
    own: random.Random,
) -> tuple[dict[str, Any], dict[str, Any]]:
    tokens = [f" {word}" for word in noise.choices(WORDS, k=noise.randint(8, 40))]
    latent = method != "vanilla"
    count = min(len(tokens), int(own.expovariate(1 / triggers)) if triggers else 0)
    where = sorted(own.sample(range(len(tokens)), count))
    entropies = [round(own.gammavariate(4, 0.4) + (1.5 if step in where else 0), 4) for step in range(len(tokens))]
    right = (noise.random() * 0.6 + own.random() * 0.4) < probability
    prefill = 8 + noise.random()
    decode = len(tokens) * (2.1 + 0.2 * own.random())
    consolidate, inject = count * 3.1 * (factor > 1), count * 2.3 * (factor > 1)
    monitor = 0.08 * len(tokens) if latent else 0.0
    decode += consolidate + inject + monitor + (factor - 1) * 20
    row = blank_sample()
    row.update(
        suite=suite,
        method=method,
        model="flashmem-tiny",
        seed=0,
        sample_id=f"{suite}-test-{index:05d}",
        index=index,
        stratum=f"steps={1 + index % 3}",
        attempt=1,
        started_at="2026-01-01T00:00:00+00:00",
        prompt_sha=f"sha-{suite}-{index}",
        prompt_tokens=40 + index % 7,
        prompt_truncated=False,
        output_tokens=len(tokens),
        latent_tokens=8 * count,
        positions_encoded=40 + len(tokens) + 8 * count,
        triggers=count,
        trigger_rate=count / (1 + len(tokens)),
        threshold=2.4 if latent else None,
        above_tau_rate=sum(value > 2.4 for value in entropies) / len(entropies) if latent else None,
        finish_reason="length" if index % 29 == 0 else "eos",
        truncated=index % 29 == 0,
        parse_status="no_answer" if index % 17 == 0 else "ok",
        answer_extracted=str(index),
        score=float(right),
        score_valid=True,
        prefill_ms=prefill,
        ttft_ms=prefill + 0.5,
        decode_ms=decode,
        e2e_ms=prefill + decode,
        tpot_ms=(decode - 0.5) / (len(tokens) - 1),
        sample_ms=0.1 * len(tokens),
        monitor_ms=monitor,
        consolidate_ms=consolidate,
        inject_ms=inject,
        overhead_share=(monitor + consolidate + inject) / decode,
        harness_ms=0.6,
        checkpoint_scope="joint" if latent else None,
        tau_source="suite" if latent else None,
        beyond_trained_context=False,
        device="cpu",
        dtype="float32",
        batch_size=1,
        exec="eager",
    )
    row["metric.exact"] = float(right)
    record = {
        "prompt": f"Question {index}: <script>alert('{suite}')</script> how many?",
        "text": "".join(tokens) + (f" [{method}]" if right else ""),
        "target": "...",
        "answer": str(index),
        "tokens": tokens,
        "triggers": [
            {"text_index": step, "entropy": entropies[step], "output_entropy": 0.3, "latents": 8} for step in where
        ],
        "entropies": entropies,
        "output_entropies": [],
    }
    return row, record


def add_threshold_axis(store: ResultStore, suite: str = "wordmath", n: int = 60) -> None:
    """Write the points of a threshold ablation, the reference among them."""
    for value, chance in (
        (0.5, 0.45),
        (1.0, 0.5),
        (1.5, 0.58),
        (2.0, 0.6),
        (2.4, 0.62),
        (3.0, 0.5),
        (4.0, 0.36),
    ):
        mark = {"axis": "monitor-threshold", "value": value, "reference": value == 2.4}
        add_cell(
            store,
            suite,
            "flashmem",
            n,
            settings={} if value == 2.4 else {"trigger.threshold": value},
            ablation=[mark],
            chance=chance,
            threshold=value,
            triggers=max(0.0, 4.0 - value),
        )
