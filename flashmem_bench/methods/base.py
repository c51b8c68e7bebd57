"""What a method is to the harness: a spec that can be listed, and an object that generates.

A `MethodSpec` is data that needs no torch: its name, its summary, the settings that define it, whose trained memory
it uses and what must exist before it can run. Its `build` gets a `BuildContext` with all of that found and returns a
`Method`. Every method, latent memory or not, answers with the library's `Generation` record and is timed by the same
clock, so that costs can be compared.

A spec never holds state; a method may, but must give the same answer for the same sample and seed in any order,
because a run that was interrupted continues in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from flashmem.backbone import Backbone
    from flashmem.generation import Generation
    from flashmem.placebo import MemoryBank
    from flashmem_bench.clock import HostClock
    from flashmem_bench.settings import Settings
    from flashmem_bench.tasks import Sample, Suite

ENTROPY_KINDS = ("attention-entropy", "output-entropy")
# Keys of `trigger.*` that each kind reads; a key that is not read cannot change an answer.
_TRIGGER_KEYS: dict[str, tuple[str, ...]] = {
    "attention-entropy": ("threshold", "percentile"),
    "output-entropy": ("threshold", "percentile"),
    "every": ("interval",),
    "random": ("rate",),
}

# Settings that one memory source alone reads.
_OF_ONE_SOURCE = (
    ("weaver", "memory.tail_cache"),
    ("weaver", "memory.trained_trigger"),
    ("constant", "memory.reparam"),
)


@dataclass(frozen=True)
class ReferenceSample:
    """What one sample of the reference cell did: where it fired and how many decision steps it had."""

    text_indices: tuple[int, ...]
    steps: int


@dataclass
class BuildContext:
    """Everything that a method may need, found before it is built.

    Attributes:
        backbone: The frozen model.
        suite: The suite in use.
        settings: Resolved settings of the cell.
        generation: Arguments of `transformers.GenerationConfig`.
        seed: Seed of sampling.
        memory: Folder of the trained memory; None where the method has none or runs untrained.
        thresholds: tau by stratum; the key None serves every other stratum. Empty without an entropy trigger.
        bank: Memories of other samples, for the placebos.
        reference: What the cell that this one is matched to did, by sample id.
        match: How random moments are matched: within or pooled.
    """

    backbone: Backbone
    suite: Suite
    settings: Settings
    generation: dict[str, Any]
    seed: int = 0
    memory: Path | str | None = None
    thresholds: Mapping[str | None, float] = field(default_factory=dict)
    bank: MemoryBank | None = None
    reference: Mapping[str, ReferenceSample] = field(default_factory=dict)
    match: str = "within"

    def threshold(self, stratum: str | None) -> float | None:
        """Return tau for a stratum; None when the trigger has no threshold."""
        trigger = self.settings.trigger
        if trigger.kind not in ENTROPY_KINDS:
            return None
        if trigger.threshold is not None:
            return trigger.threshold
        return self.thresholds.get(stratum, self.thresholds.get(None))


@dataclass(frozen=True)
class Entry:
    """A sample that enters a stream.

    Attributes:
        prompt: Token ids; they must fit the backbone's positions with the answer's budget.
        seed: What the sample's own draws come from.
    """

    prompt: list[int]
    sample: Sample
    seed: int


class Method(Protocol):
    """Answers prompts."""

    def generate(
        self, prompts: Sequence[list[int]], samples: Sequence[Sample], clock: HostClock | None, seed: int
    ) -> list[Generation]:
        """Answer a batch of prompts (token ids), one record each; `seed` is that of the batch's first sample."""
        ...

    def warm_up(self, prompt: list[int], sample: Sample) -> None:
        """Run once over every shape that a sample meets; nothing of it is recorded."""
        ...

    def batch_key(self, sample: Sample) -> object:
        """Samples with different keys cannot share a batch."""
        ...

    # A method with `reuses_prefix` takes `prefill=` besides, which stands for the backbone's own.
    #
    # A method may also have
    #
    #     stream(entries: Iterable[Entry], clock: HostClock | None, batch_size: int)
    #         -> Generator[tuple[int, Generation]]
    #
    # which answers up to `batch_size` samples at a time. It asks for the next entry when a seat is free, and yields
    # each sample, by its number in the order of asking, as soon as it is finished. It tells the clock when a number
    # begins and ends, and its answers are those that `generate` gives for each sample alone. A method without it gets
    # batches of neighbours that have one `batch_key`.


@dataclass(frozen=True)
class MethodSpec:
    """A method as the registry, the tables and the runner see it.

    Attributes:
        name: Public, stable name.
        summary: One line for `flashmem-bench list methods`.
        build: Makes the method; imports what it needs inside.
        fixed: Dotted settings that define the method; `--set` cannot change them.
        defaults: Dotted settings that the method has unless `--set` changes them.
        memory_of: Method whose trained memory it uses; None = no memory.
        uses: Groups of settings that can change its answers.
        needs_bank: It replaces memories by those of other samples.
        reference: Method whose cell must exist first, with the same settings and samples.
        match: Dotted settings that match it to that cell over all samples, from `--match`, the settings and what the
            cell did; empty where it is matched within each sample.
        judges: It can judge given answers; its `Method` then has `score` as `latent.LatentMethod` has it.
        together: It answers several samples at once where `--batch-size` asks for it; else one after the other.
    """

    name: str
    summary: str
    build: Callable[[BuildContext], Method]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    memory_of: str | None = None
    uses: tuple[str, ...] = ("sampling.temperature", "exec")
    needs_bank: bool = False
    reference: str | None = None
    match: Callable[[str, Settings, Mapping[str, ReferenceSample]], dict[str, Any]] | None = None
    judges: bool = True
    together: bool = True

    def make(self, context: BuildContext) -> Method:
        """Build the method, with its backbone run as the settings say.

        Raises:
            ConfigError: An execution mode that the device does not have.
        """
        # A new engine forgets what the old one has recorded.
        if context.backbone.execution != context.settings.exec:
            context.backbone.execution = context.settings.exec
        return self.build(context)

    def relevant(self, settings: Settings) -> dict[str, Any]:
        """Return the dotted settings that can change this method's answers."""
        flat = settings.flat()
        kept = {key: value for key, value in flat.items() if key in self.uses or key.split(".")[0] in self.uses}
        kept.pop("memory.checkpoint", None)
        # Elsewhere they cannot change an answer.
        for source, key in _OF_ONE_SOURCE:
            if settings.memory.source != source:
                kept.pop(key, None)
        reads = ("kind", "cooldown", "max_injections", *_TRIGGER_KEYS.get(settings.trigger.kind, ()))
        return {key: value for key, value in kept.items() if not key.startswith("trigger.") or key[8:] in reads}

    def threshold_kind(self, settings: Settings) -> str | None:
        """Return the kind of calibrated threshold that a cell needs; None when it needs none."""
        kind = settings.trigger.kind
        needed = "trigger" in self.uses and kind in ENTROPY_KINDS and settings.trigger.threshold is None
        return kind if needed else None
