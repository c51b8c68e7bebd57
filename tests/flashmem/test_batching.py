"""A batch writes what each of its rows writes alone: every source, every trigger, rows that leave and are replaced.

Prompts are of mixed lengths, several ids end an answer, and so rows begin, take memories and finish at different
moments. Whatever the batch size, tokens, moments and all counts are those of batch size 1, in float32.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from flashmem import (
    Backbone,
    ConfigError,
    Generation,
    MemoryBank,
    MemoryConfig,
    MemorySource,
    RandomMemory,
    SampleContext,
    TraceRecorder,
    TriggerConfig,
    generate,
    new_memory,
)
from flashmem.generation import generate_each
from tests.flashmem.conftest import make_backbone, prompts_of, reference_model

# The last ones outgrow what the first ones reserve; two are of one length.
PROMPTS = prompts_of(21, 8, 14, 8, 5, 90, 33, seed=3)
SIZES = (2, 3, len(PROMPTS))
# One token in ten ends an answer, and one in a hundred stops it.
CONFIG = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=list(range(4, 14)), stop_strings=["w55"])
K = 3

SOURCES = {
    "consolidator": {},
    "deep": {"depth": 3, "latent_attention": "earlier"},
    "last": {"depth": 2, "kv_layer": "last", "feedback": "embedding"},
    "separate-encoder": {"source": "separate-encoder"},
    "constant": {"source": "constant"},
    "weaver": {"source": "weaver"},
    "weaver-cached": {"source": "weaver"},
    "weaver-drops": {"source": "weaver"},
    "weaver-no-tail": {"source": "weaver"},
    "placebo": {},
}
TRIGGERS = {
    "entropy": {"kind": "attention-entropy", "cooldown": 0, "max_injections": 4},
    "cooldown": {"kind": "attention-entropy", "cooldown": 3, "max_injections": None},
    "output-entropy": {"kind": "output-entropy", "cooldown": 2, "max_injections": 2},
    "delimiter": {"kind": "delimiter", "cooldown": 2, "max_injections": 3},
    "every": {"kind": "every", "interval": 5, "max_injections": 2, "cooldown": 0},
    "random": {"kind": "random", "rate": 0.3, "cooldown": 0, "max_injections": 3, "seed": 2},
    "prompt-end": {"kind": "prompt-end"},
    "always": {"kind": "always", "cooldown": 2, "max_injections": 4},
    "never": {"kind": "never"},
}
SAMPLES = [SampleContext(f"sample-{nth}", answer=str(nth)) for nth in range(len(PROMPTS))]


@pytest.fixture(autouse=True)
def delimiters(monkeypatch) -> None:
    """Words of the test tokenizer that end in these digits are delimiters."""
    monkeypatch.setattr("flashmem.trigger.DELIMITERS", ("1", "7"))


def memory_of(source: str, backbone: Backbone, **more) -> MemorySource:
    torch.manual_seed(4)
    memory = new_memory(MemoryConfig(length=K, encoder_rank=2, **SOURCES[source], **more), backbone)
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            if name.endswith(("up", "outer.weight")):
                # These start at zero and would hide a mistake.
                parameter.normal_(0, 0.1)
    memory.cached = source == "weaver-cached"
    memory.drops_cache, memory.tail_cache = source in ("weaver-drops", "weaver-no-tail"), source != "weaver-no-tail"
    if source != "placebo":
        return memory.eval()
    bank = MemoryBank()
    for nth in range(8):
        bank.add(torch.randn(K, backbone.hidden_size), nth % 3, str(nth))
    return RandomMemory(memory, bank)


def run(backbone: Backbone, memory: MemorySource | None, trigger, size: int, **more) -> list[Generation]:
    more = {"generation_config": CONFIG, "samples": SAMPLES, "keep_memories": True, **more}
    return generate(backbone, PROMPTS, memory=memory, trigger=trigger, batch_size=size, **more)


def trigger_of(name: str, backbone: Backbone, memory: MemorySource) -> TriggerConfig:
    """A trigger; with a threshold that no entropy of the run is near to, where rounding would decide."""
    settings = TRIGGERS[name]
    if "entropy" not in settings["kind"]:
        return TriggerConfig(**settings)
    field = "output_entropies" if settings["kind"] == "output-entropy" else "entropies"
    plain = sorted(value for one in run(backbone, None, None, 1, trace=True) for value in getattr(one, field))
    for share in (60, 55, 65, 50, 70, 45):
        config = TriggerConfig(threshold=plain[len(plain) * share // 100] + 3e-4, **settings)
        seen = [value for one in run(backbone, memory, config, 1, trace=True) for value in getattr(one, field)]
        if min(abs(value - config.threshold) for value in seen) > 1e-4:
            return config
    raise AssertionError("no threshold between the entropies")


def same(ours: Generation, theirs: Generation) -> None:
    """Everything that a record says is the same; what was computed in another batch, up to rounding."""
    rounded = ("entropies", "output_entropies", "triggers", "memories")
    assert replace(ours, **{name: [] for name in rounded}) == replace(theirs, **{name: [] for name in rounded})
    moments = [[(t.text_index, t.position, t.latents) for t in one.triggers] for one in (ours, theirs)]
    assert moments[0] == moments[1]
    for one, other in zip(ours.triggers, theirs.triggers, strict=True):
        for name in ("entropy", "output_entropy", "divergence"):
            found, wanted = getattr(one, name), getattr(other, name)
            assert found is wanted is None or found == pytest.approx(wanted, abs=1e-4, rel=1e-3), name
    for name in ("entropies", "output_entropies"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-4), name
    for one, other in zip(ours.memories, theirs.memories, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def check_sizes(backbone: Backbone, memory, trigger, sizes=SIZES, **more) -> list[Generation]:
    alone = run(backbone, memory, trigger, 1, **more)
    for size in sizes:
        for ours, theirs in zip(run(backbone, memory, trigger, size, **more), alone, strict=True):
            same(ours, theirs)
    assert len({one.output_tokens for one in alone}) > 2, "the rows finish at different times"
    return alone


# What a source keeps or drops meets every kind of moment; the other sources meet the telling ones.
CELLS = [(source, trigger) for source in SOURCES for trigger in ("entropy", "delimiter", "random")]
CELLS += [(source, trigger) for source in ("consolidator", "weaver-no-tail") for trigger in TRIGGERS]


@pytest.mark.parametrize(("source", "trigger"), sorted(set(CELLS)))
def test_every_batch_size_writes_what_batch_size_one_writes(source: str, trigger: str, backbone) -> None:
    memory = memory_of(source, backbone)
    config = trigger_of(trigger, backbone, memory)
    alone = check_sizes(backbone, memory, config)
    moments = {tuple(t.text_index for t in one.triggers) for one in alone}
    if trigger in ("entropy", "cooldown", "output-entropy", "delimiter", "random"):
        assert len(moments) > 2, "the rows take memories at different moments"
    assert (trigger == "never") == (moments == {()})


def test_samples_without_names_keep_their_own_numbers(backbone) -> None:
    """What a placebo draws belongs to the sample and not to the row that it sits in."""
    memory = memory_of("placebo", backbone)
    check_sizes(backbone, memory, TriggerConfig(**TRIGGERS["random"]), samples=None)


def test_rows_are_replaced_in_every_family(family: str) -> None:
    backbone = make_backbone(family)
    memory = memory_of("consolidator", backbone)
    check_sizes(backbone, memory, trigger_of("entropy", backbone, memory), sizes=(3,))


def test_each_row_is_what_a_call_of_its_own_gives(backbone) -> None:
    memory = memory_of("weaver-cached", backbone)
    config = trigger_of("entropy", backbone, memory)
    for nth, one in enumerate(run(backbone, memory, config, 3)):
        (alone,) = generate(
            backbone, [PROMPTS[nth]], memory=memory, trigger=config, generation_config=CONFIG, keep_memories=True
        )
        same(one, alone)


CAPS = {"every": (0, 1, 3, 0, 2, None, 1), "attention-entropy": (2, 0, None, 1, 4, 3, 0)}


@pytest.mark.parametrize("kind", list(CAPS))
@pytest.mark.parametrize("source", ["consolidator", "weaver-cached", "weaver-drops", "weaver-no-tail"])
def test_each_prompt_may_have_a_trigger_of_its_own(source: str, kind: str, backbone) -> None:
    """With caps of none among them: one row waits for its memory to be encoded, its neighbour does not."""
    memory = memory_of(source, backbone)
    threshold = trigger_of("entropy", backbone, memory).threshold
    triggers = [
        TriggerConfig(kind=kind, threshold=threshold, interval=3 + nth % 3, cooldown=nth % 2, max_injections=cap)
        for nth, cap in enumerate(CAPS[kind])
    ]
    alone = check_sizes(backbone, memory, triggers)
    for nth, cap in enumerate(CAPS[kind]):
        (own,) = generate(
            backbone,
            [PROMPTS[nth]],
            memory=memory,
            trigger=triggers[nth],
            generation_config=CONFIG,
            keep_memories=True,
        )
        same(alone[nth], own)
        assert len(own.triggers) <= (99 if cap is None else cap)


def test_a_trained_trigger_is_asked_in_each_row(backbone) -> None:
    memory = memory_of("weaver-drops", backbone, trained_trigger=True)
    alone = check_sizes(backbone, memory, TriggerConfig(kind="delimiter", cooldown=0, max_injections=3))
    verdicts = [verdict for one in alone for _, verdict in one.verdicts]
    assert True in verdicts and False in verdicts


DRAWS = {
    "temperature": dict(temperature=1.7),
    "nucleus": dict(temperature=1.3, top_p=0.8, top_k=30),
    "least": dict(temperature=2.0, min_p=0.02, repetition_penalty=1.4),
}


@pytest.mark.parametrize("drawn", list(DRAWS))
def test_a_row_draws_in_a_batch_what_it_draws_alone(drawn: str, backbone) -> None:
    settings = {"max_new_tokens": 16, "do_sample": True, "eos_token_id": list(range(4, 14)), "top_k": 0}
    config = GenerationConfig(**{**settings, **DRAWS[drawn]})
    seeds, memory = [11, 5, 11, 3, 2**40, 7, 8], memory_of("consolidator", backbone)
    trigger = TriggerConfig(**TRIGGERS["random"])
    alone = check_sizes(backbone, memory, trigger, generation_config=config, seed=seeds)
    check_sizes(backbone, memory, trigger, sizes=(3,), generation_config=config, seed=4)
    for nth, prompt in enumerate(PROMPTS):
        more = dict(memory=memory, trigger=trigger, generation_config=config, keep_memories=True)
        (own,) = generate(backbone, [prompt], samples=[SAMPLES[nth]], seed=[seeds[nth]], **more)
        same(alone[nth], own)
    other = run(backbone, memory, trigger, 3, generation_config=config, seed=[seed + 1 for seed in seeds])
    assert [one.token_ids for one in other] != [one.token_ids for one in alone]


def test_a_repetition_penalty_is_that_of_transformers(backbone) -> None:
    """Rows of one batch have histories of their own lengths, and it looks at all of them."""
    config = GenerationConfig(
        max_new_tokens=20, do_sample=False, repetition_penalty=1.8, eos_token_id=[2, *range(4, 12)], pad_token_id=0
    )
    model = reference_model("qwen2", "sdpa")
    ours = check_sizes(backbone, None, None, generation_config=config)
    plain = run(backbone, None, None, 3, generation_config=replace_config(config, repetition_penalty=1.0))
    assert [one.token_ids for one in ours] != [one.token_ids for one in plain]
    for prompt, one in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert theirs[0, len(prompt) :].tolist() == one.token_ids


def replace_config(config: GenerationConfig, **changes) -> GenerationConfig:
    return GenerationConfig(**{**config.to_diff_dict(), **changes})


@pytest.mark.parametrize("source", ["consolidator", "weaver-drops"])
def test_the_literal_mode_writes_the_same_in_every_batch(source: str, backbone) -> None:
    memory = memory_of(source, backbone)
    trigger = TriggerConfig(kind="random", rate=0.4, cooldown=0, max_injections=4, seed=7)
    literal = check_sizes(backbone, memory, trigger, sampling_logits="pre")
    post = run(backbone, memory, trigger, 1)
    assert [one.token_ids for one in literal] != [one.token_ids for one in post]


@pytest.mark.parametrize("trigger", [None, "delimiter"])
def test_a_trace_watches_every_step_of_every_row(trigger: str | None, backbone) -> None:
    memory = None if trigger is None else memory_of("consolidator", backbone)
    config = None if trigger is None else TriggerConfig(**TRIGGERS[trigger])
    alone = check_sizes(backbone, memory, config, trace=True)
    for one, other in zip(alone, run(backbone, memory, config, 3), strict=True):
        assert len(one.entropies) == len(one.output_entropies) == one.output_tokens
        assert one.token_ids == other.token_ids and not other.output_entropies


def test_a_cache_that_was_prepared_is_gone_on_from(backbone) -> None:
    """Prompts that come with latents from before the call, in rows that are replaced."""
    memory = memory_of("consolidator", backbone)
    latents = torch.randn(2, backbone.hidden_size) * 0.3

    def prefill(prompts: list[list[int]]):
        state = backbone.prefill(prompts)
        backbone.inject(state, latents.expand(len(prompts), -1, -1), [len(prompt) % 2 == 0 for prompt in prompts])
        return state

    alone = check_sizes(backbone, memory, TriggerConfig(**TRIGGERS["random"]), prefill=prefill)
    for prompt, one in zip(PROMPTS, alone, strict=True):
        before = 2 * (len(prompt) % 2 == 0)
        assert one.positions_encoded == len(prompt) + before + one.output_tokens - 1 + one.latent_tokens
        for nth, trigger in enumerate(one.triggers):
            assert trigger.position == len(prompt) + before + trigger.text_index + K * nth


class Steps:
    """A clock that says what was under way at each token."""

    def __init__(self) -> None:
        self.tokens, self.under_way, self.most = 0, [], 0
        self.log: list[tuple[str, int]] = []
        self.ended: dict[int, int] = {}

    def phase(self, name: str):
        return nullcontext()

    paused = nullcontext

    def token(self) -> None:
        self.tokens += 1
        self.most = max(self.most, len(self.under_way))

    def begin(self, samples) -> None:
        self.under_way += samples
        self.log += [("begin", sample) for sample in samples]

    def end(self, sample: int) -> None:
        self.under_way.remove(sample)
        self.ended[sample] = self.tokens
        self.log.append(("end", sample))


@pytest.mark.parametrize("size", [1, 2, 3, len(PROMPTS), 50])
def test_prompts_are_yielded_once_and_as_soon_as_they_are_finished(size: int, backbone) -> None:
    memory, clock = memory_of("consolidator", backbone), Steps()
    config = trigger_of("entropy", backbone, memory)
    more = dict(memory=memory, trigger=config, generation_config=CONFIG, samples=SAMPLES)
    whole = generate(backbone, PROMPTS, **more)
    lengths, seen = [one.output_tokens for one in whole], {}
    answers = generate_each(backbone, PROMPTS, batch_size=size, clock=clock, **more)
    assert not clock.log, "nothing runs before it is asked for"
    for number, answer in answers:
        assert number not in seen
        seen[number] = answer
        assert clock.ended[number] == clock.tokens, "nobody waits for another row"
    for one, other in zip([seen[nth] for nth in range(len(PROMPTS))], whole, strict=True):
        same(one, replace(other, memories=[]))
    assert sorted(clock.log) == sorted((event, n) for event in ("begin", "end") for n in range(len(PROMPTS)))
    assert clock.most == min(size, len(PROMPTS))
    assert clock.tokens == _steps(lengths, min(size, len(PROMPTS))), "an empty seat is filled at once"


def _steps(lengths: list[int], seats: int) -> int:
    """Steps that so many seats need for answers of these lengths, taken in order."""
    free = [0] * seats
    for length in lengths:
        first = min(range(seats), key=free.__getitem__)
        free[first] += length
    return max(free)


def test_an_iterator_that_is_closed_half_way_leaves_the_backbone_alone(backbone) -> None:
    memory = memory_of("consolidator", backbone)
    config = trigger_of("entropy", backbone, memory)
    more = dict(memory=memory, trigger=config, generation_config=CONFIG, samples=SAMPLES)
    whole = run(backbone, memory, config, 2)
    answers = generate_each(backbone, PROMPTS, batch_size=2, **more)
    next(answers)
    assert backbone.tap is not None
    answers.close()
    assert backbone.tap is None
    assert not any(hasattr(layer.self_attn, "flashmem_tap") for layer in backbone.decoder.layers)
    with pytest.raises(StopIteration):
        next(answers)
    for one, other in zip(run(backbone, memory, config, 2), whole, strict=True):
        same(one, other)


def test_a_pass_that_fails_leaves_the_backbone_alone(backbone, monkeypatch) -> None:
    memory = memory_of("consolidator", backbone)
    config = trigger_of("entropy", backbone, memory)
    whole, step, calls = run(backbone, memory, config, 3), Backbone.step, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        step(self, *args)

    monkeypatch.setattr(Backbone, "step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(backbone, memory, config, 3)
    assert backbone.tap is None
    for one, other in zip(run(backbone, memory, config, 3), whole, strict=True):
        same(one, other)


def test_answers_stay_what_they_were_when_they_were_yielded(backbone) -> None:
    """A record is complete: later rows in the same place do not write into it."""
    memory = memory_of("weaver-cached", backbone)
    more = dict(memory=memory, trigger=TriggerConfig(**TRIGGERS["every"]), generation_config=CONFIG)
    at_once, kept = [], []
    for _, answer in generate_each(backbone, PROMPTS, batch_size=2, **more):
        kept.append(answer)
        at_once.append(repr(answer))
    assert [repr(answer) for answer in kept] == at_once


def test_batch_sizes_that_mean_nothing_are_refused(backbone) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        run(backbone, None, None, 0)
    with pytest.raises(ConfigError, match="leave batch_size away"):
        run(backbone, None, None, 2, recorder=TraceRecorder())
    with pytest.raises(ConfigError, match="triggers for 7 prompts"):
        run(backbone, None, [TriggerConfig(kind="never")] * 3, 2)
    with pytest.raises(ConfigError, match="of one kind"):
        run(backbone, None, [TriggerConfig(kind="never")] * 6 + [TriggerConfig(kind="always")], 2)


@pytest.mark.parametrize("source", [*SOURCES])
def test_chunks_change_nothing_in_any_source(source: str, backbone, monkeypatch) -> None:
    """What is encoded again, by whomever, is cut as prompts are; latents keep their places."""
    memory, trigger = memory_of(source, backbone), TriggerConfig(**TRIGGERS["random"])
    whole = run(backbone, memory, trigger, 3)
    monkeypatch.setattr("flashmem.backbone._LEAST_CHUNK", 1)
    for model in (backbone, *getattr(memory, "weaver", ()), *getattr(memory, "encoder", ())):
        model.chunk = 20
    for one, other in zip(run(backbone, memory, trigger, 3), whole, strict=True):
        same(one, other)


@pytest.mark.parametrize("size", [4, len(PROMPTS)])
def test_rows_that_left_cost_nothing_any_more(size: int, backbone, monkeypatch) -> None:
    """Nobody waits for their seats: they hold nothing, and half a batch goes on as a smaller one."""
    seen, step = [], Backbone.step

    def watched(self, state, tokens, rows=None):
        seen.append((state.batch_size, [row for row, n in enumerate(state.lengths) if n]))
        step(self, state, tokens, rows)

    monkeypatch.setattr(Backbone, "step", watched)
    lengths = [one.output_tokens for one in run(backbone, None, None, size)]
    for at, (seats, held) in enumerate(seen, 1):
        if size == len(PROMPTS):
            # Of all that began, those that have a token to come after this one.
            assert len(held) == sum(length > at for length in lengths)
        assert seats == len(held) or seats < 2 * len(held)
    assert seen[0][0] == size and seen[-1] == (1, [0])


def test_shorter_histories_are_filled_up_with_nothing_that_counts(backbone) -> None:
    """A penalty below one rewards what was said before, so that any token too many would be chosen at once."""
    config = GenerationConfig(max_new_tokens=12, do_sample=False, repetition_penalty=0.1, eos_token_id=-1)
    alone = [run_one.token_ids for run_one in run(backbone, None, None, 1, generation_config=config)]
    for size in SIZES:
        assert [one.token_ids for one in run(backbone, None, None, size, generation_config=config)] == alone
    assert all(set(ids) <= {*prompt, *ids[:1]} for prompt, ids in zip(PROMPTS, alone, strict=True))


def test_one_seed_makes_a_stream_of_its_own_for_each_row(backbone) -> None:
    config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=2.0, eos_token_id=-1)
    for size in (1, 2, 3):
        again = generate(backbone, [PROMPTS[0]] * 3, generation_config=config, seed=3, batch_size=size)
        assert len({tuple(one.token_ids) for one in again}) == 3
    own = generate(backbone, [PROMPTS[0]] * 3, generation_config=config, seed=[3, 3, 3], batch_size=2)
    assert {tuple(one.token_ids) for one in own} == {tuple(again[0].token_ids)}
