"""One training step shared by several processes on one machine, or by one alone.

A model of this size keeps a single core busy and gains little from a second thread, so each process runs on one
thread, takes a part of the step's micro-batches and adds its gradients to those of the others. All processes hold
the same weights and take the same decisions: what decides (mean losses, the clock) is agreed on first. How processes
agree is `flashmem.placement`'s; here is how they are started and what they share.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch

from flashmem.placement import Processes, processes

T = TypeVar("T")


def launch(work: Callable[[Any], None], count: int, argument: Any) -> None:
    """Call `work(argument)` here, or in `count` new processes that know one another."""
    if count == 1:
        work(argument)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_join, (work, count, port, argument), nprocs=count)


def _join(rank: int, work: Callable[[Any], None], count: int, port: int, argument: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # Joining takes as many threads as it sees cores, and they may not all be ours, unless this is set.
    names["OMP_NUM_THREADS"] = 1
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    _parent()
    together()
    try:
        work(argument)
    finally:
        torch.distributed.destroy_process_group()


@lru_cache(maxsize=1)
def together() -> Processes:
    """The processes of this training, joined once."""
    return processes()


@lru_cache(maxsize=1)
def _parent() -> int:
    return os.getppid()


def share(pieces: Sequence[T], cost: Callable[[T], int]) -> list[T]:
    """The pieces that fall to this process: the dearest first, each to the process with least to do."""
    loads = [0] * together().world
    mine = []
    for piece in sorted(pieces, key=cost, reverse=True) if len(loads) > 1 else pieces:
        rank = loads.index(min(loads))
        loads[rank] += cost(piece)
        if rank == together().rank:
            mine.append(piece)
    return mine


@torch.no_grad()
def sum_gradients(model: torch.nn.Module) -> None:
    """Add up the gradients of all processes, in place."""
    if together().world == 1:
        return
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = together().sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def means(values: dict[str, list[float]], names: Sequence[str]) -> dict[str, float]:
    """Mean of the values that all processes hold under each of `names`; names without a value are left out."""
    here = [[sum(values.get(name, ())), len(values.get(name, ()))] for name in names]
    sums = together().sum(torch.tensor(here, dtype=torch.float64)).tolist()
    return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}


def agreed(value: float) -> float:
    """The first process's value.

    Raises:
        SystemExit: the process that started this one is gone, so that a killed command leaves nothing running.
    """
    if together().world > 1 and os.getppid() != _parent():
        raise SystemExit("the process that started this one is gone")
    return together().agree(value)
