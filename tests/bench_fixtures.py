"""A random backbone with memories and thresholds, and suites that are loaded once, for the tests of the harness."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.random_model import make_model
from tests.test_suites import babi_row, gsm8k_row, write_jsonl

SUITES = ("babi", "gsm8k", "hops", "hops-list", "recall", "wordmath")


@dataclass
class Bench:
    """A prepared place: model folder, data folder, results template, and loaded parts."""

    model: Path
    data: Path
    template: Path
    backbone: Any
    suites: dict[str, Any]

    def results(self, folder: Path) -> Path:
        """Return a fresh results folder with the memories and thresholds of the template."""
        shutil.copytree(self.template, folder)
        return folder

    def request(self, results: Path, suites: str, methods: str, **more: Any) -> Any:
        from flashmem_bench.session import Request

        return Request(
            suites=tuple(suites.split(",")),
            methods=tuple(methods.split(",")),
            model=str(self.model),
            results_dir=results,
            data_dir=self.data,
            **more,
        )

    def run(self, results: Path, suites: str, methods: str, **more: Any) -> list[Any]:
        """Run a grid in this process on the shared backbone and suites."""
        from flashmem_bench.runner import run_grid
        from flashmem_bench.session import Session

        request = self.request(results, suites, methods, **more)
        return run_grid(request, session=Session(request, self.backbone, self.suites))


def write_data(folder: Path) -> Path:
    """Write a few made-up rows in the schemas of the real files."""
    write_jsonl(folder / "gsm8k/train.jsonl", [gsm8k_row(n) for n in range(100, 180)])
    write_jsonl(folder / "gsm8k/test.jsonl", [gsm8k_row(n) for n in range(500, 507)])
    stories = [babi_row(task, 2, 10 * n) for task in ("qa1", "qa2") for n in range(20)]
    write_jsonl(folder / "babi/en_train.jsonl", stories)
    write_jsonl(folder / "babi/en_test.jsonl", [babi_row("qa1", 3), babi_row("qa2", 3)])
    return folder


def write_memories(backbone: Any, template: Path, model: str) -> None:
    """Save memories as they are before training, with the metadata of trained ones."""
    import torch

    from flashmem.memory import MemoryConfig, new_memory

    sources = {
        "flashmem": "consolidator",
        "flashmem-separate-encoder": "separate-encoder",
        "flashmem-plus": "consolidator",
        "memgen": "weaver",
        "lora-sft": "lora",
        "prompt-tuning": "constant",
    }
    for method, source in sources.items():
        torch.manual_seed(0)
        memory = new_memory(MemoryConfig(source=source, length=4), backbone)
        folder = template / "checkpoints" / model / "joint" / method / "seed0"
        memory.save_pretrained(folder, {"suites": list(SUITES), "train_seed": 7, "harm": 0.0})


def write_thresholds(backbone: Any, suites: dict[str, Any], template: Path, model: str) -> None:
    """Calibrate every suite on two samples."""
    from flashmem_bench.session import generation_arguments
    from flashmem_bench.settings import Settings
    from flashmem_bench.thresholds import calibrate_suite

    for name, suite in suites.items():
        generation = {**generation_arguments(backbone, suite, Settings()), "max_new_tokens": 12}
        found = calibrate_suite(
            backbone, suite, settings=Settings(), generation=generation, limit=2, percentile=85.0, seed=0
        )
        for kind, thresholds in found.items():
            thresholds.save(template / "thresholds" / model / name / f"{kind}.json")


def shorten(suites: dict[str, Any]) -> None:
    """Give every suite a budget of 24 new tokens: random weights never stop by themselves."""
    import dataclasses

    for suite in suites.values():
        budget = min(24, suite.generation.max_new_tokens)
        suite.generation = dataclasses.replace(suite.generation, max_new_tokens=budget)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Model, data, memories, thresholds and suites, made once a session."""
    from flashmem.backbone import Backbone
    from flashmem_bench.store import ResultStore
    from flashmem_bench.tasks import load_suite

    root = tmp_path_factory.mktemp("bench")
    model, data, template = make_model(root / "random-tiny"), write_data(root / "data"), root / "results"
    backbone = Backbone.from_pretrained(str(model))
    suites = {name: load_suite(name, data_dir=data) for name in SUITES}
    shorten(suites)
    ResultStore(template)
    write_memories(backbone, template, model.name)
    write_thresholds(backbone, suites, template, model.name)
    return Bench(model, data, template, backbone, suites)
