"""Checks of an installation: what is there, what is missing, and what to do about it.

A check is essential when nothing runs without it; the others explain what will be refused. Nothing is changed, and
the network is not used.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from flashmem.errors import FlashMemError
from flashmem_bench.environment import cpu_quota, package_versions, processor
from flashmem_bench.models import BUNDLED

# Package, why it cannot stand beside this one.
_BAD_COMPANY = {
    "kvpress": "it pins transformers below 5.3; keep it in an environment of its own",
    "hydra-core": "its antlr4 pin clashes with lm-eval[math]",
}


@dataclass(frozen=True)
class Check:
    """One line of the examination: `status` is ok, warning or broken; broken alone makes `doctor` fail."""

    name: str
    status: str
    detail: str


def examine(results: Path, data_dir: Path | None) -> list[Check]:
    """Run every check; one that fails in an unforeseen way is itself a finding."""
    makers: tuple[Callable[[], Iterator[Check]], ...] = (
        _versions,
        _device,
        lambda: _writable(results),
        _suites,
        lambda: _data(data_dir),
        _bundled,
        _sandbox,
        _company,
    )
    found: list[Check] = []
    for maker in makers:
        try:
            found += maker()
        except Exception as error:
            found.append(Check("doctor", "broken", f"a check failed: {type(error).__name__}: {error}"))
    return found


def _versions() -> Iterator[Check]:
    from packaging.requirements import Requirement

    wanted = {}
    for text in requires("flashmem") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            wanted[requirement.name.lower()] = requirement
    for name in sorted(wanted):
        try:
            have = version(name)
        except PackageNotFoundError:
            yield Check(name, "broken", f"not installed; pip install '{wanted[name]}'")
            continue
        if not wanted[name].specifier.contains(have, prereleases=True):
            yield Check(name, "broken", f"version {have} does not satisfy {wanted[name].specifier}")
    shown = ", ".join(f"{name} {number}" for name, number in package_versions().items() if number)
    yield Check("versions", "ok", shown)


def _device() -> Iterator[Check]:
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota()
    limit = f", quota {quota:g}" if quota else ""
    yield Check("processor", "ok", f"{processor()}, {cpus} usable{limit}, {torch.get_num_threads()} torch threads")
    load = os.getloadavg()[0]
    if load > 0.5 * (cpus or 1):
        yield Check("load", "warning", f"load average {load:.1f}: other work will disturb timings")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Check(f"cuda:{index}", "ok", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    else:
        yield Check("gpu", "warning", "none: every time is a CPU timing, not comparable with a GPU")


def _writable(results: Path) -> Iterator[Check]:
    from flashmem_bench.errors import StoreError
    from flashmem_bench.store import ResultStore

    if results.exists():
        try:
            store = ResultStore(results)
            yield Check("results", "ok", f"{results.resolve()}, {len(store.cells())} cells")
        except StoreError as error:
            yield Check("results", "broken", str(error))
        return
    try:
        parent = next(folder for folder in (results.resolve().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=parent):
            yield Check("results", "ok", f"{results.resolve()} can be made")
    except OSError as error:
        yield Check("results", "broken", f"cannot write beside {results.resolve()}: {error.strerror or error}")


def _suites() -> Iterator[Check]:
    from flashmem_bench.suites import list_suites

    names = [info.name for info in list_suites()]
    status = "ok" if names else "broken"
    yield Check("suites", status, ", ".join(names) or "no suite files found; install the package again")


def _data(data_dir: Path | None) -> Iterator[Check]:
    from flashmem_bench.suites import data_folders, list_suites

    real = {info.name: data_folders(info) for info in list_suites() if info.kind == "real"}
    folder = data_dir or (Path(os.environ["FLASHMEM_DATA"]) if os.environ.get("FLASHMEM_DATA") else None)
    if folder is None:
        yield Check(
            "data", "warning", f"no --data-dir and no FLASHMEM_DATA: {', '.join(real)} need the hub or its cache"
        )
        return
    if not folder.is_dir():
        yield Check("data", "warning", f"{folder} is not a folder")
        return
    there = [name for name in real if all((folder / part).is_dir() for part in real[name])]
    missing = [name for name in real if name not in there]
    detail = f"{folder}: {', '.join(there) or 'nothing'}" + (f"; not there: {', '.join(missing)}" if missing else "")
    yield Check("data", "warning" if missing else "ok", detail)


def _bundled() -> Iterator[Check]:
    from flashmem_bench import checkpoints, thresholds
    from flashmem_bench.models import bundled_weights
    from flashmem_bench.tiny.sums import check_sums

    try:
        folder = bundled_weights()
        check_sums(folder)
    except FlashMemError as error:
        yield Check(BUNDLED, "broken", str(error))
        return
    size = sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
    yield Check(BUNDLED, "ok", f"{size / 2**20:.1f} MiB")
    memories = sorted(checkpoints.bundled_folder().glob("*/*/seed*/config.json"))
    yield from _memories(memories)
    taus = sorted(thresholds.bundled_folder().glob("*/*.json"))
    shown = ", ".join(f"{path.parent.name} {path.stem}" for path in taus)
    yield Check(
        "thresholds", "ok" if taus else "warning", shown or "none bundled; make them with flashmem-bench calibrate"
    )


def _memories(configs: list[Path]) -> Iterator[Check]:
    from flashmem_bench.checkpoints import HARM_LIMIT, read_record

    if not configs:
        yield Check("memories", "warning", "none bundled; make one with flashmem-bench train")
    for config in configs:
        try:
            metadata = read_record(config.parent).get("metadata", {})
        except FlashMemError as error:
            yield Check("memory", "broken", str(error))
            continue
        harm, default = metadata.get("harm"), "provisional" if metadata.get("provisional") else "not used by default"
        known = "harm not measured" if harm is None else f"harm {harm:.1%}"
        status = "warning" if harm is not None and harm > HARM_LIMIT else "ok"
        note = f", above {HARM_LIMIT:.0%}: {default}" if status == "warning" else ""
        yield Check("memory", status, f"{'/'.join(config.parent.parts[-3:])}: {known}{note}")


def _sandbox() -> Iterator[Check]:
    """What would keep in the programs that code suites run; a trial program finds out."""
    from flashmem_bench.errors import UsageError
    from flashmem_bench.grading.sandbox import active_layer

    try:
        layer = active_layer()
    except UsageError as error:
        yield Check("code sandbox", "warning", str(error))
        return
    yield Check("code sandbox", "ok" if layer.contained else "warning", layer.sentence())


def _company() -> Iterator[Check]:
    for package, why in _BAD_COMPANY.items():
        try:
            yield Check(package, "warning", f"version {version(package)} is installed: {why}")
        except PackageNotFoundError:
            continue
