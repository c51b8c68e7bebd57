"""Where the calibrated threshold (tau) of a trigger is, and how it is measured.

The search order: the user's own for this suite, the bundled one for this suite, then the user's and the bundled joint
one. `tau_source` says what was found: `suite`, or `model` for one that was not measured on this suite. A file belongs
to one backbone (by fingerprint), one kind of entropy and one monitor setting; a monitor that is not the default has
its hash in the file name, so that an ablation cannot take another monitor's threshold.

A suite that controls length calibrates per stratum, because raw entropy grows with the context: its file holds one
threshold a stratum besides the pooled one, which serves strata that were not calibrated.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem.errors import CheckpointError
from flashmem.integrity import require_seal, sealed
from flashmem_bench.checkpoints import JOINT, command_options
from flashmem_bench.durable import make_folder, replace, write_failure
from flashmem_bench.errors import MissingCheckpointError
from flashmem_bench.methods.base import ENTROPY_KINDS
from flashmem_bench.models import BUNDLED, model_key
from flashmem_bench.places import folder_name
from flashmem_bench.settings import MonitorSettings

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem.calibration import Threshold
    from flashmem_bench.settings import Settings
    from flashmem_bench.tasks import Sample, Suite

FORMAT_VERSION = 1
POOLED = ""


@dataclass(frozen=True)
class Thresholds:
    """Calibrated thresholds of one suite and one kind.

    Attributes:
        kind: attention-entropy or output-entropy.
        suite: What it was calibrated on; `joint` for several.
        fingerprint: The backbone's.
        by_stratum: Thresholds; the key "" is the pooled one.
        provenance: Samples, seed, generation arguments, monitor settings, command.
    """

    kind: str
    suite: str
    fingerprint: str
    by_stratum: Mapping[str, Threshold]
    provenance: Mapping[str, Any]

    def at(self, percentile: float) -> dict[str | None, float]:
        """Return tau by stratum at a percentile; the key None holds the pooled one."""
        values: dict[str | None, float] = {}
        for stratum, threshold in self.by_stratum.items():
            exact = percentile == threshold.percentile
            values[stratum or None] = threshold.value if exact else threshold.at(percentile)
        return values

    def save(self, path: Path) -> None:
        """Write one JSON document, replacing the file at once.

        Raises:
            StoreError: The write failed.
        """
        document = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "suite": self.suite,
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
            "thresholds": {key: json.loads(value.to_json()) for key, value in self.by_stratum.items()},
        }
        content = json.dumps(sealed(document), indent=2, sort_keys=True).encode() + b"\n"
        try:
            make_folder(path.parent)
            replace(path, content)
        except OSError as error:
            raise write_failure(path, error) from error

    @classmethod
    def load(cls, path: Path) -> Thresholds:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The file is damaged or of another format.
        """
        from flashmem.calibration import Threshold

        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            require_seal(document, path, "copy it again, or calibrate again")
            if document["format_version"] != FORMAT_VERSION:
                raise ValueError("format_version")
            found = {key: Threshold.from_json(json.dumps(value)) for key, value in document["thresholds"].items()}
            return cls(document["kind"], document["suite"], document["fingerprint"], found, document["provenance"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the threshold file {path} cannot be read; calibrate again") from error


@dataclass(frozen=True)
class FoundThresholds:
    """Thresholds that the search found: the values, and how near to the suite they are."""

    thresholds: Thresholds
    tau_source: str
    path: Path


def file_name(kind: str, monitor: MonitorSettings) -> str:
    """Return the file name of a kind under a monitor setting."""
    if monitor == MonitorSettings():
        return f"{kind}.json"
    digest = hashlib.sha256(json.dumps(monitor.model_dump(), sort_keys=True).encode()).hexdigest()[:8]
    return f"{kind}-{digest}.json"


def threshold_folder(results: Path, model: str, suite: str) -> Path:
    """Return where `calibrate` writes by default."""
    return results / "thresholds" / folder_name(model_key(model)) / folder_name(suite)


def find_thresholds(
    results: Path, model: str, suite: str, kind: str, settings: Settings, fingerprint: str
) -> FoundThresholds:
    """Find the thresholds of a kind for a suite.

    Raises:
        CheckpointError: The file that comes first in the search order belongs to another backbone.
        MissingCheckpointError: Nothing was found; the message has the command that makes one.
    """
    path = threshold_path(results, model, suite, kind, settings)
    found = Thresholds.load(path)
    if found.fingerprint != fingerprint:
        raise CheckpointError(
            f"the threshold {path} was calibrated for another backbone ({found.fingerprint}, this one is "
            f"{fingerprint}); calibrate again with {calibrate_command(results, model, suite, settings)}"
        )
    return FoundThresholds(found, "suite" if found.suite == suite else "model", path)


def threshold_path(results: Path, model: str, suite: str, kind: str, settings: Settings) -> Path:
    """Return the file that comes first in the search order, without reading it.

    Raises:
        MissingCheckpointError: There is none; the message has the command that makes one.
    """
    for folder in _folders(results, model, suite):
        path = folder / file_name(kind, settings.monitor)
        if path.exists():
            return path
    raise MissingCheckpointError(
        f"no calibrated {kind} threshold for suite {suite} on {model} under these monitor settings; make one "
        f"with {calibrate_command(results, model, suite, settings)}, or set trigger.threshold"
    )


def calibrate_command(results: Path, model: str, suite: str, settings: Settings) -> str:
    """Return the command that calibrates under the monitor settings in use."""
    default = MonitorSettings().model_dump()
    changed = [f" --set monitor.{k}={v}" for k, v in settings.monitor.model_dump().items() if v != default[k]]
    return f"`flashmem-bench calibrate --suite {suite}{command_options(results, model)}{''.join(changed)}`"


def _folders(results: Path, model: str, suite: str) -> Iterator[Path]:
    bundled = [bundled_folder()] if model == BUNDLED else []
    yield threshold_folder(results, model, suite)
    yield from (folder / folder_name(suite) for folder in bundled)
    yield threshold_folder(results, model, JOINT)
    yield from (folder / JOINT for folder in bundled)


def bundled_folder() -> Path:
    """Return the folder of the thresholds that come with the bundled backbone."""
    from flashmem_bench.tiny import weights_dir

    return Path(weights_dir()).parent / "thresholds"


def calibrate_suite(
    backbone: Backbone,
    suite: Suite,
    *,
    settings: Settings,
    generation: Mapping[str, Any],
    limit: int | None,
    percentile: float,
    seed: int,
    on_sample: Callable[[int, int], None] | None = None,
) -> dict[str, Thresholds]:
    """Measure both kinds of entropy on greedy plain runs over the calibration split.

    Args:
        backbone: The frozen model; its monitor is set from the settings.
        suite: The suite.
        settings: Whose `monitor.*` are used.
        generation: Arguments of `GenerationConfig`.
        limit: At most so many samples, spread evenly over the split; None takes all.
        percentile: The percentile that is stored as the value.
        seed: Of the bootstrap.
        on_sample: Called with finished and total samples.

    Returns:
        Kind -> thresholds.
    """
    from transformers import GenerationConfig

    from flashmem.calibration import entropy_series
    from flashmem.monitor import MonitorConfig

    backbone.monitor = MonitorConfig(**settings.monitor.model_dump())
    samples = spread(suite.samples("calibration"), limit)
    series = entropy_series(
        backbone,
        [backbone.encode_chat(sample.prompt) for sample in samples],
        generation_config=GenerationConfig(**generation),
        on_sample=(lambda done: on_sample(done, len(samples))) if on_sample else None,
    )
    groups = _groups(suite, samples)
    provenance = {
        "suite_hash": suite.content_hash,
        "samples": len(samples),
        "seed": seed,
        "generation": dict(generation),
        "monitor": settings.monitor.model_dump(),
        "backbone": backbone.name,
        "device": backbone.device.type,
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }
    return {
        kind: Thresholds(
            kind=kind,
            suite=suite.name,
            fingerprint=backbone.fingerprint,
            by_stratum=_fit(backbone, series, groups, kind, percentile, seed),
            provenance=provenance,
        )
        for kind in ENTROPY_KINDS
    }


def _groups(suite: Suite, samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Indices of the samples that share a threshold: all of them, and each stratum where the suite asks for it."""
    groups: dict[str, list[int]] = {}
    if suite.calibrate_by == "stratum":
        for index, sample in enumerate(samples):
            groups.setdefault(sample.stratum or POOLED, []).append(index)
    groups[POOLED] = list(range(len(samples)))
    return groups


def joint_thresholds(backbone: Backbone, parts: Sequence[Thresholds]) -> Thresholds:
    """Return one threshold for suites that were not calibrated: the mean over suites, each with equal weight."""
    from flashmem.calibration import Threshold

    pooled = [part.by_stratum[POOLED] for part in parts]
    first = pooled[0]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    joint = Threshold(
        kind=first.kind,
        percentile=first.percentile,
        value=mean([entry.value for entry in pooled]),
        low=mean([entry.low for entry in pooled]),
        high=mean([entry.high for entry in pooled]),
        n_samples=sum(entry.n_samples for entry in pooled),
        n_steps=sum(entry.n_steps for entry in pooled),
        quantiles=[mean(column) for column in zip(*(entry.quantiles for entry in pooled), strict=True)],
        provenance={"suites": [part.suite for part in parts]},
    )
    return Thresholds(parts[0].kind, JOINT, backbone.fingerprint, {POOLED: joint}, {"suites": [p.suite for p in parts]})


def _fit(
    backbone: Backbone,
    series: Sequence[Mapping[str, list[float]]],
    groups: Mapping[str, list[int]],
    kind: str,
    percentile: float,
    seed: int,
) -> dict[str, Threshold]:
    from flashmem.calibration import fit_threshold

    fitted = {}
    for stratum, indices in groups.items():
        values = [series[index][kind] for index in indices]
        fitted[stratum] = fit_threshold(backbone, values, kind=kind, percentile=percentile, seed=seed)
    return fitted


def spread(samples: Sequence[Any], limit: int | None) -> list[Any]:
    """Return `limit` samples in their order, one from each of as many equal stretches, or all of them.

    Which one of a stretch is drawn, the same one every time: suites let their strata take turns, and evenly spaced
    samples would meet only some of them.
    """
    count = len(samples)
    if limit is None or limit >= count:
        return [samples[index] for index in range(count)]
    chance = random.Random(f"{limit} of {count}")
    edges = [place * count // limit for place in range(limit + 1)]
    return [samples[chance.randrange(low, high)] for low, high in pairwise(edges)]
