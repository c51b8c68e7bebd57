"""Where the trained memory of a method is, and whether it may be used unasked.

The search order: the one that the user names; the user's own for this suite; the user's own joint one if it was
trained on this suite; the bundled one for this suite; the bundled joint one. `scope` says what was found: trained on
this suite alone, on several of which this is one, or on others.

A checkpoint that breaks more than 2 % of the validation samples that the plain backbone solved is never used by
default: it is skipped with a sentence, and only naming it with `--checkpoint` overrides that. The one exception is
a checkpoint that was marked provisional when it was made, so that commands run before a good memory exists: it is
used, with a sentence that says what it breaks. This module reads the
JSON part of a checkpoint and never its weights, so it needs no torch; whether it fits the backbone is checked when it
is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from flashmem.errors import CheckpointError
from flashmem.integrity import require_seal
from flashmem_bench.errors import MissingCheckpointError, UsageError
from flashmem_bench.models import BUNDLED, model_key
from flashmem_bench.places import folder_name
from flashmem_bench.suites import list_suites

UNTRAINED = "untrained"
JOINT = "joint"
HARM_LIMIT = 0.02
# The methods that have a memory to train, and what it may be made of.
SOURCES = {
    "flashmem": ("consolidator", "constant"),
    "flashmem-separate-encoder": ("separate-encoder",),
    "flashmem-plus": ("consolidator",),
    "memgen": ("weaver",),
    "lora-sft": ("lora",),
    "prompt-tuning": ("constant",),
}


@dataclass(frozen=True)
class Checkpoint:
    """A memory checkpoint that was found.

    Attributes:
        path: Its folder.
        scope: suite, joint or transfer.
        record: Its `config.json`.
        notes: Sentences on checkpoints that were passed over on the way.
    """

    path: Path
    scope: str
    record: dict[str, Any]
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def metadata(self) -> dict[str, Any]:
        """What training wrote about itself."""
        return self.record.get("metadata") or {}

    @property
    def train_seed(self) -> int | None:
        """Seed of the training, if it was recorded."""
        seed = self.metadata.get("train_seed")
        return int(seed) if seed is not None else None

    @property
    def weights_sha(self) -> str:
        """Hash of the weights: what identifies the checkpoint in a cell."""
        return str(self.record.get("weights_sha256", ""))

    def settings(self) -> dict[str, Any]:
        """Return the `memory.*` settings that this checkpoint fixes, as dotted keys."""
        from flashmem_bench.settings import FIELDS

        known = {f"memory.{key}": value for key, value in self.record.get("memory", {}).items()}
        return {key: value for key, value in known.items() if key in FIELDS}


def harm_of(metadata: dict[str, Any], suite: str) -> float | None:
    """Return the share of validation samples that it breaks, on this suite if that was measured."""
    by_suite = metadata.get("harm_by_suite") or {}
    harm = by_suite.get(suite, metadata.get("harm"))
    return float(harm) if harm is not None else None


def checkpoint_root(results: Path, model: str) -> Path:
    """Return the folder of all memories of a backbone."""
    return results / "checkpoints" / folder_name(model_key(model))


def memory_folder(results: Path, model: str, suite: str, method: str) -> Path:
    """Return the folder of the memories of one method for one suite, one folder a seed."""
    return checkpoint_root(results, model) / folder_name(suite) / folder_name(method)


def checkpoint_folder(results: Path, model: str, suite: str, method: str, seed: int) -> Path:
    """Return where `train` writes by default."""
    return memory_folder(results, model, suite, method) / f"seed{seed}"


def find_checkpoint(results: Path, model: str, suite: str, method: str, named: str | None = None) -> Checkpoint:
    """Find the trained memory of `method` for a suite.

    Args:
        results: The results folder.
        model: The backbone as `--model` names it.
        suite: Name of the suite.
        method: Whose memory is wanted: a method that `train` fits.
        named: What `--checkpoint` or `memory.checkpoint` says; searched only when None.

    Raises:
        CheckpointError: The named checkpoint does not exist or is damaged.
        MissingCheckpointError: Nothing usable was found; the message has the commands that make one.
    """
    if named is not None:
        record = read_record(fetch(named))
        _check_source(record, method, named)
        _check_clean(record, suite, named)
        return Checkpoint(fetch(named), _scope(record, suite), record)
    notes: list[str] = []
    for folder in _candidates(results, model, suite, method):
        record = read_record(folder)
        _check_clean(record, suite, str(folder))
        metadata = record.get("metadata") or {}
        harm = harm_of(metadata, suite)
        if harm is not None and harm > HARM_LIMIT:
            broken = f"it breaks {harm:.1%} of the validation samples, more than {HARM_LIMIT:.0%}"
            if not metadata.get("provisional"):
                notes.append(
                    f"skipped the checkpoint {folder}: {broken}; use it all the same with --checkpoint {folder}"
                )
                continue
            notes.append(f"the {method} memory is provisional: on {suite} {broken}")
        return Checkpoint(folder, _scope(record, suite), record, tuple(notes))
    raise MissingCheckpointError("; ".join([*notes, _missing(results, model, suite, method)]))


def _missing(results: Path, model: str, suite: str, method: str) -> str:
    options = command_options(results, model)
    return (
        f"no trained {method} memory for suite {suite} on {model}; make one with "
        f"`flashmem-bench train --method {method} --suite {suite}{options}` and then "
        f"`flashmem-bench calibrate --suite {suite}{options}`, or name one with --checkpoint"
    )


def command_options(results: Path, model: str) -> str:
    """Return the options that a suggested command needs beyond the defaults."""
    chosen = f" --model {model}" if model != BUNDLED else ""
    return chosen + (f" --results-dir {results}" if results != Path("results") else "")


def _candidates(results: Path, model: str, suite: str, method: str) -> Iterator[Path]:
    own, plain, method = checkpoint_root(results, model), folder_name(suite), folder_name(method)
    yield from _seeds(own / plain / method)
    for folder in _seeds(own / JOINT / method):
        if suite in suites_of(read_record(folder)):
            yield folder
    if model == BUNDLED:
        bundled = bundled_folder()
        yield from _seeds(bundled / plain / method)
        yield from _seeds(bundled / JOINT / method)


def bundled_folder() -> Path:
    """Return the folder of the checkpoints that come with the bundled backbone."""
    from flashmem_bench.tiny import weights_dir

    return Path(weights_dir()).parent / "checkpoints"


def _seeds(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("seed*") if (path / "config.json").exists() and path.name[4:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[4:]))


def suites_of(record: dict[str, Any]) -> list[str]:
    """Return the suites that a checkpoint was trained on."""
    return list((record.get("metadata") or {}).get("suites") or [])


def _scope(record: dict[str, Any], suite: str) -> str:
    trained = suites_of(record)
    if suite not in trained:
        return "transfer"
    return "suite" if len(trained) == 1 else "joint"


def _check_source(record: dict[str, Any], method: str, named: str) -> None:
    found = record.get("memory", {}).get("source")
    if found not in SOURCES.get(method, SOURCES["flashmem"]):
        raise UsageError(
            f"the checkpoint {named} is a {found} memory; this method needs one made by "
            f"`flashmem-bench train --method {method}`"
        )


def _check_clean(record: dict[str, Any], suite: str, named: str) -> None:
    """Refuse a memory that has seen the suite's test questions under another suite's name."""
    info = next((info for info in list_suites() if info.name == suite), None)
    patterns = (info.metadata.get("never_trained_on") or ()) if info is not None else ()
    seen = [name for name in suites_of(record) if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if seen:
        raise UsageError(
            f"the checkpoint {named} was trained on {', '.join(seen)}, which has questions of the test of {suite}; "
            "choose one that was trained on other suites with --checkpoint"
        )


def fetch(named: str) -> Path:
    """Return the folder of a checkpoint given as a folder or a hub id."""
    folder = Path(named).expanduser()
    if folder.is_dir():
        return folder
    if named.count("/") != 1 or named.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no checkpoint folder at {named}; give a folder made by train, or a hub id")
    from huggingface_hub import snapshot_download

    from flashmem_bench.hub import quick_hub

    try:
        with quick_hub():
            return Path(snapshot_download(named))
    except Exception as error:  # The hub client raises many unrelated types; each means that it is not to be had.
        raise CheckpointError(
            f"there is no checkpoint folder at {named} and the hub gives nothing under that id; check both"
        ) from error


def read_record(folder: Path) -> dict[str, Any]:
    """Read the JSON part of a checkpoint.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(record["memory"], dict):
            raise TypeError("memory")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a memory checkpoint: its config.json is missing or damaged") from error
    require_seal(record, folder / "config.json", "copy or train it again")
    return record
