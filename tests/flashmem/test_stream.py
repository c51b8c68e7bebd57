"""A stream of requests: they are asked for one at a time, and each answer is what it is alone."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from flashmem.engine import StaticEngine, as_it_is
from flashmem.errors import ConfigError, PromptTooLongError
from flashmem.generation import Request, generate, generate_stream
from flashmem.memory import MemoryConfig, SampleContext, new_memory
from flashmem.trigger import TriggerConfig
from tests.flashmem.conftest import prompts_of

LENGTHS = (9, 31, 4, 17, 23, 6, 12)


def make_memory(backbone, kind="consolidator"):
    torch.manual_seed(1)
    memory = new_memory(MemoryConfig(source=kind.removesuffix("-cached"), length=3), backbone).eval()
    if kind.startswith("weaver"):
        memory.cached = kind.endswith("-cached")
        memory.drops_cache = not memory.cached
    return memory


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize(
    ("kind", "sampled"),
    [
        ("consolidator", False),
        ("consolidator", True),
        ("separate-encoder", False),
        ("weaver", False),
        ("weaver-cached", False),
    ],
)
def test_each_answer_is_the_one_that_it_is_alone(backbone, kind, sampled, batch_size):
    memory = make_memory(backbone, kind)
    config = GenerationConfig(max_new_tokens=12, do_sample=sampled, eos_token_id=list(range(12)))
    triggers = [TriggerConfig(kind="schedule", positions=(n % 4, 7), cooldown=2) for n in range(len(LENGTHS))]
    asked = [
        Request(prompt, trigger, SampleContext(str(n), ""), 40 + n)
        for n, (prompt, trigger) in enumerate(zip(prompts_of(*LENGTHS), triggers, strict=True))
    ]
    found = dict(generate_stream(backbone, asked, generation_config=config, memory=memory, batch_size=batch_size))
    assert sorted(found) == list(range(len(LENGTHS)))
    for number, request in enumerate(asked):
        (alone,) = generate(
            backbone,
            [request.prompt],
            generation_config=config,
            memory=memory,
            trigger=request.trigger,
            samples=[request.sample],
            seed=[request.seed],
        )
        assert found[number].token_ids == alone.token_ids
        assert [t.text_index for t in found[number].triggers] == [t.text_index for t in alone.triggers]
        assert found[number].positions_encoded == alone.positions_encoded
        assert found[number].positions_woven == alone.positions_woven
        assert found[number].entropies == pytest.approx(alone.entropies, abs=1e-4)


def test_a_request_is_asked_for_when_a_row_is_free(backbone):
    config, held, most = GenerationConfig(max_new_tokens=4), [0], []

    def asked():
        for prompt in prompts_of(*LENGTHS):
            held[0] += 1
            most.append(held[0])
            yield Request(prompt)

    for _ in generate_stream(backbone, asked(), generation_config=config, batch_size=2):
        held[0] -= 1
    assert len(most) == len(LENGTHS) and max(most) == 2


def test_those_under_way_are_finished_when_no_more_come(backbone):
    ended = []

    def asked():
        for prompt in prompts_of(*LENGTHS):
            if ended:
                return
            yield Request(prompt)

    config = GenerationConfig(max_new_tokens=5)
    for number, answer in generate_stream(backbone, asked(), generation_config=config, batch_size=3):
        ended.append(number)
        assert answer.output_tokens >= 1
    assert sorted(ended) == [0, 1, 2]


def test_nothing_asked_is_nothing_answered(backbone):
    config = GenerationConfig(max_new_tokens=5)
    assert list(generate_stream(backbone, [], generation_config=config, batch_size=3)) == []


def test_what_a_stream_refuses(backbone):
    def run(asked, **more):
        given = {"generation_config": GenerationConfig(max_new_tokens=4), "batch_size": 2, **more}
        return list(generate_stream(backbone, asked, **given))

    short = prompts_of(*LENGTHS)[0]
    with pytest.raises(ConfigError, match="max_new_tokens"):
        run([Request(short)], generation_config=GenerationConfig(max_length=40, max_new_tokens=None))
    with pytest.raises(ConfigError, match="A trigger without a memory source"):
        run([Request(short, TriggerConfig(kind="always"))])
    with pytest.raises(ConfigError, match="must be alike"):
        run([Request(short), Request(short, TriggerConfig(kind="always"))], memory=make_memory(backbone))
    with pytest.raises(PromptTooLongError, match="positions"):
        run([Request(short), Request(short * backbone.max_positions)])


@pytest.mark.parametrize("kind", ["consolidator", "weaver-cached"])
def test_recorded_passes_answer_a_stream_as_the_others_do(backbone, kind):
    memory, config = make_memory(backbone, kind), GenerationConfig(max_new_tokens=12, eos_token_id=list(range(12)))
    trigger = TriggerConfig(kind="every", interval=3, cooldown=0)
    asked = [Request(prompt, trigger) for prompt in prompts_of(*LENGTHS)]
    given = {"generation_config": config, "memory": memory, "batch_size": 3}
    plain = dict(generate_stream(backbone, asked, **given))
    backbone.engine = StaticEngine(backbone, as_it_is)
    again = dict(generate_stream(backbone, asked, **given))
    assert sorted(again) == sorted(plain) == list(range(len(LENGTHS)))
    for number, answer in again.items():
        assert answer.token_ids == plain[number].token_ids
        assert [t.position for t in answer.triggers] == [t.position for t in plain[number].triggers]
        assert answer.triggers and answer.positions_encoded == plain[number].positions_encoded
