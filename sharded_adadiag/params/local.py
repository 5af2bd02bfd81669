"""A parameter as a rank sees it, whatever the framework.

Plain tensors (one process, DDP) are held whole. DTensors (FSDP2, HSDP, tensor
parallel) hold one box of the logical tensor, parameters of FSDP1 a flat range.

Private names used: ``torch.distributed.tensor._utils.
compute_local_shape_and_global_offset``, tried with torch 2.11 and 2.13; of a parameter
``ds_shape``, tried with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from sharded_adadiag.params.fsdp1 import remembered
from sharded_adadiag.plan.geometry import Box, Region, full


@dataclasses.dataclass(frozen=True, slots=True)
class Holding:
    """What one rank holds of one parameter.

    Attributes:
        shape: The logical shape of the parameter.
        rows: Of its matrix view (dimension 0).
        cols: Of its matrix view (all other dimensions).
        region: The part of the matrix view that is held here.
    """

    shape: tuple[int, ...]
    rows: int
    cols: int
    region: Region


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One parameter of an optimizer and this rank's part of it.

    Attributes:
        name: Of the parameter.
        dtype: Of the tensor that is updated.
        grad_dtype: Of its gradient.
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
    """
    return Piece(
        name=name,
        dtype=param.dtype,
        grad_dtype=gradient_dtype(param),
        holding=holding(param, name),
        group=group,
        rotate=rotate,
        find_param=lambda: local(param),
        grad=lambda: None if param.grad is None else local(param.grad),
        state=lambda: optimizer.state[param],
        zeros_like=lambda dtype: torch.zeros_like(
            param, dtype=dtype, memory_format=torch.preserve_format
        ).detach(),
    )


def gradient_dtype(param: Tensor) -> torch.dtype:
    """The widest dtype that a parameter's gradient may have, as torch says.

    Args:
        param: The parameter. Its ``grad_dtype`` (torch 2.13; its own dtype before) is
            what autograd casts to; None lets any dtype be.

    Returns:
        The dtype, the same on every rank; for None that of the computation.
    """
    asked = getattr(param, "grad_dtype", param.dtype)
    return torch.promote_types(param.dtype, torch.float32) if asked is None else asked


def local(tensor: Tensor) -> Tensor:
    """The plain tensor with this rank's entries; writing to it writes the original."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether ranks hold different parts of the tensor, as its type tells."""
    return isinstance(tensor, DTensor)


def logical_shape(param: Tensor, name: str = "parameter") -> tuple[int, ...]:
    """The shape of the full parameter.

    Args:
        param: A parameter of any framework.
        name: For messages.

    Returns:
        Its logical shape.
    """
    flat = remembered(param, name)
    if flat is not None:
        return flat[0]
    # DeepSpeed's stage 3 empties a parameter that is not gathered.
    return tuple(getattr(param, "ds_shape", param.shape))


def view_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a parameter's matrix view; a vector is one row.

    Args:
        shape: Its logical shape.

    Returns:
        The first dimension, and all others.
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def holding(param: Tensor, name: str) -> Holding:
    """Where this rank's entries of a parameter are in its matrix view.

    Args:
        param: A plain tensor or a DTensor.
        name: For messages.

    Returns:
        The holding.

    Raises:
        NotImplementedError: For a layout that is not one box of the matrix view.
    """
    shape = logical_shape(param, name)
    rows, cols = view_shape(shape)
    flat = remembered(param, name)
    if flat is not None:
        return Holding(shape, rows, cols, flat[1])
    if not isinstance(param, DTensor):
        return Holding(shape, rows, cols, full(rows, cols))
    if any(p.is_partial() for p in param.placements):
        raise NotImplementedError(
            f"{name}: placements {param.placements} hold partial sums; parameters "
            "must be sharded or replicated"
        )
    local_shape, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    own_shape = tuple(param.to_local().shape)
    # An empty shard may have forgotten the size of its other dimensions.
    if tuple(local_shape) != own_shape and math.prod(own_shape) > 0:
        raise NotImplementedError(
            f"{name}: placements {param.placements} give each rank no single box "
            f"(expected a local shape {tuple(local_shape)}, got {own_shape})"
        )
    return Holding(shape, rows, cols, _box(shape, local_shape, offset, name))


def _box(
    shape: tuple[int, ...],
    local_shape: Iterable[int],
    offset: Iterable[int],
    name: str,
) -> Box:
    """A box of a tensor as a box of its matrix view."""
    sizes, starts = list(local_shape), list(offset)
    if len(shape) < 2:
        start = starts[0] if starts else 0
        return Box(0, 1, start, start + math.prod(sizes))
    if sizes[2:] != list(shape[2:]):
        raise NotImplementedError(
            f"{name}: a tensor of shape {shape} is sharded along dimension 2 or "
            "later; shard dimension 0 or 1, so that each rank holds a box of its "
            "matrix view"
        )
    inner = math.prod(shape[2:])
    return Box(
        starts[0],
        starts[0] + sizes[0],
        starts[1] * inner,
        (starts[1] + sizes[1]) * inner,
    )


def find_group(
    params: Iterable[Tensor], group: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The process group whose ranks hold the parameters between them.

    Args:
        params: All parameters of the optimizer.
        group: What the user passed, which wins.

    Returns:
        The mesh's group if all DTensors share a 1-D mesh; the default group if they
        do not (HSDP, several meshes) and for FSDP1; None for plain tensors (one
        process, or replicas that each compute everything).

    Raises:
        ValueError: If several meshes, or one of more dimensions, leave ranks out.
    """
    if group is not None:
        return group
    params = list(params)
    meshes = {p.device_mesh for p in params if isinstance(p, DTensor)}
    flat = any(getattr(p, "_fsdp_flattened", False) for p in params)
    if not meshes and not flat:
        return None
    if len(meshes) == 1 and not flat:
        (mesh,) = meshes
        if mesh.ndim == 1:
            return mesh.get_group()
    ranks = sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()})
    if meshes and len(ranks) < dist.get_world_size():
        raise ValueError(
            f"the parameters live on ranks {ranks} of {dist.get_world_size()}, and no "
            "single mesh dimension has all of these (a pipeline stage, say); pass "
            "process_group=, a group of just these ranks"
        )
    return dist.group.WORLD


def device_of(params: Iterable[Tensor]) -> torch.device:
    """The device of the first parameter's entries."""
    for param in params:
        return local(param).device
    return torch.device("cpu")
