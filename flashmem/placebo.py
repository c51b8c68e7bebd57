"""Cost-matched placebos: the real source runs, and only what it wrote is replaced.

If FlashMem's gain survives a placebo, it was not the content of the memory. Four replacements, each as long, as large
and as often as the real one:

* `RandomMemory`: Gaussian with the mean and covariance of real memories, norm-matched;
* `ShuffledMemory`: the memory of another sample with another answer, at the same injection index;
* `MeanMemory`: the mean of the bank;
* `NoopMemory`: the embedding of a token that the backbone knows (a newline).

The first three draw from a `MemoryBank`, real memories collected on other samples.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashmem.backbone import Backbone
from flashmem.errors import CheckpointError, ConfigError
from flashmem.integrity import require_hash, tensors_hash
from flashmem.memory import MemoryContext, MemorySource


class MemoryBank:
    """Real memories of known samples: `[K, d]` each, with its injection index and its sample's answer."""

    def __init__(self) -> None:
        self.memories: list[Tensor] = []
        self.indices: list[int] = []
        self.answers: list[str] = []

    def __len__(self) -> int:
        return len(self.memories)

    def add(self, memory: Tensor, injection_index: int, answer: str) -> None:
        """Keep one memory `[K, d]`."""
        self.memories.append(memory.detach().float().cpu().clone())
        self.indices.append(injection_index)
        self.answers.append(answer)

    def stack(self) -> Tensor:
        """`[n, K, d]` float32.

        Raises:
            ConfigError: the bank is empty.
        """
        if not self.memories:
            raise ConfigError("The memory bank is empty: the method never triggered while it was filled.")
        return torch.stack(self.memories)

    def others(self, injection_index: int, answer: str) -> list[int]:
        """Members with another answer at this injection index, or at the nearest index that has any."""
        fit = [i for i, known in enumerate(self.answers) if known != answer]
        if not fit:
            raise ConfigError("The memory bank holds no memory of a sample with another answer.")
        distance = min(abs(self.indices[i] - injection_index) for i in fit)
        return [i for i in fit if abs(self.indices[i] - injection_index) == distance]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, replacing an older one at once."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"memories": self.stack()}
        labels = {"indices": json.dumps(self.indices), "answers": json.dumps(self.answers)}
        # Several processes, also of several machines, may make the same one at the same time.
        partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
        save_file(tensors, partial, metadata={**labels, "sha256": tensors_hash(tensors, labels)})
        partial.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> MemoryBank:
        """Read a file that `save` wrote."""
        bank = cls()
        try:
            with safe_open(path, framework="pt") as file:
                labels = file.metadata()
                tensors = {"memories": file.get_tensor("memories")}
            wanted = labels.pop("sha256", None)
            bank.memories = list(tensors["memories"])
            bank.indices, bank.answers = json.loads(labels["indices"]), json.loads(labels["answers"])
        except Exception as error:
            raise CheckpointError(f"The memory bank {path} cannot be read: delete it, it is made again.") from error
        if wanted is not None:
            require_hash(Path(path), wanted, tensors_hash(tensors, labels), "delete it, it is made again")
        return bank


class Placebo(MemorySource):
    """Runs the real source, then replaces its output; subclasses say by what."""

    def __init__(self, source: MemorySource) -> None:
        super().__init__(source.config)
        self.source = source
        self.needs_history = source.needs_history
        self.metadata, self.backbone_id = source.metadata, source.backbone_id

    def forward(self, context: MemoryContext) -> Tensor:
        """See `MemorySource.forward`."""
        real = self.source(context)
        rows = [self.replace(context, row) for row in range(real.shape[0])]
        return torch.stack(rows).to(real)

    def replace(self, context: MemoryContext, row: int) -> Tensor:
        """The `[K, d]` that stands in for a row's memory."""
        raise NotImplementedError


class RandomMemory(Placebo):
    """Gaussian latents with the bank's mean and covariance, each of the bank's mean norm."""

    def __init__(self, source: MemorySource, bank: MemoryBank, seed: int = 0) -> None:
        super().__init__(source)
        flat = bank.stack().flatten(0, 1)
        self.mean, self.norm = flat.mean(0), flat.norm(dim=-1).mean()
        covariance = torch.cov(flat.T) + 1e-6 * torch.eye(flat.shape[1])
        values, vectors = torch.linalg.eigh(covariance)
        self.root = vectors * values.clamp_min(0).sqrt()
        self.seed = seed

    def replace(self, context: MemoryContext, row: int) -> Tensor:
        """See `Placebo.replace`; the same sample and injection always draw the same latents."""
        generator = torch.Generator().manual_seed(_draw(self.seed, context, row))
        noise = torch.randn(self.config.length, self.mean.shape[0], generator=generator)
        return torch.nn.functional.normalize(self.mean + noise @ self.root.T, dim=-1) * self.norm


class ShuffledMemory(Placebo):
    """Another sample's memory."""

    def __init__(self, source: MemorySource, bank: MemoryBank, seed: int = 0) -> None:
        super().__init__(source)
        self.bank, self.stacked, self.seed = bank, bank.stack(), seed

    def replace(self, context: MemoryContext, row: int) -> Tensor:
        """See `Placebo.replace`."""
        answer = context.samples[row].answer if context.samples else ""
        fit = self.bank.others(context.injections[row], answer)
        return self.stacked[fit[_draw(self.seed, context, row) % len(fit)]]


class MeanMemory(Placebo):
    """The mean memory of the bank, the same every time."""

    def __init__(self, source: MemorySource, bank: MemoryBank) -> None:
        super().__init__(source)
        self.mean = bank.stack().mean(0)

    def replace(self, context: MemoryContext, row: int) -> Tensor:
        """See `Placebo.replace`."""
        return self.mean


class NoopMemory(Placebo):
    """K times the embedding of a token that the backbone knows."""

    def __init__(self, source: MemorySource, backbone: Backbone, text: str = "\n") -> None:
        super().__init__(source)
        token = torch.tensor([backbone.encode(text)[-1:]], device=backbone.device)
        with torch.no_grad():
            self.token = backbone.embed(token)[0, 0].clone()

    def replace(self, context: MemoryContext, row: int) -> Tensor:
        """See `Placebo.replace`."""
        return self.token.expand(self.config.length, -1)


def _draw(seed: int, context: MemoryContext, row: int) -> int:
    """A number that depends on seed, sample and injection only, not on the order in which samples run."""
    name = context.samples[row].sample_id if context.samples else str(row)
    digest = hashlib.sha256(f"{seed}|{name}|{context.injections[row]}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
