"""A run into a results folder that is made to be killed: `python -m tests.store_victim ROOT TOTAL KIND AT`.

The runner and the store are the real ones; what answers is a stub, and torch is never imported. It prints the id of a
sample when its progress would show. KIND says where it kills itself:
`bytes` after so many bytes of lines, inside a write; `operation` before the so manieth flush or rename; `never`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from flashmem_bench import cell_store, durable
from flashmem_bench.answers import Finished
from flashmem_bench.executors.base import Work
from flashmem_bench.interrupts import Stop
from flashmem_bench.prepare import CellPlan
from flashmem_bench.progress import Silent
from flashmem_bench.registry import get_method
from flashmem_bench.runner import run_cell
from flashmem_bench.schema import blank_sample
from flashmem_bench.session import Request
from flashmem_bench.store import ResultStore

IDENTITY = {"suite": "s", "method": "vanilla"}


def expected(index: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The one right row and text of a sample."""
    name = f"s-{index:04d}"
    return {"sample_id": name, "index": index, "score": (index * 7 % 11) / 11}, {
        "text": f"{index} " * (20 + index * 37 % 400),
        "tokens": [str(index)] * (index % 5),
    }


class Samples(list):
    """Samples of a suite without sessions."""

    def sessions(self) -> list[None]:
        return [None] * len(self)


class Made:
    """A suite of made-up samples."""

    name = "s"

    def __init__(self, total: int):
        names = [expected(index)[0]["sample_id"] for index in range(total)]
        self._samples = Samples(SimpleNamespace(sample_id=name, session_id=None) for name in names)

    def samples(self, split: str) -> Samples:
        return self._samples


class Stub:
    """An executor that knows every answer."""

    name, workers = "here", 1

    def environment(self) -> dict[str, Any]:
        return {}

    def answers(self, work: Work, note: Any) -> Generator[Finished]:
        for (index,) in work.batches:
            row, text = expected(index)
            yield Finished({**blank_sample(), **row, "triggers": 0, "score_valid": True}, text)

    def summary(self) -> dict[str, Any]:
        return {}


class Told(Silent):
    def advance(self, row: Mapping[str, Any]) -> None:
        print(row["sample_id"], flush=True)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_bytes(budget: int) -> None:
    def append(handle: BinaryIO, content: bytes) -> None:
        nonlocal budget
        if budget < len(content):
            handle.write(content[:budget])
            die()
        budget -= len(content)
        durable.append(handle, content)

    cell_store.append = append


def die_before_operation(number: int) -> None:
    left = number
    fsync, rename = os.fsync, os.rename

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                die()
            return original(*arguments, **more)

        return call

    os.fsync, os.rename, os.replace = counted(fsync), counted(rename), counted(os.replace)


def main(root: str, total: str, kind: str, at: str) -> None:
    if kind == "bytes":
        die_after_bytes(int(at))
    elif kind == "operation":
        die_before_operation(int(at))
    session = SimpleNamespace(request=Request(("s",), ("vanilla",)), store=ResultStore(Path(root)))
    plan = CellPlan(get_method("vanilla"), Made(int(total)), {**IDENTITY}, {**IDENTITY}, {})
    run_cell(session, plan, Told(), Stop(), Stub())
    print("torch" if "torch" in sys.modules else "end", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
