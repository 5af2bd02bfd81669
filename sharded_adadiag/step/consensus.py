"""What ranks tell each other of new parameters, and what must agree.

A digest of the descriptions is compared; the descriptions themselves travel only to
explain a difference. Regions, which differ from rank to rank, travel as integers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_adadiag.comm.collectives import Communicator
from sharded_adadiag.params.local import LocalParam
from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.plan.regions import Box, FlatRange, Region
from sharded_adadiag.plan.spec import ParamSpec

Settings = Mapping[str, Any]


class _Told(NamedTuple):
    """What a rank tells all others first."""

    error: str
    digest: bytes
    ranks_per_node: int


def agree_on_parameters(
    comm: Communicator,
    find: Callable[[], list[LocalParam]],
    settings: Settings,
    *,
    kind: str,
) -> tuple[list[LocalParam], int | None]:
    """Describe new parameters and compare the descriptions; a collective.

    Args:
        comm: The ranks.
        find: Gives this rank's part of each.
        settings: Options of the whole optimizer that the plan is made from.
        kind: What the parameters are called in messages.

    Returns:
        The parameters, now with their layouts, and how many consecutive ranks share a
        node, None if that is unknown.

    Raises:
        ValueError: On every rank, for the first error or difference.
    """
    params, error = _found(find)
    specs = [param.spec for param in params]
    digest = hashlib.sha256(repr((settings, specs)).encode()).digest()[:16]
    told = comm.all_gather_object(_Told(error, digest, _ranks_per_node(comm.size)))
    if any(one.error or one.digest != told[0].digest for one in told):
        raise_on_mismatch(comm.all_gather_object((error, dict(settings), specs)), kind)
    rows = torch.tensor([_row(param.region) for param in params], dtype=torch.int64)
    layouts = _layouts(comm.all_gather(rows.view(-1, 5)))
    for param, layout in zip(params, layouts):
        param.layout = layout
    per_node = {one.ranks_per_node for one in told}
    return params, min(per_node) or None if len(per_node) == 1 else None


def _found(find: Callable[[], list[LocalParam]]) -> tuple[list[LocalParam], str]:
    """This rank's new parameters, or the error that keeps it from describing them."""
    try:
        return find(), ""
    except (NotImplementedError, ValueError) as error:
        return [], str(error)


def _ranks_per_node(world_size: int) -> int:
    """As the launcher says, if these are all of its ranks; else 0."""
    local, everyone = (
        int(os.environ.get(name, "0") or 0)
        for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE")
    )
    return local if everyone == world_size and local and everyone % local == 0 else 0


def _row(region: Region) -> tuple[int, ...]:
    if isinstance(region, Box):
        return 0, *region
    return 1, region.start, region.stop, 0, 0


def _region(row: Sequence[int]) -> Region:
    return Box(*row[1:]) if row[0] == 0 else FlatRange(*row[1:3])


def _layouts(regions: Tensor) -> list[Layout]:
    """The layout of each parameter, one object for all that lie alike.

    Args:
        regions: ``[ranks, parameters, 5]``, as `_row` gives them.

    Returns:
        The layouts.
    """
    known: dict[bytes, Layout] = {}
    found = []
    for column in regions.transpose(0, 1).contiguous():
        key = column.numpy().tobytes()
        if key not in known:
            known[key] = Layout.of(map(_region, column.tolist()))
        found.append(known[key])
    return found


Described = tuple[str, dict[str, Any], list[ParamSpec]]


def raise_on_mismatch(published: Sequence[Described], kind: str) -> None:
    """Compare what the ranks told; all see the same, so all raise the same error.

    Args:
        published: By rank, an error or "", the optimizer's settings, the parameters.
        kind: What the parameters are called in messages.

    Raises:
        ValueError: For the first difference.
    """
    for rank, (error, _, _) in enumerate(published):
        if error:
            raise ValueError(f"rank {rank}: {error}")
    _, settings, first = published[0]
    for rank, (_, others, described) in enumerate(published):
        for name, value in settings.items():
            if others[name] != value:
                raise ValueError(
                    f"{name} is {value!r} on rank 0 and {others[name]!r} on rank "
                    f"{rank}; it decides which rank does what, so pass it alike on "
                    "every rank"
                )
        if len(described) != len(first):
            raise ValueError(
                f"rank 0 has {len(first)} {kind} parameters and rank {rank} has "
                f"{len(described)}; every rank of the group must pass the same ones "
                "(pipeline stages and experts: each with its own process_group=)"
            )
        for i, (spec, wanted) in enumerate(zip(described, first)):
            if spec != wanted:
                raise ValueError(
                    f"parameter {i} differs: rank 0 has {wanted.name!r} of shape "
                    f"{wanted.shape}, {wanted.dtype}, rank {rank} has {spec.name!r} "
                    f"of shape {spec.shape}, {spec.dtype}"
                    + (
                        ""
                        if spec.grad_dtype == wanted.grad_dtype
                        else f" with gradients in {spec.grad_dtype} instead of "
                        f"{wanted.grad_dtype}"
                    )
                    + (
                        ""
                        if spec.options == wanted.options
                        else f" with options {spec.options} instead of {wanted.options}"
                    )
                    + "; every rank of the group must pass the same parameters in "
                    "the same order"
                )
