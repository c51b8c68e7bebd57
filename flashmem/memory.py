"""Memory sources: who writes the latents, and what a checkpoint of one looks like.

A source is an `nn.Module` called with a `MemoryContext` that returns `[B, K, d]` input embeddings. The paper's source
is `flashmem.consolidator.SharedKVMemory`; its rival that re-encodes the history is in `flashmem.encoder`; the
cost-matched placebos are in `flashmem.placebo`. Here are the parts they share: the settings, the context that a source
sees, a learned constant (the weakest trained memory), and saving and loading.

A checkpoint is a folder: `model.safetensors` with the trained parameters only, and `config.json` with the settings,
the backbone's fingerprint, the hash of the weights and free metadata, sealed by a hash of its own. It
holds nothing of the backbone, so it can be pushed to a hub as it is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashmem.backbone import Backbone
from flashmem.errors import CheckpointError, ConfigError
from flashmem.integrity import file_hash, require_hash, require_seal, sealed
from flashmem.state import DecodeState

if TYPE_CHECKING:
    from flashmem.trigger_model import TriggerModel

FORMAT_VERSION = 1
_CHOICES = {
    "source": ("consolidator", "separate-encoder", "constant", "weaver", "lora"),
    "kv_layer": ("paired", "last"),
    "latent_attention": ("none", "earlier"),
    "feedback": ("raw", "normed", "embedding"),
    "output_map": ("linear", "gate", "identity"),
    "init": ("inherited", "random"),
    "reparam": ("none", "mlp"),
}


@dataclass(frozen=True)
class MemoryConfig:
    """The shape of a memory source. Defaults are the paper's where it says, ours where it does not.

    Attributes:
        source: "consolidator" (shared KV), "separate-encoder" (re-encodes the history), "weaver" (MemGen's),
            "constant" (learned) or "lora" (no memory: a change of the backbone).
        length: latents per memory, K.
        depth: consolidator blocks, L; None is one for every layer of the backbone.
        kv_layer: block i reads the cache of the layer that it was copied from ("paired"), or all read the last.
        latent_attention: "none" (Eq. 5: only the backbone's K,V) or "earlier" (latents also see earlier latents).
        feedback: what the next step starts from: the block's output, the same after the copied final norm, or the
            embedding that was written.
        output_map: to embedding space. "linear" (identity at the start), "identity" and "gate" (newline embedding plus
            a gated term that starts at zero) all end at the mean norm of the token embeddings.
        stream_scale: size of the stream that the blocks were copied from, in units of the states that they now get;
            None = measured on the backbone by `new_memory`, 1 = the states as they are.
        init: "inherited" copies the backbone's last layers; "random" is the ablation. Of a weaver the linear maps start
            as the identity, or at random as in the released code.
        encoder_layers: layers of the separate encoder; None is all.
        encoder_rank: rank of the LoRA of a separate encoder or a weaver, or of "lora", where None is as many
            parameters as a consolidator of these settings has; alpha is twice as much.
        reparam: a constant as it is ("none"), or behind a two-layer network with as many parameters as a consolidator
            ("mlp").
        trained_trigger: a weaver comes with MemGen's trained trigger, which may refuse a memory at a delimiter.
    """

    source: Literal["consolidator", "separate-encoder", "constant", "weaver", "lora"] = "consolidator"
    length: int = 8
    depth: int | None = 1
    kv_layer: Literal["paired", "last"] = "paired"
    latent_attention: Literal["none", "earlier"] = "none"
    feedback: Literal["raw", "normed", "embedding"] = "normed"
    output_map: Literal["linear", "gate", "identity"] = "linear"
    stream_scale: float | None = None
    init: Literal["inherited", "random"] = "inherited"
    encoder_layers: int | None = None
    encoder_rank: int | None = 8
    reparam: Literal["none", "mlp"] = "none"
    trained_trigger: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"memory.length is {self.length}; it must be 1 or more.")
        if self.depth is not None and self.depth < 1:
            raise ConfigError(f"memory.depth is {self.depth}; it must be 1 or more.")
        if (self.encoder_rank is None and self.source != "lora") or (
            self.encoder_rank is not None and self.encoder_rank < 1
        ):
            raise ConfigError(f"memory.encoder_rank is {self.encoder_rank}; it must be 1 or more.")
        if self.stream_scale is not None and self.stream_scale <= 0:
            raise ConfigError(f"memory.stream_scale is {self.stream_scale}; it must be above 0, or None.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"memory.{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}.")


@dataclass(frozen=True)
class SampleContext:
    """What a placebo must know about a sample to take another sample's memory."""

    sample_id: str
    answer: str = ""


@dataclass
class MemoryContext:
    """What a memory source sees at a trigger.

    Attributes:
        backbone: the frozen model.
        state: the batch under way; sources read, never write.
        injections: how many memories each row has taken before this one.
        samples: who the rows are, or None.
        emitted: text tokens of each row so far; None where memories are written in a row from the prompt end on.
    """

    backbone: Backbone
    state: DecodeState
    injections: list[int]
    samples: list[SampleContext] | None = None
    emitted: list[int] | None = None

    @property
    def inside(self) -> list[bool]:
        """Whether each row is inside its answer rather than at the prompt end."""
        return [n > 0 for n in (self.injections if self.emitted is None else self.emitted)]


class MemorySource(nn.Module):
    """Base of everything that turns a context into `[B, K, d]` input embeddings.

    Attributes:
        config: the settings.
        metadata: what came with the checkpoint; empty for a new source.
        needs_history: the source re-encodes the input embeddings of the whole history.
        drops_cache: the backbone's cache is dropped at each memory and the whole sequence encoded again.
        tail_cache: after the last memory that the cap allows, tokens are decoded with a cache.
        trigger_model: asked at each delimiter that may take a memory; None takes one there.
    """

    needs_history = False
    drops_cache = False
    tail_cache = True
    trigger_model: TriggerModel | None

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.trigger_model = None
        self.config = config
        self.metadata: dict[str, Any] = {}
        self.backbone_id: dict[str, Any] = {}

    def forward(self, context: MemoryContext) -> Tensor:
        """Write a memory.

        Returns:
            `[B, K, d]` input embeddings for the backbone.
        """
        raise NotImplementedError

    def trained(self) -> dict[str, Tensor]:
        """The parameters that training changes: what a checkpoint holds."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def save_pretrained(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write `model.safetensors` and `config.json` into a folder.

        Args:
            path: the folder, made if it is missing.
            metadata: JSON values kept under "metadata": training data, seed, scores.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "model.safetensors"
        # Of a checkpoint that is there already nothing is touched before the new one is complete.
        whole = weights.with_name(weights.name + ".partial")
        save_file({n: p.detach().cpu().contiguous() for n, p in self.trained().items()}, whole)
        record = {
            "format_version": FORMAT_VERSION,
            "memory": asdict(self.config),
            "backbone": self.backbone_id,
            "weights_sha256": _sha256(whole),
            "metadata": {**self.metadata, **(metadata or {})},
        }
        partial = folder / "config.json.partial"
        partial.write_text(json.dumps(sealed(record), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        whole.replace(weights)
        partial.replace(folder / "config.json")


class ConstantMemory(MemorySource):
    """K trained embeddings, the same for every context: what a memory is worth without any content.

    At the prompt end this is prompt tuning (Lester et al., 2021) in FlashMem's slots. With `reparam="mlp"` they are the
    outputs of a residual network over K trained vectors, wide enough for as many parameters as a consolidator has.
    """

    def __init__(self, config: MemoryConfig, backbone: Backbone) -> None:
        super().__init__(config)
        noise, width = torch.randn(config.length, backbone.hidden_size), backbone.hidden_size
        scale = backbone.embedding_norm()
        self.latents = nn.Parameter((noise / noise.norm(dim=-1, keepdim=True) * scale).to(backbone.device))
        self.network: nn.Sequential | None = None
        if config.reparam == "mlp":
            from flashmem.lora import consolidator_parameters

            inner = max(1, round(consolidator_parameters(config, backbone) / (2 * width)))
            self.network = nn.Sequential(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, width))
            nn.init.zeros_(self.network[-1].weight)
            self.network.to(backbone.device)

    def forward(self, context: MemoryContext) -> Tensor:
        """See `MemorySource.forward`."""
        latents = self.latents if self.network is None else self.latents + self.network(self.latents)
        return latents.to(context.backbone.dtype).expand(context.state.batch_size, -1, -1)


def new_memory(config: MemoryConfig, backbone: Backbone) -> MemorySource:
    """An untrained memory source for a backbone.

    Raises:
        ConfigError: the settings do not fit the backbone, such as more blocks than layers.
    """
    from flashmem.consolidator import SharedKVMemory
    from flashmem.encoder import SeparateEncoderMemory
    from flashmem.lora import LoRA
    from flashmem.weaver import WeaverMemory

    kinds = {
        "consolidator": SharedKVMemory,
        "separate-encoder": SeparateEncoderMemory,
        "constant": ConstantMemory,
        "weaver": WeaverMemory,
        "lora": LoRA,
    }
    config = replace(config, depth=config.depth or backbone.num_layers)
    if config.depth > backbone.num_layers:
        raise ConfigError(f"memory.depth is {config.depth} and {backbone.name} has only {backbone.num_layers} layers.")
    if config.stream_scale is None:
        # Kept with the checkpoint, so that another dtype or device cannot round it to another power of two.
        config = replace(config, stream_scale=backbone.stream_scale())
    memory = kinds[config.source](config, backbone)
    memory.backbone_id = {
        "name": backbone.name,
        "fingerprint": backbone.fingerprint,
        "hidden_size": backbone.hidden_size,
        "num_layers": backbone.num_layers,
    }
    return memory


def load_memory(path: str | Path, backbone: Backbone) -> MemorySource:
    """Load a trained memory source from a folder or a hub id.

    Args:
        path: folder written by `save_pretrained`, or a hub id.
        backbone: the model that it was trained for.

    Raises:
        CheckpointError: nothing there, damaged, or trained for another backbone.
    """
    folder = _local(path)
    record = _read_record(folder)
    weights = folder / "model.safetensors"
    require_hash(weights, str(record["weights_sha256"]), _sha256(weights), "copy or train it again")
    theirs = record["backbone"]
    if theirs.get("fingerprint") != backbone.fingerprint:
        raise CheckpointError(
            f"The checkpoint {folder} was trained for {theirs.get('name')} ({theirs.get('fingerprint')}), not for "
            f"{backbone.name} ({backbone.fingerprint}): train one with flashmem-bench train, or load that model."
        )
    known = {f.name for f in fields(MemoryConfig)}
    # Checkpoints from before the scale was there were trained without it.
    written = {"stream_scale": 1.0} | {k: v for k, v in record["memory"].items() if k in known}
    memory = new_memory(MemoryConfig(**written), backbone)
    _load_weights(memory, weights)
    memory.metadata = record["metadata"]
    return memory.eval()


def _local(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if str(path).count("/") == 1 and not str(path).startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(path)))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(f"No folder {str(path)!r}, and the hub has no such id: check both.") from error
    raise CheckpointError(f"No checkpoint folder at {str(path)!r}: give a folder written by train, or a hub id.")


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        version = record["format_version"]
        record["memory"], record["backbone"], record["weights_sha256"], record["metadata"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a memory checkpoint: config.json is missing or damaged.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has checkpoint format {version}; this version reads {FORMAT_VERSION}.")
    require_seal(record, folder / "config.json", "copy or train it again")
    return record


def _load_weights(memory: MemorySource, weights: Path) -> None:
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights} cannot be read: copy or train it again.") from error
    mine = memory.trained()
    wrong = sorted(set(tensors) ^ set(mine)) or [n for n in mine if mine[n].shape != tensors[n].shape]
    if wrong:
        raise CheckpointError(f"{weights} does not fit its config.json (first: {wrong[0]}): train it again.")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(tensors[name])


def _sha256(path: Path) -> str:
    try:
        return file_hash(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: the checkpoint is incomplete.") from error
