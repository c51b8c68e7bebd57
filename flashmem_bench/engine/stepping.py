"""What the monitored attention row costs: decode steps with the monitor on and off, from one and the same state.

Both take short blocks of steps in turns, each on a fork of one prefilled state, so that the context is the same in
every block. The first steps of a block are not timed: there a fork copies what it shares, and a kernel is chosen. A
block gives the median of its steps, which one interruption by the system does not move.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flashmem_bench.engine.bounds import at_most
from flashmem_bench.engine.contestants import timed
from flashmem_bench.engine.figures import Figure, Outcome
from flashmem_bench.engine.gates import tolerance
from flashmem_bench.engine.turns import Ratio, take_turns
from flashmem_bench.engine.workload import random_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from flashmem.backbone import DecodeState
    from flashmem_bench.engine.setting import Setting

ROW = 1.03
STEPS, UNTIMED = 16, 2
# A block is short, so there are many; a bound of 3 % wants a narrow interval.
_BLOCKS, _TOLERANCE = 8, 0.004
ON, OFF = "monitor on", "monitor off"


def monitored_row(setting: Setting) -> Outcome:
    """Decode steps with the monitored row over decode steps without."""
    import torch

    found = Outcome("monitored-row-8k")
    stop = setting.stop
    stop = replace(stop, runs=_BLOCKS * stop.runs, most_runs=_BLOCKS * stop.most_runs, tolerance=_TOLERANCE)
    ratio = Ratio(ON, OFF, "step_seconds")
    for context in setting.lengths((8192,), STEPS + UNTIMED):
        with torch.inference_mode():
            base = setting.backbone.prefill([random_prompt(setting.backbone, context, setting.seed)])
            try:
                if not _same_logits(setting, base, found, context):
                    return found
                both = {name: _blocks(setting, base, name == ON) for name in (ON, OFF)}
                turns = take_turns(both, [ratio], stop)
            finally:
                setting.backbone.observe(False)
        bound = at_most(setting, ROW, "cpu", context == 8192)
        name = "decode step, monitor on / off"
        found.figures.append(Figure.of(name, turns.ratio(ratio), turns.pairs, context=context, bound=bound))
        found.details[str(context)] = turns.plain() | {"steps_of_a_block": STEPS}
    return found


def _blocks(setting: Setting, base: DecodeState, on: bool) -> Any:
    def block(_: Any) -> dict[str, float]:
        return {"step_seconds": _steps(setting, base, on)[0]}

    return block


def _steps(setting: Setting, base: DecodeState, on: bool) -> tuple[float, Tensor, Tensor]:
    """Run a block on a fork; returns the median seconds of its timed steps, and the last logits and entropy."""
    backbone = setting.backbone
    backbone.observe(on)
    state, rows = base.fork(), base.batch_size

    def step() -> None:
        backbone.engine.step(state, [0] * rows, [True] * rows)

    for _ in range(UNTIMED):
        step()
    times = [timed(backbone, step)[0] for _ in range(STEPS)]
    return statistics.median(times), state.logits.clone(), state.entropy.clone()


def _same_logits(setting: Setting, base: DecodeState, found: Outcome, context: int) -> bool:
    """The monitor may change nothing but the entropy, and must have one."""
    _, plain, _ = _steps(setting, base, False)
    _, watched, entropy = _steps(setting, base, True)
    gap = float((plain - watched).abs().max() / plain.abs().max())
    found.correct = gap <= tolerance(setting.backbone.model) and bool((entropy > 0).all())
    found.gate = (
        f"logits with the monitor differ by {gap:.1e} of the largest at {context}, entropy {float(entropy[0]):.3f} nats"
    )
    return found.correct
