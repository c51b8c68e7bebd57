"""Finding tau: a percentile of the entropies that the plain backbone shows on held-out prompts.

The paper takes the 85th percentile over a validation set (Eq. 9) without saying over what it is pooled. We pool the
prompt-end row and all decode steps of greedy plain runs and skip none: short answers have only two or three steps. The
interval comes from a bootstrap over *samples*, because the steps of one sample are not independent.

A threshold belongs to one backbone, one suite (or a length within it) and one monitor setting; all of that is kept with
the number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from flashmem.backbone import Backbone
from flashmem.errors import CheckpointError, ConfigError
from flashmem.generation import generate


@dataclass
class Threshold:
    """A calibrated tau with its provenance.

    Attributes:
        kind: "attention-entropy" or "output-entropy".
        percentile: the percentile that `value` is.
        value: tau, nats.
        low: lower end of its 95 % bootstrap interval, nats.
        high: upper end.
        n_samples: prompts that it was measured on.
        n_steps: decision steps pooled.
        quantiles: the 0th to 100th percentile of the pooled entropies, 101 values, nats.
        provenance: backbone, suite, monitor setting, whatever the caller adds.
    """

    kind: str
    percentile: float
    value: float
    low: float
    high: float
    n_samples: int
    n_steps: int
    quantiles: list[float]
    provenance: dict[str, Any] = field(default_factory=dict)

    def at(self, percentile: float) -> float:
        """Tau at another percentile of the same entropies, nats.

        Raises:
            ConfigError: outside 0 to 100.
        """
        if not 0 <= percentile <= 100:
            raise ConfigError(f"The percentile is {percentile}; it must be from 0 to 100.")
        low = int(percentile)
        high = min(low + 1, 100)
        return self.quantiles[low] + (percentile - low) * (self.quantiles[high] - self.quantiles[low])

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Threshold:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: damaged, or not a threshold.
        """
        try:
            threshold = cls(**json.loads(text))
            if len(threshold.quantiles) != 101:
                raise ValueError("101 quantiles expected")
        except (ValueError, TypeError) as error:
            raise CheckpointError("A stored threshold cannot be read: calibrate again.") from error
        return threshold

    def save(self, path: str | Path) -> None:
        """Write the JSON document, replacing the file at once."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(target)


def calibrate(
    backbone: Backbone,
    prompts: Sequence[list[int]],
    *,
    generation_config: GenerationConfig,
    kind: str = "attention-entropy",
    percentile: float = 85.0,
    seed: int = 0,
    on_sample: Callable[[int], None] | None = None,
) -> Threshold:
    """Measure a threshold on greedy plain runs.

    Args:
        backbone: the model; its `monitor` setting is what is calibrated.
        prompts: token ids of held-out prompts.
        generation_config: as in the runs that the threshold is for.
        kind: which entropy.
        percentile: of the pooled entropies.
        seed: of the bootstrap.
        on_sample: called with the number of finished prompts.

    Raises:
        ConfigError: no prompts.
    """
    series = entropy_series(backbone, prompts, generation_config=generation_config, on_sample=on_sample)
    return fit_threshold(backbone, [s[kind] for s in series], kind=kind, percentile=percentile, seed=seed)


def entropy_series(
    backbone: Backbone,
    prompts: Sequence[list[int]],
    *,
    generation_config: GenerationConfig,
    on_sample: Callable[[int], None] | None = None,
) -> list[dict[str, list[float]]]:
    """Both entropies at every decision step of greedy plain runs, one dictionary a prompt."""
    greedy = GenerationConfig(**{**generation_config.to_diff_dict(), "do_sample": False})
    series = []
    for index, prompt in enumerate(prompts):
        (run,) = generate(backbone, [prompt], generation_config=greedy, trace=True)
        series.append({"attention-entropy": run.entropies, "output-entropy": run.output_entropies})
        if on_sample is not None:
            on_sample(index + 1)
    return series


def fit_threshold(
    backbone: Backbone,
    series: Sequence[list[float]],
    *,
    kind: str,
    percentile: float = 85.0,
    seed: int = 0,
    replicates: int = 1000,
) -> Threshold:
    """A percentile of pooled entropies with a bootstrap interval over samples.

    Args:
        backbone: for the provenance.
        series: entropies in nats, one list a sample.
        kind: which entropy they are.
        percentile: 0 to 100.
        seed: of the bootstrap.
        replicates: bootstrap resamples.
    """
    if not series:
        raise ConfigError("Nothing to calibrate on: the calibration split is empty.")
    values = [torch.tensor(s, dtype=torch.float64) for s in series]
    pooled = torch.cat(values)
    generator = torch.Generator().manual_seed(seed)
    draws = [
        torch.quantile(
            torch.cat([values[i] for i in torch.randint(len(values), (len(values),), generator=generator)]),
            percentile / 100,
        )
        for _ in range(replicates)
    ]
    low, high = torch.quantile(torch.stack(draws), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    monitor = asdict(backbone.monitor) | {"layer": backbone.monitor_layer}
    return Threshold(
        kind=kind,
        percentile=percentile,
        value=float(torch.quantile(pooled, percentile / 100)),
        low=low,
        high=high,
        n_samples=len(values),
        n_steps=pooled.numel(),
        quantiles=torch.quantile(pooled, torch.linspace(0, 1, 101, dtype=torch.float64)).tolist(),
        provenance={"backbone": backbone.name, "fingerprint": backbone.fingerprint, "monitor": monitor},
    )
