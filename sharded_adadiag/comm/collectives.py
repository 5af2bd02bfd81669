"""The few collectives used, over one process group or over a single process."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when its tensors may be used: on an accelerator, by later kernels."""


class Done:
    """A collective that has ended."""

    def wait(self) -> None:
        """Return at once."""


class Communicator(Protocol):
    """What the engine needs of a group of ranks."""

    rank: int
    size: int

    def start_all_to_all(
        self, target: Tensor, source: Tensor, received: list[int], sent: list[int]
    ) -> Handle:
        """Begin to exchange uneven chunks of two 1-D tensors."""

    def all_reduce_max_(self, tensor: Tensor) -> None:
        """LocalParam-wise maximum over the ranks, in place."""

    def all_reduce_sum_(self, tensor: Tensor) -> None:
        """LocalParam-wise sum over the ranks, in place."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """The picklable value of every rank."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of one shape, on the CPU, in rank order."""

    def device(self, fallback: torch.device) -> torch.device:
        """Where tensors to be sent must be, given where they are."""


class SingleProcess:
    """A group of one rank: nothing to do."""

    rank = 0
    size = 1

    def start_all_to_all(
        self, target: Tensor, source: Tensor, received: list[int], sent: list[int]
    ) -> Handle:
        """Exchange with oneself, at once."""
        target.copy_(source)
        return Done()

    def all_reduce_max_(self, tensor: Tensor) -> None:
        """Leave the tensor as it is."""

    def all_reduce_sum_(self, tensor: Tensor) -> None:
        """Leave the tensor as it is."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The one tensor."""
        return tensor[None]

    def device(self, fallback: torch.device) -> torch.device:
        """Where the tensors are."""
        return fallback


class ProcessGroup:
    """A ``torch.distributed`` process group.

    Only ``all_to_all_single``, ``all_reduce`` and ``all_gather`` are used:
    they take uneven splits where we need them, are on every back end, and are
    spelled alike in all supported versions of torch.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def start_all_to_all(
        self, target: Tensor, source: Tensor, received: list[int], sent: list[int]
    ) -> Handle:
        """``dist.all_to_all_single``, asynchronous."""
        work = dist.all_to_all_single(
            target, source, received, sent, group=self.group, async_op=True
        )
        return Done() if work is None else work

    def all_reduce_max_(self, tensor: Tensor) -> None:
        """``dist.all_reduce`` with MAX."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)

    def all_reduce_sum_(self, tensor: Tensor) -> None:
        """``dist.all_reduce`` with SUM."""
        # Gloo gives wrong results for strided tensors without an error.
        assert tensor.is_contiguous()
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)

    def all_gather_object(self, value: Any) -> list[Any]:
        """``dist.all_gather_object``."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def all_gather(self, tensor: Tensor) -> Tensor:
        """``dist.all_gather``."""
        tensor = tensor.to(self.device(tensor.device))
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor, group=self.group)
        return torch.stack(gathered).cpu()

    def device(self, fallback: torch.device) -> torch.device:
        """The CPU for gloo-like back ends, else the accelerator."""
        types = {d.type for d in self.group._device_types}
        if fallback.type in types:
            return fallback
        return torch.device(sorted(types)[0]) if types else fallback


def communicator(group: dist.ProcessGroup | None) -> Communicator:
    """The communicator of a group.

    Args:
        group: A process group that this rank is in, or None.

    Returns:
        A single process for None and for groups of one rank.

    Raises:
        TypeError: If ``group`` is something else.
        ValueError: If this rank is not in the group.
    """
    if group is None:
        return SingleProcess()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, got {group!r}; "
            "pass dist.group.WORLD, mesh.get_group() or the result of dist.new_group"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("process_group: this rank is not in the group passed")
    return ProcessGroup(group) if dist.get_world_size(group) > 1 else SingleProcess()
