"""Whole answers, and long ones, against transformers' `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashmem_bench.engine.bounds import at_least, at_most
from flashmem_bench.engine.contestants import (
    our_decode_seconds,
    ours,
    ours_in_batches,
    their_decode_seconds,
    theirs,
    timed,
)
from flashmem_bench.engine.figures import Figure, Outcome
from flashmem_bench.engine.gates import full_pass, same_answers
from flashmem_bench.engine.turns import Ratio, Turns, take_turns
from flashmem_bench.engine.workload import fixed_length, mixed_prompts, random_prompt, until_eos

if TYPE_CHECKING:
    from flashmem_bench.engine.setting import Setting

OURS, SLICED, GENERATE = "ours", "ours in batches", "generate"
SINGLE, BATCHED, ROWS = 16, 96, 16
SINGLE_FIXED, BATCHED_FIXED, LONG_TOKENS = 128, 64, 128
LONG = (4096, 65536)
_SECONDS = Ratio(OURS, GENERATE, "seconds")
_RATE = Ratio(OURS, GENERATE, "tokens", "seconds")
_REPLACED = Ratio(OURS, SLICED, "tokens", "seconds")


def generate_batch1(setting: Setting) -> Outcome:
    """One prompt at a time: wall time of whole answers, ours over theirs."""
    backbone, clean = setting.backbone, setting.clean
    prompts, config = mixed_prompts(backbone, SINGLE, setting.seed), until_eos(backbone)
    found = Outcome("generate-batch1")
    mine, other = ours(backbone, prompts, config, 1), theirs(clean, prompts, config, 1)
    gate = same_answers(clean, prompts, mine, other, "ours against generate, one at a time")
    if not found.holds(gate):
        return found
    turns = take_turns(_answering(setting, config, 1), [_SECONDS], setting.stop, [[prompt] for prompt in prompts])
    bound = at_most(setting, 1.0, "cpu")
    found.figures.append(Figure.of("wall time, ours / generate", turns.ratio(_SECONDS), turns.pairs, bound=bound))
    longer = fixed_length(backbone, SINGLE_FIXED)
    fixed = take_turns(_answering(setting, longer, 1), [_SECONDS], setting.stop, [prompts[:1]])
    name = f"wall time of {SINGLE_FIXED} tokens, ours / generate"
    found.figures.append(Figure.of(name, fixed.ratio(_SECONDS), fixed.pairs))
    found.details = _about(prompts, mine) | {"until_eos": _speeds(turns), "fixed": _speeds(fixed)}
    return found


def generate_batch16(setting: Setting) -> Outcome:
    """Sixteen rows at once, in the order in which the prompts come: tokens a second, ours over theirs."""
    backbone, clean = setting.backbone, setting.clean
    prompts, config = mixed_prompts(backbone, BATCHED, setting.seed), until_eos(backbone)
    found = Outcome("generate-batch16")
    alone, together = ours(backbone, prompts, config, 1), ours(backbone, prompts, config, ROWS)
    gate = same_answers(clean, prompts, together, alone, f"ours with {ROWS} rows against ours one at a time")
    single = same_answers(clean, prompts, alone, theirs(clean, prompts, config, 1), "ours against generate, alone")
    if not found.holds(gate, single):
        return found
    padded = same_answers(clean, prompts, theirs(clean, prompts, config, ROWS), alone, f"generate with {ROWS} rows")
    found.notes.append(str(padded))
    engines = _answering(setting, config, ROWS, sliced=True)
    turns = take_turns(engines, [_RATE], setting.stop, [prompts])
    bound = at_least(setting, 2.0, "cpu")
    label = f"tokens/s with {ROWS} rows, ours / generate"
    found.figures.append(Figure.of(label, turns.ratio(_RATE), turns.pairs, bound=bound))
    label = "of that, rows replaced / rows that wait for the batch"
    found.figures.append(Figure.of(label, turns.ratio(_REPLACED), turns.pairs))
    some, equal = prompts[: 2 * ROWS], fixed_length(backbone, BATCHED_FIXED)
    fixed = take_turns(_answering(setting, equal, ROWS), [_RATE], setting.stop, [some])
    label = f"tokens/s where every answer has {BATCHED_FIXED} tokens"
    found.figures.append(Figure.of(label, fixed.ratio(_RATE), fixed.pairs))
    found.details = _about(prompts, alone) | {"until_eos": _speeds(turns), "fixed": _speeds(fixed)}
    return found


def generate_long(setting: Setting) -> Outcome:
    """One long prompt: tokens a second from the first token on, ours over theirs."""
    backbone, clean = setting.backbone, setting.clean
    found, config = Outcome("generate-long"), fixed_length(backbone, LONG_TOKENS)
    for context in setting.lengths(LONG, LONG_TOKENS):
        prompts = [random_prompt(backbone, context, setting.seed)]
        gate = full_pass(clean, prompts[0], _whole(setting, prompts, config), f"plain decoding at {context}")
        if not found.holds(gate):
            return found
        both = {
            OURS: lambda _, here=prompts: our_decode_seconds(backbone, here, config),
            GENERATE: lambda _, here=prompts: their_decode_seconds(clean, backbone, here, config),
        }
        turns = take_turns(both, [_RATE], setting.stop)
        bound = at_least(setting, 3.0, "cuda", context in LONG)
        name = "decode tokens/s, ours / generate"
        found.figures.append(Figure.of(name, turns.ratio(_RATE), turns.pairs, context=context, bound=bound))
        found.details[str(context)] = _speeds(turns)
    return found


def _whole(setting: Setting, prompts: list[list[int]], config: Any) -> Any:
    from flashmem.generation import generate

    return generate(setting.backbone, prompts, generation_config=config)[0]


def _answering(setting: Setting, config: Any, rows: int, sliced: bool = False) -> dict[str, Any]:
    """The contestants over a list of prompts; `sliced` is our engine with rows that are not replaced."""
    engines = {OURS: lambda prompts: ours(setting.backbone, prompts, config, rows)}
    if sliced:
        engines[SLICED] = lambda prompts: ours_in_batches(setting.backbone, prompts, config, rows)
    engines[GENERATE] = lambda prompts: theirs(setting.clean, prompts, config, rows)

    def contestant(engine: Any) -> Any:
        def take(prompts: list[list[int]]) -> dict[str, float]:
            seconds, answers = timed(setting.backbone, lambda: engine(prompts))
            return {"seconds": seconds, "tokens": float(sum(map(len, answers)))}

        return take

    return {name: contestant(engine) for name, engine in engines.items()}


def _about(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
    return {"prompt_tokens": [len(prompt) for prompt in prompts], "answer_tokens": [len(answer) for answer in answers]}


def _speeds(turns: Turns) -> dict[str, Any]:
    """Tokens a second of each contestant in each pass, beside the passes themselves."""
    return turns.plain() | {"tokens_s": {name: turns.of(name, "tokens", "seconds") for name in turns.totals}}
