"""The checks by name: what each measures, where it can run, and which of them one command takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flashmem.errors import FlashMemError
from flashmem_bench.engine import answering, decoding, memory, profile, stepping
from flashmem_bench.engine.figures import Outcome
from flashmem_bench.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from flashmem_bench.engine.setting import Setting


@dataclass(frozen=True)
class Check:
    """One question to the engine.

    Attributes:
        name: For `--check`.
        measures: What, in one line.
        homes: Types of device that its bounds are stated for; there it is part of the default.
        run: Measures it.
        elsewhere: Whether it can run on other devices, for a rehearsal and without a bound.
    """

    name: str
    measures: str
    homes: tuple[Literal["cpu", "cuda"], ...]
    run: Callable[[Setting], Outcome]
    elsewhere: bool = True

    def possible(self, device: str) -> bool:
        """Return whether it can run on a type of device at all."""
        return self.elsewhere or device in self.homes


CPU: tuple[Literal["cpu", "cuda"], ...] = ("cpu",)
CUDA: tuple[Literal["cpu", "cuda"], ...] = ("cuda",)
CHECKS = (
    Check("generate-batch1", "wall time against generate, one prompt at a time", CPU, answering.generate_batch1),
    Check("generate-batch16", "tokens/s against generate with 16 rows", CPU, answering.generate_batch16),
    Check("decode-4k", "flashmem over plain decoding against the floor", CPU, decoding.decode_4k),
    Check("monitored-row-8k", "cost of the monitored attention row", CPU, stepping.monitored_row),
    Check("prefill-memory", "peak memory of long prefills beyond weights and cache", CPU, memory.prefill_memory,
          elsewhere=False),
    Check("decode-bandwidth", "share of the memory bandwidth", CUDA, decoding.decode_bandwidth),
    Check("generate-long", "decode tokens/s against generate behind a long prompt", CUDA, answering.generate_long),
    Check("overhead-64k", "flashmem over plain decoding at 64k", CUDA, decoding.overhead_64k),
    Check("batch32-4k", "tokens/s of 32 rows over those of one", CUDA, decoding.batch32_4k),
    Check("peak-memory", "peak memory over weights, cache and one chunk", CUDA, memory.peak_memory, elsewhere=False),
    Check("prefill-128k", "peak memory of a prompt of 128k tokens", CUDA, memory.prefill_128k, elsewhere=False),
    Check("memgen-64k", "the heavy baseline over flashmem, end to end", CUDA, decoding.memgen_64k),
    Check("profile", "kernels, gaps and bytes of one decode step", (*CPU, *CUDA), profile.profile_step),
)  # fmt: skip


def chosen(names: Sequence[str], device: str) -> list[Check]:
    """Return the checks asked for; without names those whose bounds are stated for the device.

    Raises:
        UnknownNameError: No check of that name.
    """
    known = {check.name: check for check in CHECKS}
    for name in names:
        if name not in known:
            raise UnknownNameError("check", name, known)
    return [known[name] for name in names] if names else [check for check in CHECKS if device in check.homes]


def run_checks(setting: Setting, wanted: Sequence[Check]) -> Iterator[Outcome]:
    """Run checks one after the other; one that cannot run, or has no time left, says so in an outcome."""
    for check in wanted:
        if not check.possible(setting.device):
            home = check.homes[0]
            yield Outcome(check.name, skipped=f"it reads the memory counters of {home}: run it with --device {home}")
        elif setting.stop.late:
            yield Outcome(check.name, skipped="the time was up before it began: give it more with --budget-minutes")
        else:
            yield _run(setting, check)


def _run(setting: Setting, check: Check) -> Outcome:
    """Run a check; where it fails the others go on."""
    import torch

    try:
        return check.run(setting)
    except UsageError:
        raise
    except torch.OutOfMemoryError:
        return Outcome(check.name, skipped="the device ran out of memory: choose smaller --contexts")
    except FlashMemError as error:
        return Outcome(check.name, skipped=f"it failed: {error}")


def others(wanted: Sequence[Check]) -> list[Outcome]:
    """Return an outcome for every check that the default left out, with the reason."""
    return [
        Outcome(check.name, skipped=f"its bound is stated for {check.homes[0]}: run it with --device {check.homes[0]}")
        for check in CHECKS
        if check not in wanted
    ]
