"""A flipped bit in anything that decides an answer is an error that names the file, or changes nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmem.backbone import Backbone
from flashmem.errors import FlashMemError
from flashmem.integrity import SEAL, record_hash, sealed, tensors_hash
from flashmem.memory import MemoryConfig, load_memory, new_memory
from flashmem.placebo import MemoryBank
from flashmem.session import Session
from flashmem.training_curves import TrainStep
from flashmem.training_state import EarlyStopping, TrainState
from flashmem_bench.checkpoints import bundled_folder, read_record
from flashmem_bench.thresholds import Thresholds
from flashmem_bench.thresholds import bundled_folder as bundled_thresholds
from flashmem_bench.tiny import weights_dir
from flashmem_bench.tiny.resume import read_state, write_state
from flashmem_bench.tiny.sums import SUMS, check_sums

PLACE = st.floats(0, 1, exclude_max=True)
BIT = st.integers(0, 7)
FLIPS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HASHES = re.compile(r"SHA-256 \S+ and now has [0-9a-f]{64}")


def flip(path: Path, place: float, bit: int) -> bytes:
    """Flip one bit of a file; returns what was there."""
    before = path.read_bytes()
    damaged = bytearray(before)
    damaged[int(place * len(damaged))] ^= 1 << bit
    path.write_bytes(damaged)
    return before


def refused_or_same(path: Path, place: float, bit: int, read: Callable[[], Any], same: Callable[[Any], bool]) -> None:
    """Reading a file with one bit flipped names the file, or gives what it gave before."""
    before = flip(path, place, bit)
    try:
        found = read()
    except (FlashMemError, ValueError) as error:
        assert path.name in str(error) or str(path.parent) in str(error), error
        return
    finally:
        path.write_bytes(before)
    assert same(found)


@pytest.fixture(scope="module")
def backbone(bench) -> Backbone:
    return bench.backbone


@pytest.fixture(scope="module")
def checkpoint(backbone: Backbone, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    memory = new_memory(MemoryConfig(length=4), backbone)
    memory.save_pretrained(folder, {"suites": ["hops"], "train_seed": 7, "harm": 0.01})
    return folder


def _facts(memory: Any) -> tuple[Any, ...]:
    return memory.config, memory.metadata, {name: value.tolist() for name, value in memory.trained().items()}


@FLIPS
@given(place=PLACE, bit=BIT, file=st.sampled_from(["config.json", "model.safetensors"]))
def test_of_a_checkpoint(place: float, bit: int, file: str, checkpoint: Path, backbone: Backbone) -> None:
    whole = _facts(load_memory(checkpoint, backbone))
    refused_or_same(
        checkpoint / file, place, bit, lambda: load_memory(checkpoint, backbone), lambda m: _facts(m) == whole
    )


@FLIPS
@given(place=PLACE, bit=BIT)
def test_of_the_record_that_chooses_a_checkpoint(place: float, bit: int, checkpoint: Path) -> None:
    whole = read_record(checkpoint)
    whole.pop(SEAL)

    def same(found: dict[str, Any]) -> bool:
        return {key: found[key] for key in whole} == whole

    refused_or_same(checkpoint / "config.json", place, bit, lambda: read_record(checkpoint), same)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_the_message_has_both_hashes(file: str, checkpoint: Path, backbone: Backbone, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "m"))
    if file == "config.json":
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"train_seed": 7', '"train_seed": 5'))
    else:
        flip(folder / file, 0.9, 3)
    with pytest.raises(FlashMemError, match=HASHES.pattern) as caught:
        load_memory(folder, backbone)
    assert str(folder / file) in str(caught.value) and caught.value.exit_code == 1


@FLIPS
@given(place=PLACE, bit=BIT)
def test_of_a_threshold(place: float, bit: int, tmp_path: Path) -> None:
    path = tmp_path / "attention-entropy.json"
    path.write_bytes((bundled_thresholds() / "hops" / path.name).read_bytes())
    whole = Thresholds.load(path)
    refused_or_same(path, place, bit, lambda: Thresholds.load(path), lambda found: found == whole)


@FLIPS
@given(place=PLACE, bit=BIT)
def test_of_a_bank(place: float, bit: int, tmp_path: Path) -> None:
    bank, path = MemoryBank(), tmp_path / "bank.safetensors"
    for number in range(3):
        bank.add(torch.full((2, 4), number + 0.5), number, f"answer {number}")
    bank.save(path)

    def same(found: MemoryBank) -> bool:
        return bool(
            torch.equal(found.stack(), bank.stack()) and found.indices == bank.indices and found.answers == bank.answers
        )

    refused_or_same(path, place, bit, lambda: MemoryBank.load(path), same)


@FLIPS
@given(place=PLACE, bit=BIT, file=st.sampled_from(["session.json", "state"]))
def test_of_a_session(place: float, bit: int, file: str, backbone: Backbone, tmp_path: Path) -> None:
    folder = tmp_path / "session"
    if not folder.exists():
        session = Session(backbone)
        session.extend([5, 6, 7, 8])
        session.save(folder)
    (path,) = folder.glob(f"{file}*")
    whole = Session.load(folder, backbone)
    found = whole._state.exported()

    def same(other: Session) -> bool:
        theirs = other._state.exported()
        return other._ids == whole._ids and all(torch.equal(found[name], theirs[name]) for name in found)

    refused_or_same(path, place, bit, lambda: Session.load(folder, backbone), same)


def _training() -> TrainState:
    weight = torch.nn.Parameter(torch.arange(6.0))
    optimiser = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimiser.step()
    step = TrainStep(step=1, progress=0.0, loss=2.5, grad_norm=1.0, lr=0.5, validation_loss=2.0)
    return TrainState({"weight": weight}, optimiser, EarlyStopping(), [step])


@FLIPS
@given(place=PLACE, bit=BIT)
def test_of_a_training(place: float, bit: int, tmp_path: Path) -> None:
    state, terms = _training(), {"lr": 0.5}
    state.save(tmp_path, terms)
    wanted = state._tensors()

    def read() -> TrainState:
        fresh = _training()
        assert fresh.load(tmp_path, terms)
        return fresh

    def same(found: TrainState) -> bool:
        theirs = found._tensors()
        return wanted.keys() == theirs.keys() and all(torch.equal(wanted[name], theirs[name]) for name in wanted)

    refused_or_same(tmp_path / "training.safetensors", place, bit, read, same)


@FLIPS
@given(place=PLACE, bit=BIT)
def test_of_a_pretraining(place: float, bit: int, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    state = {
        "step": 3,
        "optimizers": [{"state": {0: {"m": torch.ones(3)}, 1: {}}, "groups": [{"lr": 0.5, "on": None}]}],
    }
    write_state(path, state)
    text = str(read_state(path))
    assert text == str(state)
    refused_or_same(path, place, bit, lambda: read_state(path), lambda found: str(found) == text)


@FLIPS
@given(place=PLACE, bit=BIT, data=st.data())
def test_of_the_bundled_backbone(place: float, bit: int, data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    if not folder.exists():
        shutil.copytree(weights_dir(), folder)
    file = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir() if path.suffix != ".md")))
    # All that is compared is the sums themselves: a record that reads the same lets the same files pass.
    refused_or_same(folder / file, place, bit, lambda: check_sums(folder), lambda _: file == SUMS)


def test_what_is_bundled_is_sealed_and_whole(backbone: Backbone) -> None:
    check_sums(weights_dir())
    records = sorted(bundled_folder().glob("*/*/seed*/config.json"))
    thresholds = sorted(bundled_thresholds().glob("*/*.json"))
    assert records and thresholds
    for path in (*records, *thresholds):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record[SEAL] == record_hash(record), path


def test_a_damaged_bundled_backbone_does_not_run(tmp_path: Path, monkeypatch, capsys) -> None:
    from flashmem_bench.cli import run as command

    folder = Path(shutil.copytree(weights_dir(), tmp_path / "backbone"))
    flip(folder / "model.safetensors", 0.7, 2)
    monkeypatch.setattr("flashmem_bench.tiny.weights_dir", lambda: folder)
    line = ["run", "--suite", "hops", "--method", "vanilla", "--limit", "1", "--results-dir", str(tmp_path / "results")]
    assert command(line) == 1
    said = capsys.readouterr().err
    assert str(folder / "model.safetensors") in said and HASHES.search(said)


@given(st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.integers(), st.floats(allow_nan=False), st.text())))
def test_a_sealed_record_survives_json(record: dict[str, Any]) -> None:
    record.pop(SEAL, None)
    read = json.loads(json.dumps(sealed(record)))
    assert read[SEAL] == record_hash(read) and {key: read[key] for key in read if key != SEAL} == record


def test_tensors_of_other_type_shape_or_name_have_another_hash() -> None:
    one = torch.zeros(4)
    made = [{"a": one}, {"b": one}, {"a": one.reshape(2, 2)}, {"a": one.to(torch.bfloat16)}, {"a": one.int()}, {}]
    assert len({tensors_hash(tensors, {}) for tensors in made} | {tensors_hash({"a": one}, {"x": ""})}) == 7
    assert tensors_hash({"a": torch.tensor(3.0)}, {})
