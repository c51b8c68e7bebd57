"""A recipe from end to end on random backbones with real configuration classes, and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml

from flashmem.errors import CheckpointError
from flashmem_bench.cli import run as command
from flashmem_bench.errors import UsageError
from flashmem_bench.recipes import load_recipe, recipes_dir
from flashmem_bench.reproduce import Arms, arms, fit_request, trainings
from tests.random_model import TEMPLATE, make_model

# As chat models do: an answer ends with a token of its own, the tokenizer's EOS is another, generation knows both.
TURNS = TEMPLATE.replace("{% endfor %}", "{% if m['role'] == 'assistant' %}<|pad|>{% endif %}{% endfor %}")


def make_chat_model(folder: Path, family: str) -> Path:
    """A two-layer model of a family in bfloat16 whose turns end with a token that is not the tokenizer's EOS."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    make_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = [0, 1]
    model.save_pretrained(folder)
    return folder


def _broken(*_: object) -> None:
    raise CheckpointError("the threshold file cannot be read; calibrate again")


def write_recipe(path: Path, model: Path, **parts: object) -> Path:
    recipe = {
        "model": str(model),
        "dtype": "bfloat16",
        "suites": ["hops"],
        "settings": {"memory.length": 2},
        "train": {
            "methods": ["flashmem"],
            "seeds": [3, 4],
            "targets": "gold",
            "insertion": "mixed",
            "lr": 0.003,
            "batch_size": 4,
            "micro_batch_size": 2,
            "steps": 3,
            "activation_checkpointing": True,
            "early_stopping": {"every": 2, "patience": 5, "examples": 3},
            "examples": 8,
            "validation": 2,
        },
        "calibrate": {"limit": 2},
        "run": {"methods": ["vanilla", "flashmem", "flashmem-shuffled-memory"], "limit": 2},
    }
    path.write_text(yaml.safe_dump({**recipe, **parts}), encoding="utf-8")
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def _json(capsys: pytest.CaptureFixture[str]) -> object:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_reproduce_continues_after_every_kind_of_stop(place: Path, capsys, monkeypatch) -> None:
    """Printed, killed before the arms, broken at a threshold, and then to the end: nothing is trained twice."""
    from flashmem_bench import runner

    recipe = str(write_recipe(place / "small.yaml", make_chat_model(place / "model", "qwen2")))
    line = ["reproduce", recipe, "--device-tflops", "1", "--bandwidth", "10"]
    assert command([*line, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "train flashmem seed 3" in printed and "calibrate --suite hops --limit 2" in printed
    assert printed.count("flashmem-bench run ") == 3 and not (place / "results" / "checkpoints").exists()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_grid", killed)
        assert command([*line, "--quiet"]) == 130
    assert "Continue with: flashmem-bench" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("flashmem_bench.thresholds.Thresholds.load", _broken)
        assert command([*line, "--quiet"]) == 1
    assert "cannot be read; calibrate again; when that is mended, go on with: flashmem-bench" in capsys.readouterr().err
    weights = [(folder / "model.safetensors").stat().st_mtime_ns for folder in _folders(place)]
    assert command([*line, "--json"]) == 0
    _check_results(place, _json(capsys)["cells"])
    assert weights == [(folder / "model.safetensors").stat().st_mtime_ns for folder in _folders(place)]


def test_reproduce_twice_runs_nothing_again(place: Path, capsys) -> None:
    recipe = str(write_recipe(place / "small.yaml", make_chat_model(place / "model", "qwen3")))
    line = ["reproduce", recipe, "--device-tflops", "1", "--bandwidth", "10", "--json"]
    assert command(line) == 0
    _check_results(place, _json(capsys)["cells"])
    assert command(line) == 0
    assert {cell["new_samples"] for cell in _json(capsys)["cells"]} == {0}


def _folders(place: Path) -> list[Path]:
    return [place / "results/checkpoints/model/hops/flashmem" / f"seed{seed}" for seed in (3, 4)]


def _check_results(place: Path, cells: list[dict]) -> None:
    """One vanilla cell, the others once a training seed; curves beside the memories and in the report."""
    methods = sorted(cell["method"] for cell in cells)
    assert methods == ["flashmem"] * 2 + ["flashmem-shuffled-memory"] * 2 + ["vanilla"]
    assert {cell["status"] for cell in cells} == {"complete"}
    for folder in _folders(place):
        curve = pd.read_csv(folder / "curves.csv")
        assert list(curve["step"]) == [1, 2, 3] and curve["validation_loss_nats_token"].notna().sum() == 2
        assert not (folder / "training").exists()
    assert set(pd.read_csv(place / "results/tables/runs.csv")["train_seed"].dropna()) == {3, 4}
    training = pd.read_csv(place / "results/tables/training.csv")
    assert len(training) == 6 and set(training["train_seed"]) == {3, 4}
    assert (place / "results/figures/training-model-hops.svg").exists()


def test_targets_end_where_generation_stops(place: Path) -> None:
    from flashmem import Backbone
    from flashmem_bench.fitting import end_of_answer

    backbone = Backbone.from_pretrained(make_chat_model(place / "model", "qwen2"))
    assert backbone.tokenizer.eos_token_id == 0
    assert end_of_answer(backbone, [0, 1]) == [1], "what the template writes after an answer"
    assert end_of_answer(backbone, [0]) == [0], "the template's token does not stop generation here"
    assert end_of_answer(backbone, [7, 9]) == [7]
    assert end_of_answer(backbone, []) == []
    backbone.tokenizer.chat_template = None
    assert end_of_answer(backbone, [5, 0]) == [0], "without a template the tokenizer's own"


def test_train_takes_a_recipe_and_options_replace_parts(place: Path, capsys) -> None:
    recipe = str(write_recipe(place / "small.yaml", make_chat_model(place / "model", "qwen2")))
    line = ["train", "--recipe", recipe, "--train-seed", "9", "--steps", "1", "--set", "memory.length=3", "--json"]
    assert command(line) == 0
    found = _json(capsys)
    assert found["checkpoint"].endswith("hops/flashmem/seed9")
    assert found["metadata"]["steps"] == 1 and found["metadata"]["batch_size"] == 4
    record = json.loads((Path(found["checkpoint"]) / "config.json").read_text())
    assert record["memory"]["length"] == 3
    assert command(["train", "--recipe", recipe, "--out", "x", "--quiet"]) == 2
    assert "one checkpoint" in capsys.readouterr().err


def test_several_processes_are_started_for_training_alone(place: Path, capsys, monkeypatch) -> None:
    recipe = str(
        write_recipe(place / "four.yaml", make_chat_model(place / "model", "qwen2"), placement={"processes": 4})
    )
    started: list[list[str]] = []

    def start(line: list[str], check: bool) -> SimpleNamespace:
        started.append(line)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr("flashmem_bench.reproduce.subprocess.run", start)
    assert command(["reproduce", recipe, "--device-tflops", "1", "--bandwidth", "10", "--quiet"]) == 1
    (line,) = started
    assert line[line.index("--nproc-per-node") + 1] == "4"
    assert line[line.index("flashmem_bench") + 1 :][:3] == ["train", "--recipe", recipe]
    assert "this failed: torchrun" in capsys.readouterr().err


def test_scopes_and_arms(place: Path) -> None:
    parts = {"suites": ["hops", "recall"], "run": {"methods": ["vanilla", "flashmem", "flashmem-separate-encoder"]}}
    (place / "model").mkdir()
    joint = load_recipe(str(write_recipe(place / "joint.yaml", place / "model", **parts)))
    folders = [str(t.folder) for t in trainings(joint, Path("results"))]
    assert folders == [f"results/checkpoints/model/joint/flashmem/seed{seed}" for seed in (3, 4)]
    apart = joint.with_values({"train.scope": "suite", "train.out": "elsewhere"})
    assert [str(t.folder) for t in trainings(apart, Path("results"))] == [
        f"elsewhere/{suite}/flashmem/seed{seed}" for suite in ("hops", "recall") for seed in (3, 4)
    ]
    found = [arm for arm in arms(apart, Path("results")) if arm.suite == "recall"]
    memories = [Path("elsewhere/recall/flashmem") / f"seed{seed}" for seed in (3, 4)]
    assert found == [
        Arms("recall", ("vanilla",), 0, None),
        *[Arms("recall", ("flashmem",), 0, memory) for memory in memories],
        Arms("recall", ("flashmem-separate-encoder",), 0, None),
    ]
    config = fit_request(apart, trainings(apart, Path("results"))[1]).train
    assert (config.seed, config.micro_batch_size, config.validate_every, config.patience) == (4, 2, 2, 5)
    with pytest.raises(UsageError, match="train fits flashmem"):
        trainings(joint.with_values({"train.methods": ("vanilla",)}), Path("results"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("suits: [hops]", "did you mean suites"),
        ("train: {batchsize: 3}", "did you mean train.batch_size"),
        ("train: {early_stopping: {evry: 2}}", "early_stopping.every is missing"),
        ("train: {early_stopping: {every: 2, patience: 1, exmples: 2}}", "did you mean train.early_stopping.examples"),
        ("train: {targets: silver}", "must be 'gold' or 'self', not 'silver'"),
        ("train: {lr: -1}", "train.lr must be greater than 0, not -1"),
        ("train: {batch_size: many}", "valid integer"),
        ("dtype: float8", "'bfloat16'"),
        ("placement: {processes: 2, map: auto}", "cannot both spread"),
        ("settings: {memory.lenght: 3}", "did you mean memory.length"),
        ("settings: {memory.length: 0}", "from 1 to 256"),
        ("- a list", "must be a mapping"),
        ("a: [", "not readable YAML"),
    ],
)
def test_a_wrong_recipe_gets_one_sentence(place: Path, text: str, words: str, capsys) -> None:
    (place / "wrong.yaml").write_text(text)
    for line in (["plan", "wrong.yaml"], ["train", "--recipe", "wrong.yaml"], ["reproduce", "wrong.yaml"]):
        assert command(line) == 2
        (error,) = [part for part in capsys.readouterr().err.splitlines() if part.startswith("error: ")]
        assert words in error


def test_shipped_recipes_are_read_and_found_by_name(place: Path, capsys) -> None:
    names = {path.stem for path in recipes_dir().glob("*.yaml")}
    assert {"qwen2.5-1.5b-gsm8k", "qwen3-4b-gsm8k"} <= names
    for name in names:
        assert load_recipe(name).suites
    paper = load_recipe("qwen2.5-1.5b-gsm8k").train
    assert (paper.lr, paper.weight_decay, paper.clip, paper.batch_size, paper.epochs, paper.warmup) == (
        1e-5, 0.01, 0.53, 64, 5, 0.1,
    )  # fmt: skip
    assert command(["plan", "qwen2.5-1.5b-gsm8"]) == 2
    assert "did you mean qwen2.5-1.5b-gsm8k" in capsys.readouterr().err
    assert command(["plan", "none.yaml"]) == 2
    assert "no recipe file" in capsys.readouterr().err
