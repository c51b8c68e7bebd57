"""MemGen's trained trigger: who is asked, what it costs, and that its fitting prefers what is rewarded."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig

from flashmem import ConfigError, MemoryConfig, TriggerConfig, generate, load_memory, new_memory
from flashmem.generation import Generation
from flashmem.trigger_training import Case, TriggerTraining, group_loss, train_trigger, with_trigger
from tests.flashmem.conftest import make_backbone, prompts_of

K = 2
DELIMITERS = TriggerConfig(kind="delimiter", cooldown=0, max_injections=3)
GREEDY = GenerationConfig(max_new_tokens=12, eos_token_id=99999, do_sample=False)


def _weaver(backbone):
    torch.manual_seed(3)
    memory = new_memory(MemoryConfig(source="weaver", length=K, encoder_rank=2), backbone)
    memory.cached = True
    return memory


def _grown(backbone):
    memory = with_trigger(_weaver(backbone), backbone, seed=1)
    memory.cached = True
    return memory.eval()


def _answers(memory, verdict: bool) -> None:
    """Make the trigger always say the same."""
    with torch.no_grad():
        memory.trigger_model.head.weight.zero_()
        memory.trigger_model.head.bias.copy_(torch.tensor([0.0, 9.0] if verdict else [9.0, 0.0]))


def test_log_probabilities_are_those_of_an_adapted_copy(family: str) -> None:
    backbone = make_backbone(family)
    model = _grown(backbone).trigger_model
    ids = torch.tensor(prompts_of(9))
    hidden = copy.deepcopy(model.reader[0].model).model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(model(ids), model.head(hidden).log_softmax(-1), rtol=1e-3, atol=1e-3)
    assert model.says(ids[0].tolist()) == bool(model(ids)[0, -1].argmax())


def test_it_refuses_memories_at_delimiters_and_nowhere_else() -> None:
    backbone = make_backbone()
    memory, plain = _grown(backbone), _weaver(backbone).eval()
    run = dict(generation_config=GREEDY, trigger=DELIMITERS)
    _answers(memory, verdict=False)
    (silent,) = generate(backbone, prompts_of(9), memory=memory, **run)
    (vanilla,) = generate(backbone, prompts_of(9), generation_config=GREEDY)
    assert silent.token_ids == vanilla.token_ids and not silent.triggers
    assert silent.verdicts[0] == (0, False) and not any(wanted for _, wanted in silent.verdicts)
    _answers(memory, verdict=True)
    (willing,) = generate(backbone, prompts_of(9), memory=memory, **run)
    (without,) = generate(backbone, prompts_of(9), memory=plain, **run)
    assert willing.token_ids == without.token_ids and willing.triggers == without.triggers
    # Asked under the cap alone, each time over the whole text and nothing but the text.
    assert [at for at, _ in willing.verdicts] == [t.text_index for t in willing.triggers]
    read = sum(9 + at for at, _ in willing.verdicts)
    assert willing.positions_woven == without.positions_woven + read
    every = TriggerConfig(kind="every", interval=4, cooldown=0, max_injections=2)
    (other,) = generate(backbone, prompts_of(9), memory=memory, generation_config=GREEDY, trigger=every)
    assert not other.verdicts and len(other.triggers) == 2, "it knows delimiters alone"


def test_a_memory_inside_the_answer_has_the_bank_for_that_also_where_the_first_was_refused() -> None:
    backbone = make_backbone()
    memory = _grown(backbone)
    said = iter([False, True])
    memory.trigger_model.says = lambda ids: next(said)
    text = "a, b"
    trigger = TriggerConfig(kind="delimiter", cooldown=0, max_injections=1)
    seen = []
    memory.register_forward_hook(lambda _, given, out: seen.append(given[0].inside))
    backbone.tokenizer.decode, plain = lambda ids, **_: text[: 2 * len(ids)], backbone.tokenizer.decode
    (run,) = generate(backbone, prompts_of(9), memory=memory, generation_config=GREEDY, trigger=trigger)
    backbone.tokenizer.decode = plain
    assert run.verdicts == [(0, False), (1, True)] and seen == [[True]]


def test_dropping_the_cache_changes_the_cost_and_nothing_else() -> None:
    backbone = make_backbone()
    for verdict in (True, False):
        found = []
        for cached in (True, False):
            memory = _grown(backbone)
            memory.cached, memory.drops_cache = cached, not cached
            _answers(memory, verdict)
            found += generate(backbone, prompts_of(9), memory=memory, generation_config=GREEDY, trigger=DELIMITERS)
        assert found[0].token_ids == found[1].token_ids and found[0].verdicts == found[1].verdicts


def test_the_weaver_is_kept_and_both_are_saved(tmp_path) -> None:
    backbone = make_backbone()
    weaver = _weaver(backbone)
    grown = with_trigger(weaver, backbone)
    for name, parameter in weaver.trained().items():
        assert torch.equal(parameter, grown.trained()[name])
    grown.save_pretrained(tmp_path / "both")
    loaded = load_memory(tmp_path / "both", backbone)
    ids = prompts_of(7)[0]
    assert loaded.config.trained_trigger and torch.equal(
        loaded.trigger_model(torch.tensor([ids])), grown.trigger_model(torch.tensor([ids]))
    )
    with pytest.raises(ConfigError, match="has a trained trigger already"):
        with_trigger(grown, backbone)


def test_the_gradient_of_a_group_is_that_of_its_decisions() -> None:
    backbone = make_backbone()
    model = _grown(backbone).trigger_model
    prompt = prompts_of(6)[0]
    answers = [
        Generation(6, token_ids=[5, 6, 7], verdicts=[(0, True), (2, False)]),
        Generation(6, token_ids=[5, 6, 7], verdicts=[(0, False)]),
    ]
    rewards = torch.tensor([1.0, 0.0])
    loss = group_loss(model, prompt, answers, rewards)
    said = model(torch.tensor([[*prompt, 5, 6, 7]]))[0]
    one, other = (said[5, 1] + said[7, 0]) / 2, said[5, 0]
    advantage = 0.5 / (rewards.std().item() + 1e-4)
    torch.testing.assert_close(loss, -(advantage * one - advantage * other) / 2)
    same = group_loss(model, prompt, answers, torch.tensor([1.0, 1.0]))
    same.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters()), "equal rewards teach nothing"


@pytest.mark.parametrize("wanted", [True, False])
def test_fitting_learns_what_is_rewarded(wanted: bool) -> None:
    backbone = make_backbone()
    memory = _grown(backbone)
    before = {name: p.clone() for name, p in memory.trained().items()}

    def reward(answer: Generation) -> float:
        return float((len(answer.triggers) > 0) == wanted)

    cases = [Case(prompt, GREEDY, reward) for prompt in prompts_of(6, 8, 7)]
    first = TriggerConfig(kind="delimiter", cooldown=0, max_injections=1)
    config = TriggerTraining(lr=3e-2, group=8, prompts=2, steps=12, seed=4)
    report = train_trigger(backbone, memory, cases, config, trigger=first)
    assert report.steps == 12 and sum(report.rewards[-3:]) / 3 > 0.9 > report.rewards[0]
    changed = {name for name, p in memory.trained().items() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("trigger_model.") for name in changed)
    assert memory.trigger_model.stream is None
    again = _grown(backbone)
    assert train_trigger(backbone, again, cases, config, trigger=first) == report, "a seed is a seed"


def test_what_cannot_be_fitted() -> None:
    backbone = make_backbone()
    with pytest.raises(ConfigError, match="needs a weaver that has one"):
        train_trigger(backbone, _weaver(backbone), [], TriggerTraining(steps=1), trigger=DELIMITERS)
    with pytest.raises(ConfigError, match="Say when to stop"):
        TriggerTraining()
    with pytest.raises(ConfigError, match="2 answers or more"):
        TriggerTraining(group=1, steps=1)
