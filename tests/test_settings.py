"""Settings: every key reads its text form, refuses what is out of range, and names near misses."""

from __future__ import annotations

import json

import pytest

from flashmem_bench.errors import UnknownNameError, UsageError
from flashmem_bench.settings import FIELDS, allowed, check_value, parse_assignments, resolve


def test_values_get_their_types():
    values = parse_assignments(["trigger.cooldown=0", "trigger.threshold=1.5", "monitor.normalise=true",
                                "trigger.max_injections=none", "sampling.logits=pre"])  # fmt: skip
    assert values == {"trigger.cooldown": 0, "trigger.threshold": 1.5, "monitor.normalise": True,
                      "trigger.max_injections": None, "sampling.logits": "pre"}  # fmt: skip
    assert values["monitor.normalise"] is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trigger.threshold=nan", "trigger.threshold must be a number of at least 0"),
        ("trigger.threshold=-1", "of at least 0"),
        ("trigger.threshold=inf", "of at least 0"),
        ("memory.length=0", "memory.length must be a whole number from 1 to 256"),
        ("memory.length=2.5", "a whole number from 1 to 256"),
        ("trigger.percentile=101", "from 0 to 100"),
        ("trigger.percentile=abc", "from 0 to 100"),
        ("trigger.interval=none", "a whole number from 1"),
        ("trigger.kind=entropy", "one of attention-entropy, output-entropy"),
        ("monitor.normalise=perhaps", "true or false"),
        ("exec=fast", "exec must be one of eager, compile, graph"),
        ("trigger.cooldown", "key=value"),
    ],
)
def test_bad_values_name_the_range(text, words):
    with pytest.raises(UsageError) as caught:
        parse_assignments([text])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "near"), [("trigger.treshold", "trigger.threshold"), ("memory.lenght", "memory.length"), ("sinks", "sinks")]
)
def test_unknown_keys_name_near_misses(key, near):
    with pytest.raises(UnknownNameError) as caught:
        parse_assignments([f"{key}=1"])
    assert near in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_key_accepts_its_default_and_describes_itself():
    flat = resolve({}).flat()
    assert set(flat) == set(FIELDS)
    for key, value in flat.items():
        assert check_value(key, value) == value
        assert allowed(key) and FIELDS[key].description


def test_layers_win_in_order():
    suite = {"trigger.cooldown": 4, "trigger.interval": 5}
    settings = resolve({"trigger.cooldown": 6}, suite=suite, fixed={"trigger.kind": "every"}, method="m")
    assert settings.trigger.cooldown == 6
    assert settings.trigger.interval == 5
    assert settings.trigger.kind == "every"
    assert json.loads(json.dumps(settings.to_json())) == settings.to_json()


def test_what_a_method_or_checkpoint_fixes_cannot_be_set():
    with pytest.raises(UsageError, match=r"fixes trigger\.kind=every"):
        resolve({"trigger.kind": "never"}, fixed={"trigger.kind": "every"}, method="flashmem-fixed-trigger")
    with pytest.raises(UsageError, match=r"checkpoint has memory\.length=8"):
        resolve({"memory.length": 4}, memory={"memory.length": 8})
    assert resolve({"memory.length": 8}, memory={"memory.length": 8}).memory.length == 8
