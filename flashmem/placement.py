"""Which part of the work is this process's, and how the processes of one training agree.

Alone, everything here is the identity and `accelerate` is not imported. Under `accelerate launch` (or any launcher that
sets RANK, LOCAL_RANK and WORLD_SIZE) it joins the others through accelerate, which picks NCCL or gloo and this
process's device. What must be the same everywhere, such as the time that has passed or a decision to stop, is taken
from process 0; what adds up, such as gradients, is summed. Only process 0 writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class Processes:
    """One process, alone: takes all work and agrees with itself."""

    rank = 0
    world = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def mine(self, items: Sequence[Item]) -> list[Item]:
        """This process's share: every `world`-th item."""
        return list(items[self.rank :: self.world])

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on its own device."""
        return tensor

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with process 0's."""

    def agree(self, value: float) -> float:
        """Process 0's value."""
        return value

    def merge(self, parts: list[Item]) -> list[Item]:
        """What `mine` took apart, put together again after work on it: every process's items in the first order."""
        return parts

    def wait(self) -> None:
        """Return when every process is here."""


class Launched(Processes):
    """One of several processes, joined through accelerate."""

    def __init__(self) -> None:
        from accelerate import PartialState

        self._state: Any = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.world = self._state.process_index, self._state.num_processes

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Processes.sum`."""
        from accelerate.utils import reduce

        # accelerate sums in place on some back ends: the caller's tensor stays what it was.
        return reduce(tensor.to(self._state.device, copy=True), reduction="sum").to(tensor.device)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """See `Processes.share`."""
        from accelerate.utils import broadcast

        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.detach().to(self._state.device, copy=True), from_process=0))

    def agree(self, value: float) -> float:
        """See `Processes.agree`."""
        from accelerate.utils import broadcast

        # Float32 on the wire: an accelerator may have no float64.
        return float(broadcast(torch.tensor([value], device=self._state.device), from_process=0)[0])

    def merge(self, parts: list[Item]) -> list[Item]:
        """See `Processes.merge`."""
        from accelerate.utils import gather_object

        gathered = gather_object([(self.rank + self.world * place, item) for place, item in enumerate(parts)])
        return [item for _, item in sorted(gathered, key=lambda pair: pair[0])]

    def wait(self) -> None:
        """See `Processes.wait`."""
        self._state.wait_for_everyone()


def processes() -> Processes:
    """The processes of this run, as the launcher's environment says."""
    return Launched() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Processes()
