"""Policies and their gate, on plain numbers."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmem import ConfigError, TriggerConfig
from flashmem.trigger import RowStep, build_gate


def _fired(config: TriggerConfig, entropies: list[float], tails: list[str] | None = None) -> list[int]:
    gate = build_gate(config, "sample")
    tails = tails or [""] * len(entropies)
    return [t for t, (h, s) in enumerate(zip(entropies, tails, strict=True)) if gate.decide(RowStep(t, h, h, s))]


@given(
    st.lists(st.floats(0, 5), min_size=1, max_size=80),
    st.integers(0, 40),
    st.one_of(st.none(), st.integers(0, 6)),
)
def test_gate_keeps_its_promises(entropies: list[float], cooldown: int, cap: int | None) -> None:
    config = TriggerConfig(threshold=2.0, cooldown=cooldown, max_injections=cap)
    fired = _fired(config, entropies)
    assert all(entropies[t] > 2.0 for t in fired)
    assert all(b - a >= cooldown for a, b in itertools.pairwise(fired))
    assert cap is None or len(fired) <= cap
    # Greedy: nothing that the gate allows is passed over.
    last, count = None, 0
    for t, h in enumerate(entropies):
        allowed = (last is None or t - last >= cooldown) and (cap is None or count < cap)
        assert (t in fired) == (allowed and h > 2.0)
        if t in fired:
            last, count = t, count + 1


def test_paper_schedule_is_the_worst_case_of_the_default() -> None:
    always = TriggerConfig(kind="always")
    assert _fired(always, [0.0] * 256) == list(range(0, 256, 32))
    assert _fired(TriggerConfig(kind="every", interval=32), [0.0] * 256) == list(range(0, 256, 32))


def test_simple_kinds() -> None:
    free = dict(cooldown=0, max_injections=None)
    assert _fired(TriggerConfig(kind="prompt-end", **free), [9.0] * 5) == [0]
    assert _fired(TriggerConfig(kind="never"), [9.0] * 5) == []
    assert _fired(TriggerConfig(kind="schedule", positions=(1, 3), **free), [0.0] * 5) == [1, 3]
    tails = ["", "a", ",", " b.", "\n", ". ", "c"]
    assert _fired(TriggerConfig(kind="delimiter", **free), [0.0] * 7, tails) == [0, 2, 3, 4, 5]


def test_random_rate_and_streams() -> None:
    config = TriggerConfig(kind="random", rate=0.3, cooldown=0, max_injections=None)
    hits = {name: [build_gate(config, name).decide(RowStep(0, 0.0))] for name in map(str, range(2000))}
    share = sum(h[0] for h in hits.values()) / len(hits)
    assert 0.26 < share < 0.34
    again = {name: [build_gate(config, name).decide(RowStep(0, 0.0))] for name in map(str, range(2000))}
    assert hits == again


def test_output_entropy_ignores_attention() -> None:
    gate = build_gate(TriggerConfig(kind="output-entropy", threshold=1.0))
    assert not gate.decide(RowStep(0, 9.0, 0.5))
    assert gate.decide(RowStep(1, 0.0, 1.5))


@pytest.mark.parametrize(
    "bad",
    [
        dict(threshold=math.nan),
        dict(threshold=-1.0),
        dict(threshold=math.inf),
        dict(percentile=101),
        dict(rate=1.5),
        dict(interval=0),
        dict(cooldown=-1),
        dict(kind="sometimes"),
    ],
)
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError):
        TriggerConfig(**bad)


def test_missing_threshold_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="calibrate"):
        build_gate(TriggerConfig())
