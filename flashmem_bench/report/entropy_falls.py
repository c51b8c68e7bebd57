"""How much the attention entropy falls after a memory, and after plain steps that the same rule selects.

A step that is selected because its entropy is high is followed by lower ones whatever one does: regression to the mean.
So the same threshold, cooldown and cap are replayed on the entropies of plain decoding, watched but never injected, and
only the difference between the two falls is told. Latents are out of the row in both (`monitor.count_latents` is off by
default): eight positions that nothing attends to would lower the entropy by themselves. A fall is no evidence of
quality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flashmem_bench import stats
from flashmem_bench.report.cells import Cell, shared_samples

# Decision steps after a moment that its entropy is compared with, as in the paper's twin runs.
WINDOW = 10


@dataclass(frozen=True)
class Fall:
    """Nats by which the entropy falls.

    Attributes:
        interval: after a memory, less after plain steps; mean over samples that have both.
        memory: mean after a memory.
        plain: mean after plain steps.
        n: samples.
    """

    interval: stats.Interval
    memory: float
    plain: float
    n: int


def fall(cell: Cell, watch: Cell) -> Fall | None:
    """Compare the falls of a cell with those of a cell of plain decoding that was watched; None without a sample."""
    cooldown = int(cell.settings.get("settings.trigger.cooldown") or 0)
    cap = cell.settings.get("settings.trigger.max_injections")
    pairs, labels = [], []
    for name in shared_samples(cell, watch):
        text, plain = cell.texts.get(name) or {}, watch.texts.get(name) or {}
        moments = [trigger["text_index"] for trigger in text.get("triggers") or ()]
        threshold = cell.by_sample[name].get("threshold")
        chosen = replay(plain.get("entropies") or (), threshold, cooldown, cap)
        after, without = falls(text.get("entropies") or (), moments), falls(plain.get("entropies") or (), chosen)
        if after and without:
            pairs.append((sum(after) / len(after), sum(without) / len(without)))
            labels.append(cell.by_sample[name].get("cluster") or name)
    if not pairs:
        return None
    memory, plainly = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    interval = stats.paired_difference(memory, plainly, labels)
    return Fall(interval, sum(memory) / len(memory), sum(plainly) / len(plainly), len(pairs))


def replay(entropies: Sequence[float], threshold: float | None, cooldown: int, most: int | None) -> list[int]:
    """The steps at which a trigger with this threshold would have fired, by its own rule."""
    chosen: list[int] = []
    for step, value in enumerate(entropies):
        if most is not None and len(chosen) >= most:
            break
        rested = not chosen or step - chosen[-1] >= cooldown
        if threshold is not None and value > threshold and rested:
            chosen.append(step)
    return chosen


def falls(entropies: Sequence[float], moments: Sequence[int]) -> list[float]:
    """For each moment its entropy less the mean of the steps after it, nats; a moment at the very end has none."""
    found = []
    for moment in moments:
        later = entropies[moment + 1 : moment + 1 + WINDOW]
        if later and moment < len(entropies):
            found.append(entropies[moment] - math.fsum(later) / len(later))
    return found
