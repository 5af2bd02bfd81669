"""One parameter of an optimizer as this rank holds it, whatever the framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sharded_adadiag.params.holding import Holding, gradient_dtype, holding
from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.plan.regions import Region
from sharded_adadiag.plan.spec import ParamSpec


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One parameter of an optimizer and this rank's part of it.

    Attributes:
        name: The parameter's name.
        dtype: Dtype of the tensor that is updated.
        grad_dtype: Dtype of its gradient.
        holding: Logical shape and region.
        group: Its param group.
        rotate: Whether it may be rotated.
        find_param: Gives the local tensor with its entries, wherever it is now.
        grad: Gives the local gradient, or None.
        state: Gives the dict that holds its states.
        zeros_like: Makes a state tensor in the parameter's own layout.
    """

    name: str
    dtype: torch.dtype
    grad_dtype: torch.dtype
    holding: Holding
    group: dict[str, Any]
    rotate: bool
    find_param: Callable[[], Tensor]
    grad: Callable[[], Tensor | None]
    state: Callable[[], dict[str, Any]]
    zeros_like: Callable[[torch.dtype], Tensor]


def piece(
    param: Tensor,
    name: str,
    group: dict[str, Any],
    optimizer: Optimizer,
    *,
    rotate: bool,
) -> Piece:
    """The piece that a parameter of any framework but DeepSpeed is.

    Args:
        param: A plain tensor, a DTensor or a parameter of FSDP1.
        name: Its name.
        group: Its param group.
        optimizer: Which keeps its states.
        rotate: Whether it may be rotated.

    Returns:
        The piece.

    Raises:
        NotImplementedError: For a layout that is not one box of the matrix view.
        ValueError: If its group's ``batch_dims`` or ``split_rows`` do not suit it.
    """
    return Piece(
        name=name,
        dtype=param.dtype,
        grad_dtype=gradient_dtype(param),
        holding=holding(param, name, group),
        group=group,
        rotate=rotate,
        find_param=lambda: local(param),
        grad=lambda: None if param.grad is None else local(param.grad),
        state=lambda: optimizer.state[param],
        zeros_like=lambda dtype: torch.zeros_like(
            param, dtype=dtype, memory_format=torch.preserve_format
        ).detach(),
    )


def local(tensor: Tensor) -> Tensor:
    """The plain tensor with this rank's entries; writing to it writes the original."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether ranks hold different parts of the tensor, as its type tells."""
    return isinstance(tensor, DTensor)


@dataclasses.dataclass(slots=True, eq=False)
class LocalParam:
    """One parameter of the optimizer, as the engine sees it.

    Attributes:
        spec: What is the same on every rank.
        layout: What each rank holds of its matrix view.
        piece: What this rank holds: region, tensor, gradient, states.
        group: The param group that it is in now, or was in last.
        member: Whether it is in any; if not it is left alone.
    """

    spec: ParamSpec
    layout: Layout
    piece: Piece
    group: dict[str, Any]
    member: bool = True

    @property
    def region(self) -> Region:
        """What this rank holds of the matrix view."""
        return self.piece.holding.region

    @property
    def param(self) -> Tensor:
        """The local tensor with the entries of ``region``."""
        return self.piece.find_param()

    def grad(self) -> Tensor | None:
        """The local gradient, or None."""
        return self.piece.grad() if self.member else None

    def state(self) -> dict[str, Any]:
        """Its states."""
        return self.piece.state()

    def release(self) -> None:
        """Let go of a parameter that has left the groups, as its state has."""
        self.piece = dataclasses.replace(
            self.piece, find_param=_gone, grad=_gone, state=_gone, zeros_like=_gone
        )


def _gone(*_: Any) -> Any:
    raise RuntimeError("the parameter has left the optimizer")


def gradients(entries: Iterable[LocalParam]) -> list[Tensor | None]:
    """The local gradient of each parameter, None where there is none."""
    return [entry.piece.grad() if entry.member else None for entry in entries]


def tensors(entries: Iterable[LocalParam]) -> list[Tensor | None]:
    """The local tensor of each parameter, None of one that is in no group."""
    return [entry.piece.find_param() if entry.member else None for entry in entries]


def states(entries: Iterable[LocalParam]) -> list[dict[str, Any]]:
    """The states of each parameter; none of one that is in no group."""
    return [entry.piece.state() if entry.member else {} for entry in entries]


def device_of(entries: Iterable[LocalParam]) -> torch.device:
    """Where the parameters are; the CPU if there are none."""
    here = (entry.param.device for entry in entries if entry.member)
    return next(here, torch.device("cpu"))
