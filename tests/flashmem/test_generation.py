"""The decode loop against transformers, and what an injection does to it."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, TextStreamer

from flashmem import Backbone, ConfigError, MemoryConfig, PromptTooLongError, TriggerConfig, generate, new_memory
from tests.flashmem.conftest import make_backbone, prompts_of, reference_model

GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2)


def _reference(family: str, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model = reference_model(family, "eager" if family == "gemma2" else "sdpa")
    out = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    return [_until_eos(row, config.eos_token_id) for row in out]


def _until_eos(row: list[int], eos: int | list[int]) -> list[int]:
    stops = eos if isinstance(eos, list) else [eos]
    ends = [i for i, token in enumerate(row) if token in stops]
    return row[: ends[0] + 1] if ends else row


def test_never_equals_transformers_generate(family: str) -> None:
    backbone = make_backbone(family)
    prompts = prompts_of(23, 9, 17)
    config = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=[2, 11, 12], pad_token_id=0)
    # Prompts longer than the window, left padding, several EOS ids.
    for chosen in (prompts, prompts[:1]):
        ours = generate(backbone, chosen, generation_config=config, trigger=TriggerConfig(kind="never"))
        assert [r.token_ids for r in ours] == _reference(family, chosen, config)


def test_never_runs_64_tokens_without_eos(family: str) -> None:
    backbone = make_backbone(family)
    config = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=1, pad_token_id=0)
    (ours,) = generate(backbone, prompts_of(20), generation_config=config)
    assert [ours.token_ids] == _reference(family, prompts_of(20), config)


@pytest.mark.parametrize("trace", [False, True])
def test_watching_changes_no_token(family: str, trace: bool) -> None:
    backbone = make_backbone(family)
    plain = generate(backbone, prompts_of(15, 20), generation_config=GREEDY)
    watched = generate(backbone, prompts_of(15, 20), generation_config=GREEDY, trace=trace)
    assert [r.token_ids for r in plain] == [r.token_ids for r in watched]
    assert all(len(r.entropies) == (r.output_tokens if trace else 0) for r in watched)


def test_batch_equals_single_rows_with_different_triggers(family: str) -> None:
    """Rows inject at different moments: holes and padding must not leak into a row."""
    backbone = make_backbone(family)
    torch.manual_seed(0)
    memory = new_memory(MemoryConfig(length=3), backbone)
    prompts = prompts_of(21, 8, 14, seed=3)
    traces = [generate(backbone, [p], generation_config=GREEDY, trace=True)[0].entropies for p in prompts]
    ordered = sorted(h for t in traces for h in t)
    # Between two observed values: at one of them, rounding alone would decide.
    gap = max(range(8, len(ordered) - 8), key=lambda i: ordered[i + 1] - ordered[i])
    tau = (ordered[gap] + ordered[gap + 1]) / 2
    trigger = TriggerConfig(threshold=tau, cooldown=3, max_injections=3)
    alone = [generate(backbone, [p], memory=memory, trigger=trigger, generation_config=GREEDY)[0] for p in prompts]
    together = generate(backbone, prompts, memory=memory, trigger=trigger, generation_config=GREEDY)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [[t.text_index for t in r.triggers] for r in together] == [[t.text_index for t in r.triggers] for r in alone]
    assert [r.positions_encoded for r in together] == [r.positions_encoded for r in alone]
    assert len({tuple(t.text_index for t in r.triggers) for r in alone}) > 1


@pytest.mark.parametrize("kind", ["consolidator", "separate-encoder", "constant"])
def test_history_is_encoded_once(kind: str, backbone) -> None:
    memory = new_memory(MemoryConfig(source=kind, length=5), backbone)
    trigger = TriggerConfig(kind="every", interval=4, cooldown=0, max_injections=None)
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1)
    (run,) = generate(backbone, prompts_of(13), memory=memory, trigger=trigger, generation_config=config)
    assert [t.text_index for t in run.triggers] == [0, 4, 8]
    assert run.latent_tokens == 15
    # Every token is fed but the last one, which nothing follows.
    assert run.positions_encoded == 13 + (10 - 1) + 3 * 5
    assert [t.position for t in run.triggers] == [13, 13 + 4 + 5, 13 + 8 + 10]


def test_pre_injection_logits_leave_the_next_token_alone(backbone) -> None:
    torch.manual_seed(1)
    memory = new_memory(MemoryConfig(length=4), backbone)
    one = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=1)
    trigger = TriggerConfig(kind="prompt-end")
    prompts = prompts_of(*[10] * 12)
    plain = generate(backbone, prompts, generation_config=one)
    literal = generate(backbone, prompts, memory=memory, trigger=trigger, generation_config=one, sampling_logits="pre")
    after = generate(backbone, prompts, memory=memory, trigger=trigger, generation_config=one)
    assert [r.token_ids for r in literal] == [r.token_ids for r in plain]
    assert [r.token_ids for r in after] != [r.token_ids for r in plain]


def test_temperature_and_top_p_follow_the_seed(backbone) -> None:
    config = GenerationConfig(max_new_tokens=20, do_sample=True, temperature=1.5, top_p=0.9, eos_token_id=1)
    first = generate(backbone, prompts_of(9, 9), generation_config=config, seed=5)
    again = generate(backbone, prompts_of(9, 9), generation_config=config, seed=5)
    other = generate(backbone, prompts_of(9, 9), generation_config=config, seed=6)
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert [r.token_ids for r in first] != [r.token_ids for r in other]


def test_tiny_top_p_is_greedy(backbone) -> None:
    narrow = GenerationConfig(max_new_tokens=12, do_sample=True, top_p=1e-6, eos_token_id=2)
    sampled = generate(backbone, prompts_of(11), generation_config=narrow, seed=1)
    assert sampled[0].token_ids == generate(backbone, prompts_of(11), generation_config=GREEDY)[0].token_ids


def test_stop_string_ends_and_is_cut_from_the_text(backbone) -> None:
    (free,) = generate(backbone, prompts_of(11), generation_config=GREEDY)
    words = free.text.split()
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2, stop_strings=[words[3]])
    (run,) = generate(backbone, prompts_of(11), generation_config=config)
    first = words.index(words[3])
    assert run.finish_reason == "stop"
    assert run.text.split() == words[:first]


def test_streamer_sees_every_token(backbone, capsys) -> None:
    streamer = TextStreamer(backbone.tokenizer, skip_prompt=True)
    (run,) = generate(backbone, prompts_of(11), generation_config=GREEDY, streamer=streamer)
    assert capsys.readouterr().out.split() == backbone.tokenizer.decode(run.token_ids).split()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (dict(prompts=prompts_of(600), generation_config=GREEDY), PromptTooLongError),
        (dict(prompts=prompts_of(505), generation_config=GREEDY), PromptTooLongError),
        (dict(prompts=[[]], generation_config=GREEDY), ConfigError),
        (dict(prompts=prompts_of(5), generation_config=GREEDY, trigger=TriggerConfig(kind="always")), ConfigError),
        (dict(prompts=prompts_of(5), generation_config=GenerationConfig(max_new_tokens=4, num_beams=2)), ConfigError),
    ],
)
def test_bad_calls_are_named(backbone, call: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        generate(backbone, call.pop("prompts"), **call)


def test_folder_with_a_generic_tokenizer_keeps_its_pre_tokenizer(tmp_path) -> None:
    """AutoTokenizer gives every Qwen2 model the family's own class, and with it another way to cut words."""
    backbone = make_backbone("qwen2")
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    loaded = Backbone.from_pretrained(tmp_path)
    assert loaded.encode("w7 w8") == backbone.encode("w7 w8") == [11, 12]
    assert loaded.fingerprint == backbone.fingerprint
