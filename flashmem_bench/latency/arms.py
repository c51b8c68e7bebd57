"""What is timed of each method: its engine, its memory source and its trigger, without suites, settings or scores.

A memory that is not trained costs what a trained one costs. `lora-sft` answers with merged weights, so it is plain
decoding under another name and is timed as such. Placebos run the method and replace its output; their bank holds
random latents here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import UsageError
from flashmem_bench.latency.protocol import Protocol

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem.memory import MemoryConfig, MemorySource
    from flashmem.state import DecodeState
    from flashmem.trigger import TriggerConfig

DRAWS = 8
EVICTING = ("snapkv", "streaming-llm", "tova", "h2o")
# Methods whose moments are matched to a cell of samples: there is none here.
_NEEDS_A_CELL = ("flashmem-random-trigger", "flashmem-matched-fixed", "flashmem-matched-output")
_BANK = 16


@dataclass(frozen=True)
class Arm:
    """One method, ready to be timed.

    Attributes:
        name: The method.
        memory: Its memory source; None decodes plainly.
        trigger: When memories come; None decodes plainly.
        kind: Source as `flashmem_bench.positions` names it.
        rows: Answers drawn together.
        prefill: Encodes the prompts in the place of `Backbone.prefill`.
    """

    name: str
    memory: MemorySource | None = None
    trigger: TriggerConfig | None = None
    kind: str | None = None
    rows: int = 1
    prefill: Callable[[list[list[int]]], DecodeState] | None = None

    @property
    def length(self) -> int:
        """Latents of a memory."""
        return self.memory.config.length if self.memory is not None and self.trigger is not None else 0


def new_arm(
    name: str,
    backbone: Backbone,
    protocol: Protocol,
    *,
    trained: MemorySource | None = None,
    settings: Mapping[str, Any] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> Arm:
    """Make the arm of a method.

    Args:
        name: The method.
        backbone: The model.
        protocol: When memories come.
        trained: A trained memory; taken where its shape is the method's.
        settings: Dotted settings laid over the method's, `eviction.budget` for example.
        thresholds: tau by kind of trigger, for the free protocol.

    Raises:
        UsageError: A method that needs cells of samples, or one that is none of ours.
    """
    from flashmem_bench.registry import get_method

    spec = get_method(name)
    asked = {**spec.defaults, **spec.fixed, **(settings or {})}
    if name in _NEEDS_A_CELL:
        raise UsageError(f"{name} takes its moments from a cell of samples: time flashmem instead")
    if name in EVICTING:
        return Arm(name, prefill=_evicting(name, backbone, asked))
    if name == "cot-sc":
        return Arm(name, rows=DRAWS, prefill=_drawing(backbone))
    if name in ("vanilla", "lora-sft"):
        return Arm(name)
    if spec.memory_of is None:
        raise UsageError(f"latency cannot time {name}: it knows no engine for it")
    memory = _source(name, backbone, asked, trained)
    own = _own_trigger(asked, thresholds or {})
    trigger = (
        own if protocol.name == "free" or own.max_injections == 0 or own.kind == "prompt-end" else protocol.clocked()
    )
    kind = "weaver-recompute" if memory.drops_cache else memory.config.source
    return Arm(name, memory, trigger, kind)


def _source(name: str, backbone: Backbone, asked: Mapping[str, Any], trained: MemorySource | None) -> MemorySource:
    from flashmem.memory import MemoryConfig, new_memory

    names = {entry.name for entry in fields(MemoryConfig)}
    given = {key.removeprefix("memory."): value for key, value in asked.items() if key.startswith("memory.")}
    config = MemoryConfig(**{key: value for key, value in given.items() if key in names})
    fits = trained is not None and _shape(trained.config) == _shape(config)
    memory = trained if fits and trained is not None else new_memory(config, backbone).eval()
    memory.drops_cache = name == "memgen"
    if config.source == "weaver":
        memory.cached = name != "memgen"
    return _placebo(name, memory, backbone)


def _shape(config: MemoryConfig) -> MemoryConfig:
    """What costs time; how a memory began does not."""
    return replace(config, init="inherited", stream_scale=None)


def _placebo(name: str, memory: MemorySource, backbone: Backbone) -> MemorySource:
    import torch

    from flashmem.placebo import MeanMemory, MemoryBank, NoopMemory, RandomMemory, ShuffledMemory

    if name.endswith("-noop-memory"):
        return NoopMemory(memory, backbone)
    made = {"random": RandomMemory, "shuffled": ShuffledMemory, "mean": MeanMemory}
    for word, kind in made.items():
        if name == f"flashmem-{word}-memory":
            bank, generator = MemoryBank(), torch.Generator().manual_seed(0)
            for number in range(_BANK):
                bank.add(torch.randn(memory.config.length, backbone.hidden_size, generator=generator), 0, str(number))
            return kind(memory, bank)
    return memory


def _own_trigger(asked: Mapping[str, Any], thresholds: Mapping[str, float]) -> TriggerConfig:
    from flashmem.trigger import TriggerConfig

    given = {key.removeprefix("trigger."): value for key, value in asked.items() if key.startswith("trigger.")}
    kind = given.get("kind", TriggerConfig().kind)
    # Where memories come on a clock no threshold is read, but the watching trigger wants one.
    return TriggerConfig(**{"threshold": thresholds.get(kind, 0.0), **given})


def _evicting(policy: str, backbone: Backbone, asked: Mapping[str, Any]) -> Callable[[list[list[int]]], DecodeState]:
    from flashmem.eviction import EvictionConfig, prefill_and_evict

    budget = int(asked.get("eviction.budget", 1024))
    config = EvictionConfig(policy, budget)  # type: ignore[arg-type]
    return lambda prompts: prefill_and_evict(backbone, prompts, config)


def _drawing(backbone: Backbone) -> Callable[[list[list[int]]], DecodeState]:
    def shared(prompts: list[list[int]]) -> DecodeState:
        state = backbone.prefill(prompts[:1])
        state.repeat(len(prompts))
        return state

    return shared
