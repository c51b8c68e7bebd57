"""Every value that `--set key=value` can change, with its type and its range.

One pydantic model holds the dotted keys; the resolved model of a cell is written into its manifest, so a result can
be read without knowing the defaults of the day. Four layers are laid over each other, later ones win: the defaults
below, what the suite asks for, what the user sets, and what the method fixes because it is the method. A user who
sets what a method fixes is told so instead of getting a mislabelled result.

Two invariants: an unknown key names its nearest neighbours, and a bad value names the allowed range.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from flashmem_bench.errors import UnknownNameError, UsageError

# The library's kinds less "schedule", whose positions belong to a sample and cannot be a setting.
TriggerKind = Literal[
    "attention-entropy", "output-entropy", "never", "always", "every", "random", "delimiter", "prompt-end"
]
SUITE_PREFIX = "suite."
_MANY = 1_000_000


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TriggerSettings(_Group):
    """When a memory is injected."""

    kind: Annotated[TriggerKind, Field(description="what decides when to inject")] = "attention-entropy"
    threshold: Annotated[
        float | None,
        Field(ge=0, allow_inf_nan=False, description="tau in nats; none = the calibrated percentile"),
    ] = None
    percentile: Annotated[
        float,
        Field(ge=0, le=100, allow_inf_nan=False, description="percentile of the calibrated entropies taken as tau"),
    ] = 85.0
    interval: Annotated[int, Field(ge=1, le=_MANY, description="text tokens between memories (kind every)")] = 32
    rate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="chance a step (kind random)")] = 0.05
    cooldown: Annotated[int, Field(ge=0, le=_MANY, description="text tokens without a memory after one; 0 = none")] = 32
    max_injections: Annotated[
        int | None, Field(ge=0, le=_MANY, description="memories a sample at most; 0 = watch only, none = no limit")
    ] = 8


class MemorySettings(_Group):
    """What is injected. With a trained checkpoint these come from it, and setting another value is refused."""

    source: Annotated[
        Literal["consolidator", "separate-encoder", "constant", "weaver", "lora"],
        Field(description="what makes the memory"),
    ] = "consolidator"
    length: Annotated[int, Field(ge=1, le=256, description="K, latents a memory")] = 8
    depth: Annotated[
        int | None, Field(ge=1, le=256, description="L, consolidator layers; none = as many as the backbone")
    ] = 1
    kv_layer: Annotated[Literal["paired", "last"], Field(description="whose keys and values a layer reads")] = "paired"
    latent_attention: Annotated[Literal["none", "earlier"], Field(description="latents see earlier latents")] = "none"
    feedback: Annotated[Literal["raw", "normed", "embedding"], Field(description="what is fed to the next step")] = (
        "normed"
    )
    output_map: Annotated[Literal["linear", "gate", "identity"], Field(description="map to input embeddings")] = (
        "linear"
    )
    init: Annotated[
        Literal["inherited", "random"],
        Field(description="start weights of the consolidator, or of the weaver's linear maps"),
    ] = "inherited"
    encoder_layers: Annotated[
        int | None, Field(ge=1, le=256, description="layers of the separate encoder; none = all of the backbone's")
    ] = None
    encoder_rank: Annotated[
        int | None,
        Field(ge=1, le=1024, description="LoRA rank of the separate encoder or the weaver; none = matched (lora-sft)"),
    ] = 8
    reparam: Annotated[
        Literal["none", "mlp"], Field(description="trained embeddings as they are, or behind a network (prompt-tuning)")
    ] = "none"
    tail_cache: Annotated[
        bool, Field(description="memgen decodes with a cache behind its last memory; the released code does not")
    ] = True
    trained_trigger: Annotated[
        bool, Field(description="memgen's trained trigger may refuse a memory; it comes with the checkpoint")
    ] = False
    checkpoint: Annotated[
        str | None, Field(description="folder or hub id of a trained memory, or untrained; none = the search order")
    ] = None


class MonitorSettings(_Group):
    """How the attention entropy is measured."""

    layer: Annotated[int | None, Field(ge=0, le=1024, description="monitored layer; none = the last full one")] = None
    sinks: Annotated[int, Field(ge=0, le=1024, description="first tokens left out of the entropy")] = 4
    normalise: Annotated[bool, Field(description="divide by the log of the number of positions")] = False
    count_latents: Annotated[bool, Field(description="keep positions that hold latents in the entropy")] = False


class SamplingSettings(_Group):
    """How the next token is taken."""

    logits: Annotated[Literal["post", "pre"], Field(description="after the last latent, or before the injection")] = (
        "post"
    )
    temperature: Annotated[
        float | None, Field(ge=0, le=10, allow_inf_nan=False, description="0 = greedy; none = the suite's")
    ] = None


class VoteSettings(_Group):
    """How self-consistency draws its answers."""

    draws: Annotated[int, Field(ge=1, le=64, description="answers a sample (cot-sc)")] = 8
    temperature: Annotated[
        float, Field(gt=0, le=10, allow_inf_nan=False, description="at which they are sampled (cot-sc)")
    ] = 0.7


class EvictionSettings(_Group):
    """What KV eviction leaves of a prompt."""

    budget: Annotated[int, Field(ge=5, le=_MANY, description="positions that each layer and KV head keeps")] = 1024
    window: Annotated[int, Field(ge=1, le=_MANY, description="newest queries that vote in snapkv")] = 64
    kernel: Annotated[int, Field(ge=1, le=63, description="positions over which snapkv averages, odd")] = 5
    sinks: Annotated[int, Field(ge=0, le=1024, description="first positions that streaming-llm keeps")] = 4


class Settings(_Group):
    """All resolved settings of one cell."""

    trigger: TriggerSettings = TriggerSettings()
    memory: MemorySettings = MemorySettings()
    monitor: MonitorSettings = MonitorSettings()
    sampling: SamplingSettings = SamplingSettings()
    vote: VoteSettings = VoteSettings()
    eviction: EvictionSettings = EvictionSettings()
    exec: Annotated[
        Literal["eager", "compile", "graph"],
        Field(description="how decoding is run: kernel by kernel, compiled, or replayed as CUDA graphs"),
    ] = "eager"

    def to_json(self) -> dict[str, Any]:
        """Return the settings as nested plain values."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """Return the settings as one dotted key a value."""
        flat: dict[str, Any] = {}
        for name, value in self.to_json().items():
            if isinstance(value, dict):
                flat.update({f"{name}.{key}": inner for key, inner in value.items()})
            else:
                flat[name] = value
        return flat


def _fields() -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            found.update({f"{name}.{key}": inner for key, inner in group.model_fields.items()})
        else:
            found[name] = field
    return found


FIELDS = _fields()
SETTING_KEYS = tuple(FIELDS)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` strings of `--set` into checked values.

    Keys that begin with `suite.` are settings of a generated suite's generator (`suite.pairs=[8,64]`); they are read as
    JSON where they are JSON, and the suite checks them.

    Raises:
        UnknownNameError: A key that does not exist, with its near misses.
        UsageError: No `=`, a wrong type, or a value outside the allowed range.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set takes key=value, not {text!r}")
        key, value = key.strip(), value.strip()
        values[key] = _plain(value) if key.startswith(SUITE_PREFIX) else check_value(key, value)
    return values


def split_suite_settings(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate the generator settings of suites (without their prefix) from those of methods."""
    of_suite = {k.removeprefix(SUITE_PREFIX): v for k, v in values.items() if k.startswith(SUITE_PREFIX)}
    return of_suite, {k: v for k, v in values.items() if not k.startswith(SUITE_PREFIX)}


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_value(key: str, value: Any) -> Any:
    """Return `value` in the type of setting `key`; strings are read as the command line writes them."""
    if key not in FIELDS:
        raise UnknownNameError("setting", key, SETTING_KEYS)
    if isinstance(value, str) and value.lower() in ("none", "null") and _optional(FIELDS[key]):
        value = None
    group, _, name = key.rpartition(".")
    model = Settings.model_fields[group].annotation if group else Settings
    try:
        checked = model.model_validate({name: value})  # type: ignore[union-attr]
    except ValidationError:
        raise UsageError(f"{key} must be {allowed(key)}, not {str(value)!r}") from None
    return getattr(checked, name)


def allowed(key: str) -> str:
    """Say which values the setting takes, e.g. `a whole number from 1 to 256, or none`."""
    field = FIELDS[key]
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    choices = typing.get_args(kinds[0]) if typing.get_origin(kinds[0]) is Literal else ()
    if choices:
        text = str(choices[0]) if len(choices) == 1 else f"one of {', '.join(map(str, choices))}"
    else:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        text = names[kinds[0]] + _range(field)
    return text + (", or none" if _optional(field) else "")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _optional(field: FieldInfo) -> bool:
    return type(None) in _alternatives(field.annotation)


def _range(field: FieldInfo) -> str:
    low = next((m.ge for m in field.metadata if getattr(m, "ge", None) is not None), None)
    above = next((m.gt for m in field.metadata if getattr(m, "gt", None) is not None), None)
    high = next((m.le for m in field.metadata if getattr(m, "le", None) is not None), None)
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if above is not None and high is not None:
        return f" above {above}, at most {high}"
    return f" of at least {low}" if low is not None else ""


def resolve(
    user: Mapping[str, Any],
    *,
    suite: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    method: str = "",
    memory: Mapping[str, Any] | None = None,
) -> Settings:
    """Lay the layers over each other and return the settings of a cell.

    Args:
        user: Checked values of `--set`.
        suite: What the suite file asks for, as dotted keys.
        fixed: What defines the method, as dotted keys.
        defaults: What the method has unless the user says otherwise.
        method: The method's name, for the message.
        memory: The `memory.*` values of the trained checkpoint in use, as dotted keys.

    Raises:
        UsageError: The user set what the method or its checkpoint fixes to another value.
    """
    for key, value in (fixed or {}).items():
        if key in user and user[key] != value:
            raise UsageError(f"method {method} fixes {key}={_shown(value)}; it cannot be set to {_shown(user[key])}")
    for key, value in (memory or {}).items():
        if key in user and user[key] != value:
            raise UsageError(
                f"the memory checkpoint has {key}={_shown(value)}, not {_shown(user[key])}; train one with "
                f"`flashmem-bench train --set {key}={_shown(user[key])}` or leave the setting out"
            )
    merged = {**(suite or {}), **(defaults or {}), **user, **(memory or {}), **(fixed or {})}
    nested: dict[str, Any] = {}
    for key, value in merged.items():
        group, _, name = key.rpartition(".")
        target = nested.setdefault(group, {}) if group else nested
        target[name] = check_value(key, value)
    return Settings.model_validate(nested)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
