"""A parameter as a rank sees it, whatever the framework.

Plain tensors (one process, DDP) are held whole. DTensors (FSDP2, HSDP, tensor
parallel) hold one box of the logical tensor, parameters of FSDP1 a flat range.

Private names used: ``torch.distributed.tensor._utils.
compute_local_shape_and_global_offset``, tried with torch 2.11 and 2.13; of a parameter
``ds_shape``, tried with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sharded_adadiag.params.fsdp1 import remembered
from sharded_adadiag.plan.regions import Box, Region, full
from sharded_adadiag.plan.view import MatrixView


class Holding(NamedTuple):
    """What one rank holds of one parameter.

    Attributes:
        shape: The logical shape of the parameter.
        cols: Columns of the view in which the region is given: `MatrixView.stored`,
            or, for a stack cut along its last dimensions, one with the rows of all
            matrices.
        region: The part of the view that is held here.
    """

    shape: tuple[int, ...]
    cols: int
    region: Region


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


def view_in(group: Mapping[str, Any], shape: tuple[int, ...], name: str) -> MatrixView:
    """How a parameter is seen as matrices.

    Args:
        group: Its param group.
        shape: Its logical shape.
        name: For messages.

    Returns:
        The view.

    Raises:
        ValueError: If the group's ``batch_dims`` or ``split_rows`` do not suit it.
    """
    asked = group.get("batch_dims", 0), group.get("split_rows")
    try:
        return MatrixView.of(shape, *asked)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def holding(
    param: Tensor, name: str, group: Mapping[str, Any] = MappingProxyType({})
) -> Holding:
    """Where this rank's entries of a parameter are in its matrix view.

    Args:
        param: A plain tensor or a DTensor.
        name: For messages.
        group: Its param group.

    Returns:
        The holding.

    Raises:
        NotImplementedError: For a layout that is not one box of the matrix view.
        ValueError: If the group's ``batch_dims`` or ``split_rows`` do not suit it.
    """
    shape = logical_shape(param, name)
    view = view_in(group, shape, name)
    rows, cols = view.stored
    flat = remembered(param, name)
    if flat is not None:
        return Holding(shape, cols, flat[1])
    if not isinstance(param, DTensor):
        return Holding(shape, cols, full(rows, cols))
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
    if len(shape) < 2:
        start = offset[0] if offset else 0
        box = Box(0, 1, start, start + math.prod(local_shape))
        return Holding(shape, cols, box)
    # In the view of a stack each matrix is a row. If columns of matrices are cut, the
    # rows of all matrices must be its rows, on every rank.
    lead = max(len(view.batch), 1)
    cut = [getattr(placement, "dim", 0) for placement in param.placements]
    if view.batch and max(cut) > lead:
        lead += 1
        cols = view.cols
    return Holding(shape, cols, _box(shape, local_shape, offset, lead, name))


def _box(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    starts: tuple[int, ...],
    lead: int,
    name: str,
) -> Box:
    """A box of a tensor as a box of a view whose rows are its leading dimensions."""
    edges = []
    for dims in (range(lead), range(lead, len(shape))):
        first, *rest = dims
        inner = math.prod(shape[i] for i in rest)
        if math.prod(sizes) and any(sizes[i] != shape[i] for i in rest):
            raise NotImplementedError(
                f"{name}: a tensor of shape {shape} is sharded along dimension "
                f"{next(i for i in rest if sizes[i] != shape[i])}, which gives no box "
                f"of its view as {math.prod(shape[:lead])} x "
                f"{math.prod(shape[lead:])}; shard dimension 0 or {lead} only"
            )
        edges += [starts[first] * inner, (starts[first] + sizes[first]) * inner]
    return Box(*edges)


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
