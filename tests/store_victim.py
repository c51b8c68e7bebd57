"""A writer of a results folder that is made to be killed: `python -m tests.store_victim ROOT TOTAL KIND AT`.

It imports no torch. It prints the id of a sample when the store calls it durable. KIND says where it kills itself:
`bytes` after so many bytes of lines, inside a write; `operation` before the so manieth flush or rename; `never`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

from flashmem_bench import cell_store, durable
from flashmem_bench.store import ResultStore
from flashmem_bench.writer import RowWriter

IDENTITY = {"suite": "s", "method": "m"}


def expected(index: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The one right row and text of a sample."""
    name = f"s-{index:04d}"
    return {"sample_id": name, "index": index, "score": (index * 7 % 11) / 11}, {
        "text": f"{index} " * (20 + index * 37 % 400),
        "tokens": [str(index)] * (index % 5),
    }


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
    cell = ResultStore(Path(root)).open_cell(IDENTITY, {"suite": "s", "method": "m"})
    done = cell.done()
    attempt = cell.begin_attempt({})
    with RowWriter(cell, durable=lambda row: print(row["sample_id"], flush=True)) as writer:
        for index in range(int(total)):
            row, text = expected(index)
            if row["sample_id"] not in done:
                writer.put({**row, "attempt": attempt}, text)
    cell.finish({"n": int(total)})
    print("torch" if "torch" in sys.modules else "end", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
