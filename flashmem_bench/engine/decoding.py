"""Methods against each other in the paper's protocol, and plain decoding against the memory bandwidth.

Eight cycles of 8 latents and 32 text tokens at a fixed context, as `latency` times them. The floor says what no engine
can go below; a bound on FlashMem's overhead is a multiple of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flashmem_bench.engine.bounds import at_least, at_most
from flashmem_bench.engine.contestants import our_decode_seconds
from flashmem_bench.engine.figures import Bound, Figure, Outcome
from flashmem_bench.engine.gates import full_pass, together
from flashmem_bench.engine.turns import Ratio, Turns, take_turns
from flashmem_bench.engine.workload import fixed_length, random_prompt
from flashmem_bench.floor import Shape, decode_floor
from flashmem_bench.latency.work import run_work

if TYPE_CHECKING:
    from flashmem_bench.engine.setting import Setting
    from flashmem_bench.latency.arms import Arm

NEAR_FLOOR, OVERHEAD, HEAVY, SHARE, BATCH_GAIN = 1.05, 1.08, 5.0, 0.60, 12.0
ROWS, ROW_TOKENS, HELD_ROWS = 32, 128, 4


def decode_4k(setting: Setting) -> Outcome:
    """Decode time of flashmem over plain decoding, against the floor that is computed."""
    found = Outcome("decode-4k")
    found.notes.append(f"expected: the floor from N, K, L, d and T; the bound is {NEAR_FLOOR} times the floor")
    return _overhead(setting, found, 4096, lambda floor, usual: at_most(setting, NEAR_FLOOR * floor, "cpu", usual))


def overhead_64k(setting: Setting) -> Outcome:
    """Decode time of flashmem over plain decoding at a long context."""
    found = Outcome("overhead-64k")
    found.notes.append("expected: the floor from N, K, L, d and T; the paper's own figure is 1.23")
    return _overhead(setting, found, 65536, lambda floor, usual: at_most(setting, OVERHEAD, "cuda", usual))


def _overhead(setting: Setting, found: Outcome, own: int, bound_of: Callable[[float, bool], Bound | None]) -> Outcome:
    for context in setting.lengths((own,), _room()):
        turns, arms = _methods(setting, found, ("vanilla", "flashmem"), context)
        if turns is None:
            return found
        floor = _floor(setting, arms[1], context)
        bound = bound_of(floor, context == own)
        found.figures += _over(turns, "flashmem", "vanilla", context, expected=floor, bound=bound)
    return found


def memgen_64k(setting: Setting) -> Outcome:
    """The heavy baseline over flashmem, end to end, at a long context; its cached form beside it."""
    found = Outcome("memgen-64k")
    names = ("flashmem", "memgen-cached", "memgen")
    for context in setting.lengths((65536,), _room()):
        turns, _ = _methods(setting, found, names, context)
        if turns is None:
            return found
        bound = at_least(setting, HEAVY, "cuda", context == 65536)
        for name in names[1:]:
            ratio = Ratio(name, "flashmem", "e2e_ms")
            more: dict[str, Any] = {"bound": bound, "expected": 5.05} if name == "memgen" else {}
            label = f"end to end, {name} / flashmem"
            found.figures.append(Figure.of(label, turns.ratio(ratio), turns.pairs, context=context, **more))
    found.notes.append("expected: the ratio that the paper reports for memgen")
    return found


def batch32_4k(setting: Setting) -> Outcome:
    """Tokens a second of 32 rows over those of one."""
    found, backbone = Outcome("batch32-4k"), setting.backbone
    config, rate = fixed_length(backbone, ROW_TOKENS), Ratio("32 rows", "1 row", "tokens", "seconds")
    for context in setting.lengths((4096,), ROW_TOKENS):
        prompts = [random_prompt(backbone, context, setting.seed + row) for row in range(ROWS)]
        if not _rows_are_right(setting, found, prompts, config):
            return found
        both = {
            "32 rows": lambda _, here=prompts: our_decode_seconds(backbone, here, config),
            "1 row": lambda _, here=prompts: our_decode_seconds(backbone, here[:1], config),
        }
        turns = take_turns(both, [rate], setting.stop)
        bound = at_least(setting, BATCH_GAIN, "cuda", context == 4096)
        label = "decode tokens/s, 32 rows / 1 row"
        found.figures.append(Figure.of(label, turns.ratio(rate), turns.pairs, context=context, bound=bound))
        found.details[str(context)] = turns.plain()
    return found


def decode_bandwidth(setting: Setting) -> Outcome:
    """The bytes a second that plain decoding must move, over those of a copy on the same device."""
    from flashmem_bench.ceilings import copy_bandwidth

    found, backbone = Outcome("decode-bandwidth"), setting.backbone
    config, rate = fixed_length(backbone, ROW_TOKENS), Ratio("decode", "copy", "bytes", "seconds")
    shape = Shape.of(backbone.config)
    for context in setting.lengths((4096, 65536), ROW_TOKENS):
        prompts = [random_prompt(backbone, context, setting.seed)]
        if not _rows_are_right(setting, found, prompts, config):
            return found
        moved = run_work(shape, None, prompt=context, text=ROW_TOKENS, moments=(), length=0,
                         element_bytes=backbone.dtype.itemsize)[1].bytes  # fmt: skip

        def decode(_: Any, here: Any = prompts, moved: float = moved) -> dict[str, float]:
            return {"seconds": our_decode_seconds(backbone, here, config)["seconds"], "bytes": moved}

        def copy(_: Any) -> dict[str, float]:
            return {"seconds": 1.0, "bytes": copy_bandwidth(str(backbone.device))}

        turns = take_turns({"decode": decode, "copy": copy}, [rate], setting.stop)
        bound = at_least(setting, SHARE, "cuda", context in (4096, 65536))
        label = "share of the measured bandwidth, plain decoding"
        found.figures.append(Figure.of(label, turns.ratio(rate), turns.pairs, context=context, bound=bound))
        found.details[str(context)] = turns.plain() | {"bytes_of_a_run": moved}
    found.notes.append("bytes: every weight once and the keys and values that are there, for each token")
    return found


def _rows_are_right(setting: Setting, found: Outcome, prompts: list[list[int]], config: Any) -> bool:
    from flashmem.generation import generate

    answers = generate(setting.backbone, prompts, generation_config=config)[:HELD_ROWS]
    label = f"plain decoding at {len(prompts[0])}, {len(answers)} of {len(prompts)} rows"
    held = [full_pass(setting.clean, p, a, label) for p, a in zip(prompts, answers, strict=False)]
    return found.holds(together(held, label))


def _room() -> int:
    from flashmem_bench.latency.protocol import Protocol

    # Text and latents of the paper's protocol.
    return Protocol().text_tokens + Protocol().cycles * 8


def _methods(setting: Setting, found: Outcome, names: Sequence[str], context: int) -> tuple[Turns | None, list[Arm]]:
    """Methods in turns at one context; None where one of them answers wrongly."""
    import torch

    from flashmem_bench.clock import clock_for
    from flashmem_bench.latency.arms import new_arm
    from flashmem_bench.latency.protocol import Protocol
    from flashmem_bench.latency.timing import timed_run

    backbone, protocol = setting.backbone, Protocol()
    torch.manual_seed(setting.seed)
    arms = [new_arm(name, backbone, protocol) for name in names]
    prompt = random_prompt(backbone, context, setting.seed)
    if not found.holds(*(_arm_is_right(setting, arm, protocol, prompt) for arm in arms)):
        return None, arms
    clock = clock_for(backbone.device.type)

    def contestant(arm: Arm) -> Any:
        def run(_: Any) -> dict[str, float]:
            timing = timed_run(backbone, arm, protocol, prompt, clock).timing
            return {"decode_ms": timing.decode_ms or 0.0, "e2e_ms": timing.e2e_ms or 0.0}

        return run

    first = names[0]
    measure = "decode_ms" if first == "vanilla" else "e2e_ms"
    watched = [Ratio(name, first, measure) for name in names[1:]]
    # Every arm has answered once already.
    turns = take_turns({arm.name: contestant(arm) for arm in arms}, watched, setting.stop, warm=1)
    found.details[str(context)] = turns.plain()
    return turns, arms


def _arm_is_right(setting: Setting, arm: Arm, protocol: Any, prompt: list[int]) -> Any:
    """Hold the answer of a method, its memories included, against one full pass."""
    from flashmem.generation import generate

    (answer,) = generate(
        setting.backbone,
        [prompt],
        memory=arm.memory,
        trigger=arm.trigger,
        generation_config=protocol.generation(),
        seed=0,
        keep_memories=True,
    )
    return full_pass(setting.clean, prompt, answer, f"{arm.name} at {len(prompt)}")


def _floor(setting: Setting, arm: Arm, context: int) -> float:
    from flashmem_bench.latency.protocol import Protocol

    assert arm.memory is not None
    protocol, backbone = Protocol(), setting.backbone
    return decode_floor(
        Shape.of(backbone.config),
        context=context,
        text_tokens=protocol.text_tokens,
        injections=protocol.cycles,
        length=arm.length,
        depth=arm.memory.config.depth or backbone.num_layers,
        element_bytes=backbone.dtype.itemsize,
    ).bytes_ratio


def _over(turns: Turns, above: str, below: str, context: int, **more: Any) -> list[Figure]:
    """The ratio of the decode times, held against the bound, and that of whole runs beside it."""
    decode = turns.ratio(Ratio(above, below, "decode_ms"))
    figure = Figure.of(f"decode time, {above} / {below}", decode, turns.pairs, context=context, **more)
    whole = turns.ratio(Ratio(above, below, "e2e_ms"))
    return [figure, Figure.of(f"with prefill, {above} / {below}", whole, turns.pairs, context=context)]
