"""One training step shared by several processes on one machine, or by one alone.

A model of this size keeps a single core busy and gains little from a second thread, so each process runs on one
thread, takes a part of the step's micro-batches and adds its gradients to those of the others. All processes hold
the same weights and take the same decisions: what decides (mean losses, the clock) is agreed on first.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")
_parent = 0


def launch(work: Callable[[Any], None], processes: int, argument: Any) -> None:
    """Call `work(argument)` here, or in `processes` new processes that know one another."""
    if processes == 1:
        work(argument)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_join, (work, processes, port, argument), nprocs=processes)


def _join(rank: int, work: Callable[[Any], None], processes: int, port: int, argument: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    global _parent
    _parent = os.getppid()
    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        work(argument)
    finally:
        distributed.destroy_process_group()


def leave_with_parent(parent: int) -> None:
    """End this process when the one that started it is gone, so that a killed command leaves nothing running.

    Raises:
        SystemExit: the parent is not `parent` any more.
    """
    if os.getppid() != parent:
        raise SystemExit("the process that started this one is gone")


def is_first() -> bool:
    """Whether this process writes files and messages."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def share(pieces: Sequence[T], cost: Callable[[T], int]) -> list[T]:
    """The pieces that fall to this process: the dearest first, each to the process with least to do."""
    if not distributed.is_initialized():
        return list(pieces)
    loads = [0] * distributed.get_world_size()
    mine = []
    for piece in sorted(pieces, key=cost, reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += cost(piece)
        if rank == distributed.get_rank():
            mine.append(piece)
    return mine


@torch.no_grad()
def sum_gradients(model: torch.nn.Module) -> None:
    """Add up the gradients of all processes, in place."""
    if not distributed.is_initialized():
        return
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def means(values: dict[str, list[float]], names: Sequence[str]) -> dict[str, float]:
    """Mean of the values that all processes hold under each of `names`; names without a value are left out."""
    sums = torch.tensor([[sum(values.get(name, ())), len(values.get(name, ()))] for name in names], dtype=torch.float64)
    if distributed.is_initialized():
        distributed.all_reduce(sums)
    return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}


def agreed(value: float) -> float:
    """The first process's value."""
    if not distributed.is_initialized():
        return value
    leave_with_parent(_parent)
    held = torch.tensor([value], dtype=torch.float64)
    distributed.broadcast(held, 0)
    return held.item()
