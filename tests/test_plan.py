"""What a plan says follows from the shape, the samples and the speed."""

from __future__ import annotations

import json

import pytest

from flashmem_bench import plan as planning
from flashmem_bench.claims import load_claims
from flashmem_bench.cli import run as command
from flashmem_bench.floor import Shape
from flashmem_bench.gaps import open_claims
from flashmem_bench.recipes import Samples, load_recipe
from flashmem_bench.registry import method_names

DEVICE = planning.Device(312.0, 2039.0, "as given")


def _recipe(**values: object):
    return load_recipe("qwen2.5-1.5b-gsm8k").with_values({key.replace("__", "."): v for key, v in values.items()})


def _plan(device: planning.Device = DEVICE, **values: object) -> dict:
    recipe = _recipe(**values)
    numbers = recipe.shape.model_dump(exclude={"tied_embeddings"})
    return planning.make_plan(recipe, Shape(**numbers), True, recipe.plan.samples, device)


def _hours(document: dict, prefix: str) -> float:
    return sum(phase["hours"] for phase in document["phases"] if phase["phase"].startswith(prefix))


def test_parameters_are_those_of_the_real_module() -> None:
    """The arithmetic against transformers' own count and against the memory that training fits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from flashmem import MemoryConfig, new_memory
    from tests.flashmem.conftest import make_backbone

    backbone = make_backbone("qwen3")
    shape = Shape.of(backbone.config)
    costs = planning.Costs(_recipe().with_values({"settings": {}}), shape, False, DEVICE)
    counted = sum(p.numel() for p in backbone.model.parameters())
    assert costs.weights == pytest.approx(counted, rel=0.02)
    for method, config in (
        ("flashmem", MemoryConfig()),
        ("flashmem-plus", MemoryConfig(latent_attention="earlier")),
        ("flashmem-separate-encoder", MemoryConfig(source="separate-encoder")),
        ("memgen", MemoryConfig(source="weaver", encoder_rank=16)),
        ("lora-sft", MemoryConfig(source="lora", encoder_rank=None)),
        ("prompt-tuning", MemoryConfig(source="constant")),
    ):
        learned = sum(p.numel() for p in new_memory(config, backbone).trained().values())
        assert costs.learned(method) == pytest.approx(learned, rel=0.03)
    with torch.device("meta"):
        config = AutoConfig.for_model(
            "qwen2", hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
            intermediate_size=8960, vocab_size=151936, tie_word_embeddings=True,
        )  # fmt: skip
        real = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert _plan()["parameters"]["backbone"] == pytest.approx(real, rel=0.001)


def test_time_and_memory_move_as_they_should() -> None:
    plain = _plan()
    faster = _hours(_plan(planning.Device(624.0, 2039.0, "")), "train flashmem seed 0")
    assert faster < 0.7 * _hours(plain, "train flashmem seed 0"), "the answers on validation do not get faster"
    assert _hours(plain, "run flashmem-noop-memory") > 3 * _hours(plain, "run vanilla"), "three training seeds"
    assert _hours(_plan(placement__processes=4), "train") < 0.3 * _hours(plain, "train")
    assert _hours(_plan(plan__margin=0.0), "run vanilla") == pytest.approx(_hours(plain, "run vanilla") / 1.25)
    assert _hours(_plan(run__limit=100), "run vanilla") == pytest.approx(_hours(plain, "run vanilla") * 100 / 1319)
    assert _hours(_plan(train__minutes=60.0, plan__margin=0.0), "train flashmem seed 0") == pytest.approx(1.0, abs=0.2)
    memory = {phase["phase"]: phase["memory_gib"] for phase in plain["phases"]}
    kept = {p["phase"]: p["memory_gib"] for p in _plan(train__activation_checkpointing=False)["phases"]}
    assert kept["train flashmem seed 0"] > 1.3 * memory["train flashmem seed 0"]
    assert memory["run flashmem-separate-encoder"] > 1.5 * memory["run flashmem"]
    assert not _hours(_plan(train__targets="gold"), "self-sampling") and _hours(plain, "self-sampling")
    assert plain["total"]["hours"] == pytest.approx(sum(phase["hours"] for phase in plain["phases"]))


def test_plan_works_without_a_network(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert command(["plan", "qwen3-4b-gsm8k", "--device-tflops", "312", "--bandwidth", "2039", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 3.9e9 < document["parameters"]["backbone"] < 4.1e9
    assert document["samples"] == Samples(train=7099, calibration=374, validation=374, test=1319).model_dump()
    assert "shape: in the recipe" in " ".join(document["assumptions"])
    (tmp_path / "bare.yaml").write_text("{model: no-such/model, suites: [hops]}")
    assert command(["plan", "bare.yaml", "--device-tflops", "1", "--bandwidth", "1"]) == 1
    assert "under shape:" in capsys.readouterr().err


def test_the_machine_is_measured_where_no_speed_is_given() -> None:
    device = planning.measure_device("cpu", "float32")
    assert min(device.tflops, device.bandwidth, device.launch_us) > 0 and "measured here on cpu" in device.source


def test_a_plan_says_what_its_comparisons_can_see() -> None:
    from flashmem_bench import stats
    from flashmem_bench.plan import power
    from flashmem_bench.recipes import Recipe, Samples

    recipe = Recipe(suites=("hops",)).with_values({"run.limit": 400, "plan.discordant_share": 0.2})
    found = power(recipe, Samples(test=1500))
    assert found["samples_a_suite"] == 400
    assert found["minimum_detectable"] == stats.minimum_detectable_difference(400, 0.2)
    assert found["samples_for_margin"]["parity-memgen"] == pytest.approx(stats.samples_for_margin(0.02, 0.2))
    assert power(recipe, Samples(test=2))["minimum_detectable"] is None


def test_a_plan_names_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    arguments = ["plan", "qwen2.5-1.5b-gsm8k", "--device-tflops", "312", "--bandwidth", "2039"]
    assert command([*arguments, "--json"]) == 0
    missing = json.loads(capsys.readouterr().out)["missing"]
    assert len(missing["data"]) == 1 and missing["data"][0].startswith("gsm8k: no data")
    assert any(line.startswith("moments-fixed needs flashmem-matched-fixed") for line in missing["answers to claims"])
    assert not any(line.startswith("beats-vanilla") for line in missing["answers to claims"])
    assert command(arguments) == 0
    assert "missing data:\n- gsm8k: no data" in capsys.readouterr().out


def test_every_claim_says_what_it_needs() -> None:
    everything = open_claims(method_names())
    assert {line.split()[0] for line in everything} == {"faster-memgen", "faster-memgen-cached", "one-layer"}
    assert len(open_claims(())) == len(load_claims())
