"""Passes of fixed shape against passes as they come: the same tokens, triggers and counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from flashmem import ConfigError, MemoryConfig, MonitorConfig, TriggerConfig, attention, engine, generate, new_memory
from flashmem.backbone import Backbone
from flashmem.engine import StaticEngine, as_it_is, bucket_of
from flashmem.session import Session
from tests.flashmem.conftest import make_backbone, prompts_of

CONFIG = GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=7)
PROMPTS = prompts_of(18, 7, 25, 40, 9, 5)
OFTEN = TriggerConfig(kind="attention-entropy", threshold=1.9, cooldown=4, max_injections=5)
EVERY = TriggerConfig(kind="every", interval=5, cooldown=0, max_injections=4)
NEVER = TriggerConfig(kind="never")


def static(backbone: Backbone, record=as_it_is) -> StaticEngine:
    backbone.engine = StaticEngine(backbone, record)
    return backbone.engine


def memory_of(backbone: Backbone, source: str, **options):
    torch.manual_seed(0)
    return new_memory(MemoryConfig(source=source, length=3, **options), backbone).eval()


def facts(run) -> tuple:
    injected = [(t.text_index, t.position, t.latents) for t in run.triggers]
    counts = (run.positions_encoded, run.positions_woven, run.positions_reused)
    return run.token_ids, run.finish_reason, injected, counts


def same(mine, theirs) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert facts(one) == facts(other)
        assert one.entropies == pytest.approx(other.entropies, abs=1e-3)
        told = [(t.divergence, u.divergence) for t, u in zip(one.triggers, other.triggers, strict=True)]
        assert all(a == pytest.approx(b, abs=1e-2) for a, b in told)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("source", ["consolidator", "separate-encoder", "weaver", "constant"])
def test_static_passes_generate_the_same(source: str, rows: int) -> None:
    backbone = make_backbone()
    memory = memory_of(backbone, source)
    for trigger in (OFTEN, EVERY, NEVER):
        backbone.execution = "eager"
        plain = generate(backbone, PROMPTS, generation_config=CONFIG, memory=memory, trigger=trigger, batch_size=rows)
        static(backbone)
        fixed = generate(backbone, PROMPTS, generation_config=CONFIG, memory=memory, trigger=trigger, batch_size=rows)
        same(plain, fixed)


def test_trying_a_pass_before_it_is_recorded_changes_nothing() -> None:
    """A capture runs a pass a few times first, on rows that are in the middle of an answer."""

    def tried(run):
        for _ in range(4):
            run()
        return run

    backbone = make_backbone()
    memory = memory_of(backbone, "consolidator")
    plain = generate(backbone, PROMPTS, generation_config=CONFIG, memory=memory, trigger=EVERY, batch_size=3)
    static(backbone, tried)
    same(plain, generate(backbone, PROMPTS, generation_config=CONFIG, memory=memory, trigger=EVERY, batch_size=3))


def test_every_family_runs_in_fixed_shapes(family: str) -> None:
    backbone = make_backbone(family)
    memory = memory_of(backbone, "consolidator")
    plain = generate(backbone, PROMPTS[:4], generation_config=CONFIG, memory=memory, trigger=EVERY, batch_size=2)
    static(backbone)
    same(plain, generate(backbone, PROMPTS[:4], generation_config=CONFIG, memory=memory, trigger=EVERY, batch_size=2))


def test_draws_and_penalties_are_those_of_the_eager_passes() -> None:
    backbone = make_backbone()
    config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=1.3, repetition_penalty=1.2)
    plain = generate(backbone, PROMPTS, generation_config=config, seed=3, batch_size=2)
    static(backbone)
    again = generate(backbone, PROMPTS, generation_config=config, seed=3, batch_size=2)
    assert [run.token_ids for run in plain] == [run.token_ids for run in again]


def test_a_second_prompt_replays_what_the_first_one_recorded() -> None:
    backbone, recorded = make_backbone(), []

    def count(run):
        recorded.append(run)
        return run

    static(backbone, count)
    memory = memory_of(backbone, "consolidator")
    for number, prompt in enumerate(PROMPTS):
        generate(backbone, [prompt], generation_config=CONFIG, memory=memory, trigger=EVERY)
        if number == 0:
            first = len(recorded)
    assert len(recorded) == first == 3, "one token, one memory, one injection"


def test_forks_of_a_kept_prefix_replay_what_the_first_one_recorded() -> None:
    """Each question of a session is such a fork; it must see the prefix, and nothing of the fork before it."""
    backbone, recorded = make_backbone(), []
    memory = memory_of(backbone, "consolidator")
    prefix, questions = prompts_of(200)[0], prompts_of(6, 11, 4, 9)

    def answers() -> list[tuple]:
        kept, found = backbone.prefill([prefix]), []
        for question in questions:

            def fork(prompts, question=question):
                state = kept.fork()
                backbone.append(state, [question])
                return state

            more = {"generation_config": CONFIG, "memory": memory, "trigger": EVERY, "prefill": fork}
            found.append(facts(generate(backbone, [prefix + question], **more)[0]))
            counts.append(len(recorded))
        return found

    counts: list[int] = []
    wanted = answers()
    static(backbone, lambda run: recorded.append(run) or run)
    counts.clear()
    assert answers() == wanted
    assert counts[1] == counts[2] == counts[3], "the second one needed larger buffers than the first"


def test_another_monitor_is_recorded_anew() -> None:
    backbone, recorded = make_backbone(), []

    def count(run):
        recorded.append(run)
        return run

    static(backbone, count)
    memory = memory_of(backbone, "consolidator")
    more = {"generation_config": CONFIG, "memory": memory, "trigger": EVERY}
    counts = []
    for sinks in (4, 4, 1):
        backbone.monitor = MonitorConfig(sinks=sinks)
        generate(backbone, PROMPTS[:1], **more)
        counts.append(len(recorded))
    assert counts[0] == counts[1] < counts[2]


def test_merged_weights_are_run_as_the_others() -> None:
    backbone = make_backbone()
    adapters = new_memory(MemoryConfig(source="lora", encoder_rank=2), backbone)
    backbone.execution = "compile"
    assert adapters.merged(backbone).execution == "compile"


def test_longer_prompts_get_a_bucket_of_their_own() -> None:
    backbone = make_backbone()
    (long,) = prompts_of(150)
    plain = generate(backbone, [long, PROMPTS[0]], generation_config=CONFIG, batch_size=1)
    static(backbone)
    same(plain, generate(backbone, [long, PROMPTS[0]], generation_config=CONFIG, batch_size=1))
    same(plain[::-1], generate(backbone, [PROMPTS[0], long], generation_config=CONFIG, batch_size=1))


def test_states_that_live_side_by_side_do_not_disturb_each_other() -> None:
    backbone = make_backbone()
    config = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=99999)
    history, one, other = prompts_of(25, 6, 8)
    alone = [generate(backbone, [history + rest], generation_config=config)[0].token_ids for rest in (one, other)]
    static(backbone)
    session = Session(backbone)
    session.extend(history)
    forks = [session.fork(), session.fork()]
    for fork, rest in zip(forks, (one, other), strict=True):
        fork.extend(rest)
    crossed = [fork.generate(config).token_ids for fork in forks[::-1]]
    assert crossed == alone[::-1]
    assert session.ask(one, config).token_ids == alone[0]


class _NoHostReads(TorchDispatchMode):
    """Fails where a pass asks the device for a value or copies from the host, which no recording can replay."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "item", "lift_fresh"), name
        return func(*args, **(kwargs or {}))


def test_nothing_in_a_recorded_pass_depends_on_the_host(family: str) -> None:
    backbone = make_backbone(family)

    def watched(run):
        def call() -> None:
            with _NoHostReads():
                run()

        return call

    static(backbone, watched)
    memory = memory_of(backbone, "consolidator")
    runs = generate(backbone, PROMPTS[:3], generation_config=CONFIG, memory=memory, trigger=EVERY, batch_size=2)
    assert all(run.triggers for run in runs)


@pytest.mark.slow
def test_compiled_passes_generate_the_same() -> None:
    backbone = make_backbone()
    memory = memory_of(backbone, "consolidator")
    plain = generate(backbone, PROMPTS, generation_config=CONFIG, memory=memory, trigger=OFTEN, batch_size=2)
    backbone.execution = "compile"
    same(plain, generate(backbone, PROMPTS, generation_config=CONFIG, memory=memory, trigger=OFTEN, batch_size=2))


def test_modes_that_the_device_does_not_have_are_refused() -> None:
    backbone = make_backbone()
    with pytest.raises(ConfigError, match="exec=graph needs a CUDA device"):
        backbone.execution = "graph"
    with pytest.raises(ConfigError, match="use one of eager, compile, graph"):
        backbone.execution = "fast"
    assert backbone.execution == "eager" and type(backbone.engine) is engine.Engine


@pytest.mark.parametrize("length", [1, 127, 128, 129, 4096, 4097, 65_537, 131_072])
def test_a_bucket_holds_its_length_and_little_more(length: int) -> None:
    bucket = bucket_of(length)
    assert length <= bucket <= length + max(128, length // 16 + 1)
    assert bucket_of(bucket) == bucket


@pytest.mark.parametrize("kernel", list(attention.KERNELS))
@pytest.mark.parametrize(("heads", "groups", "length"), [(4, 2, 96), (6, 6, 2048), (12, 2, 3 * 1024)])
def test_kernels_of_one_token_agree(kernel: str, heads: int, groups: int, length: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, n, t, 16) for n, t in ((heads, 1), (groups, length), (groups, length)))
    hidden = torch.arange(length) > torch.tensor([[length - 1], [length // 2], [3]])
    mask = torch.zeros(3, 1, 1, length).masked_fill(hidden[:, None, None], torch.finfo(torch.float32).min)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, *(part.repeat_interleave(heads // groups, 1) for part in (key, value)), attn_mask=mask, scale=0.3
    )
    with attention.decoding_with(kernel):
        found = attention.attend(query, key, value, mask, 0.3, 0.0)
    torch.testing.assert_close(found, wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)
