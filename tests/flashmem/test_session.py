"""Sessions: a forked question is the question asked from scratch, and no question leaves a trace in another."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GenerationConfig

from flashmem import MemoryConfig, TriggerConfig, generate, new_memory
from flashmem.errors import CheckpointError, ConfigError, PromptTooLongError
from flashmem.session import Session
from tests.flashmem.conftest import make_backbone, prompts_of

NEW = 6
CONFIG = GenerationConfig(max_new_tokens=NEW, eos_token_id=[])
PROMPT_END = TriggerConfig(kind="prompt-end")
# Random weights have entropies far above this: it fires at once and, after the cooldown, again.
OFTEN = TriggerConfig(kind="attention-entropy", threshold=0.01, cooldown=2, max_injections=3)
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> ' }}{% endif %}"
)


def memory_of(backbone, source: str = "consolidator"):
    torch.manual_seed(1)
    memory = new_memory(MemoryConfig(source=source, length=3), backbone)
    if source == "weaver":
        memory.cached = True
    return memory


def scratch(backbone, ids, memory=None, trigger=None, **more):
    (answer,) = generate(backbone, [ids], generation_config=CONFIG, memory=memory, trigger=trigger, **more)
    return answer


def same(one, other) -> None:
    assert one.token_ids == other.token_ids
    assert [(t.text_index, t.position, t.latents) for t in one.triggers] == [
        (t.text_index, t.position, t.latents) for t in other.triggers
    ]
    torch.testing.assert_close(
        torch.tensor(one.entropies), torch.tensor(other.entropies), rtol=1e-4, atol=1e-5, equal_nan=True
    )


def test_a_forked_question_is_the_whole_prompt_from_scratch(family: str) -> None:
    backbone = make_backbone(family)
    history, *questions = prompts_of(40, 5, 9, 1)
    session = Session(backbone)
    session.extend(history)
    for question in questions:
        fork = session.fork()
        fork.extend(question)
        whole = backbone.prefill([history + question])
        torch.testing.assert_close(fork.logits, whole.logits[0], rtol=1e-4, atol=1e-5)
        answer = session.ask(question, CONFIG)
        same(answer, scratch(backbone, history + question))
        assert (answer.positions_encoded, answer.positions_reused) == (len(question) + NEW - 1, len(history))
    assert (session.encoded, session.reused, session.token_ids) == (len(history), 0, history)


@pytest.mark.parametrize("trigger", [PROMPT_END, OFTEN], ids=["prompt-end", "entropy"])
@pytest.mark.parametrize("source", ["consolidator", "separate-encoder", "weaver"])
def test_memories_in_a_fork_are_those_of_the_whole_prompt(source: str, trigger: TriggerConfig) -> None:
    backbone = make_backbone("gemma2" if source == "consolidator" else "qwen2")
    memory, (history, question) = memory_of(backbone, source), prompts_of(30, 7)
    session = Session(backbone, memory, trigger)
    session.extend(history)
    answer, whole = session.ask(question, CONFIG), scratch(backbone, history + question, memory, trigger)
    same(answer, whole)
    assert answer.triggers and answer.positions_encoded == whole.positions_encoded - len(history)
    assert answer.positions_woven == whole.positions_woven
    assert session.latents == 0


def test_the_entropy_behind_a_suffix_is_the_one_from_scratch(family: str) -> None:
    backbone = make_backbone(family)
    history, question = prompts_of(33, 6)
    session = Session(backbone, memory_of(backbone), PROMPT_END)
    session.extend(history)
    session.extend(question)
    backbone.observe(True)
    whole = backbone.prefill([history + question])
    backbone.observe(False)
    assert session.entropy == pytest.approx(float(whole.entropy[0]), abs=1e-5)
    assert session.entropy > 0.1


def test_forks_leave_each_other_and_their_parent_alone() -> None:
    backbone = make_backbone()
    history, one, other = prompts_of(25, 6, 8)
    session = Session(backbone, memory_of(backbone, "weaver"), OFTEN)
    session.extend(history)
    before = {name: tensor.clone() for name, tensor in session._state.exported().items()}
    first, second = session.fork(), session.fork()
    assert first._state.cache.layers[0].keys.data_ptr() == session._state.cache.layers[0].keys.data_ptr()
    for fork, question in ((first, one), (second, other)):
        fork.extend(question)
    crossed = [fork.generate(CONFIG) for fork in (second, first)]
    for answer, question in zip(crossed, (other, one), strict=True):
        same(answer, session.ask(question, CONFIG))
    after = session._state.exported()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert session.token_ids == history and not session._state.kept


def test_an_answer_and_its_memories_stay_in_the_history() -> None:
    backbone = make_backbone()
    memory, (history, more) = memory_of(backbone), prompts_of(20, 5)
    session = Session(backbone, memory, PROMPT_END)
    session.extend(history)
    first = session.generate(CONFIG)
    assert first.positions_encoded == NEW - 1 + 3 and first.positions_reused == len(history)
    assert session.token_ids == history + first.token_ids and session.latents == 3
    session.extend(more)
    assert session.encoded == session.positions == len(history) + 3 + NEW + len(more)
    second = session.generate(CONFIG)
    # The second memory stands behind the first one's latents.
    assert second.triggers[0].position == len(history) + 3 + NEW + len(more)
    assert session.latents == 6


def test_a_session_is_the_same_after_it_was_saved_and_loaded(tmp_path, family: str) -> None:
    backbone = make_backbone(family)
    memory, (history, question) = memory_of(backbone), prompts_of(28, 5)
    session = Session(backbone, memory, PROMPT_END)
    session.extend(history)
    session.generate(CONFIG)
    session.save(tmp_path / "kept")
    again = Session.load(tmp_path / "kept", make_backbone(family), memory, PROMPT_END)
    assert again.token_ids == session.token_ids and again.latents == session.latents
    assert (again.encoded, again.reused) == (0, session.positions)
    same(again.ask(question, CONFIG), session.ask(question, CONFIG))
    session.extend(question)
    session.save(tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert Session.load(tmp_path / "kept", backbone).token_ids == session.token_ids


def test_what_a_session_must_not_be_loaded_into(tmp_path) -> None:
    backbone = make_backbone()
    session = Session(backbone)
    session.extend(prompts_of(12)[0])
    session.save(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"is a session of tiny-qwen2 .*begin a new session"):
        Session.load(tmp_path / "kept", make_backbone("llama"))
    with pytest.raises(ConfigError, match="reads the whole history"):
        Session.load(tmp_path / "kept", backbone, memory_of(backbone, "separate-encoder"))
    (tensors,) = (tmp_path / "kept").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        Session.load(tmp_path / "kept", backbone)
    record = tmp_path / "kept/session.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format_version": 99}))
    with pytest.raises(CheckpointError, match="session format 99"):
        Session.load(tmp_path / "kept", backbone)
    with pytest.raises(CheckpointError, match="is not a session"):
        Session.load(tmp_path, backbone)


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["template", "plain"])
def test_a_conversation_has_exactly_the_ids_of_the_full_prompt(template) -> None:
    backbone = make_backbone()
    backbone.tokenizer.chat_template = template
    session = Session(backbone)
    session.append("w1 w2 w3 w4 w5 w6 ")
    alone = session.encoded
    assert session.token_ids == backbone.encode_turns(session.turns, answer=False)
    answer = session.ask("w7 w8 ", CONFIG)
    whole = backbone.encode_chat("w1 w2 w3 w4 w5 w6 w7 w8 ")
    same(answer, scratch(backbone, whole))
    # The end mark of the turn, encoded with the history, gives way when the turn goes on.
    border = 1 if template else 0
    assert (answer.positions_reused, answer.prompt_tokens) == (alone - border, len(whole))
    assert answer.positions_encoded == len(whole) - answer.positions_reused + NEW - 1
    session.append("w7 w8 ")
    session.generate(CONFIG)
    session.append(" w9")
    assert [turn["role"] for turn in session.turns] == ["user", "assistant", "user"]
    full = backbone.encode_turns(session.turns, answer=False)
    assert session.token_ids == full
    torch.testing.assert_close(session.logits, backbone.prefill([full]).logits[0], rtol=1e-4, atol=1e-5)


def test_texts_and_token_ids_are_not_mixed() -> None:
    backbone = make_backbone()
    of_ids, of_texts = Session(backbone), Session(backbone)
    of_ids.extend([5, 6])
    of_texts.append("w1 w2")
    with pytest.raises(ConfigError, match="token ids: go on with extend"):
        of_ids.append("w1")
    with pytest.raises(ConfigError, match="of texts: go on with append"):
        of_texts.extend([5])
    with pytest.raises(ConfigError, match="of texts: go on with append"):
        of_texts.ask([5], CONFIG)


def test_limits_are_told_before_anything_is_encoded() -> None:
    backbone = make_backbone()
    session = Session(backbone)
    with pytest.raises(ConfigError, match="history is empty"):
        session.generate(CONFIG)
    session.extend(prompts_of(508)[0])
    with pytest.raises(PromptTooLongError, match="needs 514 positions"):
        session.generate(CONFIG)
    with pytest.raises(PromptTooLongError, match="needs 518 positions"):
        session.extend(prompts_of(10)[0])
    assert session.positions == 508
    memory = memory_of(backbone, "weaver")
    memory.drops_cache = True
    with pytest.raises(ConfigError, match="drops the cache"):
        Session(backbone, memory, PROMPT_END)


def test_a_long_text_is_appended_in_pieces(monkeypatch) -> None:
    from flashmem import backbone as module

    monkeypatch.setattr(module, "_LEAST_CHUNK", 1)
    backbone = make_backbone("mistral")
    backbone.chunk = 16
    history, rest = prompts_of(10, 50)
    session = Session(backbone)
    session.extend(history)
    session.extend(rest)
    backbone.chunk = None
    whole = backbone.prefill([history + rest])
    torch.testing.assert_close(session.logits, whole.logits[0], rtol=1e-4, atol=1e-5)
    assert session.encoded == 60


def test_an_answer_that_fails_leaves_the_session_as_it_was(monkeypatch) -> None:
    backbone = make_backbone()
    history, question = prompts_of(15, 4)
    session = Session(backbone)
    session.extend(history)
    step, calls = type(backbone).step, []

    def failing(self, state, tokens, rows=None):
        calls.append(tokens)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        step(self, state, tokens, rows)

    monkeypatch.setattr(type(backbone), "step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.generate(CONFIG)
    assert (session.token_ids, session.encoded, session.positions) == (history, 15, 15)
    same(session.ask(question, CONFIG), scratch(backbone, history + question))
    with pytest.raises(ConfigError, match="max_new_tokens"):
        session.generate(GenerationConfig(max_length=3))
    assert session.encoded == 15
