"""Parts of a training file that training must not see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flashmem_bench.data import Doc

Loaders = Mapping[str, Callable[[], Sequence[Doc]]]


def held_out_loaders(docs: Callable[[str], list[Doc]], held_out: float) -> Loaders:
    """Return the loaders of a suite that has a training and a test file."""

    def cut() -> int:
        return len(docs("train")) - round(len(docs("train")) * held_out)

    return {
        "test": lambda: docs("test"),
        "train": lambda: docs("train")[: cut()],
        "calibration": lambda: docs("train")[cut() :],
        "validation": lambda: docs("train")[cut() :],
    }
