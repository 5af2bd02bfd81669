"""One parameter of an optimizer as this rank holds it, whatever the framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sharded_adadiag.options import Options
from sharded_adadiag.params.holding import Holding, gradient_dtype, holding
from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.plan.regions import Region
from sharded_adadiag.plan.spec import ParamSpec


def local(tensor: Tensor) -> Tensor:
    """The plain tensor with this rank's entries; writing to it writes the original."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether ranks hold different parts of the tensor, as its type tells."""
    return isinstance(tensor, DTensor)


@dataclasses.dataclass(slots=True, eq=False)
class LocalParam:
    """One parameter of an optimizer and this rank's part of it.

    Attributes:
        spec: What is the same on every rank.
        region: What this rank holds of the view in which layouts are given.
        group: The param group that it is in now, or was in last.
        may_rotate: Whether its name lets it be rotated; its group has a say, too.
        find_param: Gives the local tensor with the entries of `region`, wherever it
            is now.
        find_grad: Gives the local gradient, or None.
        state: Gives the dict that holds its states.
        zeros_like: Makes a state tensor of a dtype in the parameter's own layout.
        layout: What each rank holds, once they have told each other.
        member: Whether it is in any group; if not it is left alone.
    """

    spec: ParamSpec
    region: Region
    group: dict[str, Any]
    may_rotate: bool
    find_param: Callable[[], Tensor]
    find_grad: Callable[[], Tensor | None]
    state: Callable[[], dict[str, Any]]
    zeros_like: Callable[[torch.dtype], Tensor]
    layout: Layout = Layout(0, ())
    member: bool = True

    @property
    def param(self) -> Tensor:
        """The local tensor with the entries of ``region``."""
        return self.find_param()

    def grad(self) -> Tensor | None:
        """The local gradient, or None."""
        return self.find_grad() if self.member else None

    def release(self) -> None:
        """Let go of a parameter that has left the groups, as its state has."""
        self.find_param = self.find_grad = self.state = self.zeros_like = _gone


def local_param(
    param: Tensor,
    name: str,
    group: dict[str, Any],
    optimizer: Optimizer,
    *,
    may_rotate: bool,
) -> LocalParam:
    """This rank's part of a parameter of any framework but DeepSpeed.

    Args:
        param: A plain tensor, a DTensor or a parameter of FSDP1.
        name: The parameter's name.
        group: Its param group.
        optimizer: Which keeps its states.
        may_rotate: Whether its name lets it be rotated.

    Returns:
        The parameter, whose layout is not known yet.

    Raises:
        NotImplementedError: For a layout that is not one box of the matrix view.
        ValueError: If an option of its group is invalid, or its ``batch_dims`` or
            ``split_rows`` do not suit the parameter.
    """
    held = holding(param, name, group)
    dtypes = param.dtype, gradient_dtype(param)
    return LocalParam(
        spec=spec_in(group, name, held, dtypes, may_rotate=may_rotate),
        region=held.region,
        group=group,
        may_rotate=may_rotate,
        find_param=lambda: local(param),
        find_grad=lambda: None if param.grad is None else local(param.grad),
        state=lambda: optimizer.state[param],
        zeros_like=lambda dtype: torch.zeros_like(
            param, dtype=dtype, memory_format=torch.preserve_format
        ).detach(),
    )


def spec_in(
    group: dict[str, Any],
    name: str,
    held: Holding,
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    may_rotate: bool,
) -> ParamSpec:
    """What is the same on every rank about a parameter in a group.

    Args:
        group: Its param group.
        name: The parameter's name.
        held: What this rank holds of it.
        dtypes: Dtype of the tensor that is updated, and that of its gradient.
        may_rotate: Whether its name lets it be rotated.

    Returns:
        The spec. It has no learning rate: that is no part of a plan, and may be a
        tensor.

    Raises:
        ValueError: If an option of the group is invalid.
    """
    options = Options.from_group(group)
    rotate = options.rotate and may_rotate
    options = dataclasses.replace(options, lr=0.0, rotate=rotate)
    spec = ParamSpec(name, held.shape, *dtypes, options)
    if held.cols != spec.stored[1]:
        spec = dataclasses.replace(spec, width=held.cols)
    return spec


def _gone(*_: Any) -> Any:
    raise RuntimeError("the parameter has left the optimizer")


def gradients(entries: Iterable[LocalParam]) -> list[Tensor | None]:
    """The local gradient of each parameter, None where there is none."""
    return [entry.grad() for entry in entries]


def tensors(entries: Iterable[LocalParam]) -> list[Tensor | None]:
    """The local tensor of each parameter, None of one that is in no group."""
    return [entry.find_param() if entry.member else None for entry in entries]


def states(entries: Iterable[LocalParam]) -> list[dict[str, Any]]:
    """The states of each parameter; none of one that is in no group."""
    return [entry.state() if entry.member else {} for entry in entries]


def device_of(entries: Iterable[LocalParam]) -> torch.device:
    """Where the parameters are; the CPU if there are none."""
    here = (entry.param.device for entry in entries if entry.member)
    return next(here, torch.device("cpu"))
