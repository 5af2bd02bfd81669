"""What this rank does in a round, listed when the plan is made and not in a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sharded_adadiag.plan.exchange_plan import ExchangePlan
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.regions import Region
from sharded_adadiag.plan.rounds import Part, Round
from sharded_adadiag.plan.route import Stage

# Matrices of one shape are updated together up to this many elements: enough to
# keep a GPU busy, few enough to stay in a CPU's cache.
BATCH_NUMEL = {"cpu": 1 << 18, "cuda": 1 << 26}


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Parts alike in shape, layout and dtype, which are computed together.

    Attributes:
        parts: The parts.
        places: Their positions in the round.
        first: The matrix of the first part; what the parts have alike is read of it.
        stages: The stages of that matrix's route.
        here: This rank has a block of each.
        home: What this rank works on is what it stores: nothing moves.
    """

    parts: tuple[Part, ...]
    places: tuple[int, ...]
    first: MatrixPlan
    stages: tuple[Stage, ...]
    here: bool
    home: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Hop:
    """One exchange of a round: from a stage to the next one, or back.

    Attributes:
        plan: The exchange.
        who: Positions of the parts that it moves.
        wire: Dtype of each in the messages.
        work: Dtype of each at the target.
        apart: Which of those it moves come home, and so are not put together.
        into: Name of the memory for the results.
    """

    plan: ExchangePlan
    who: tuple[int, ...]
    wire: tuple[torch.dtype, ...]
    work: tuple[torch.dtype, ...]
    apart: frozenset[int]
    into: str


@dataclasses.dataclass(frozen=True, slots=True)
class RoundHere:
    """A round as one rank sees it.

    Attributes:
        positions: Positions of the parameters in it, the same on every rank.
        parts: The parts that this rank stores or works on.
        regions: What of each part's matrix this rank stores.
        shapes: The shape of each such region.
        hops: For each pair of stages the way there and the way back; none if nothing
            would move.
        batches: The parts, those alike together. Those of matrices whose blocks' sums
            are added up over ranks are equal on every rank.
        owned: Positions of parts of which this rank alone has the whole gradient.
    """

    positions: tuple[int, ...]
    parts: tuple[Part, ...]
    regions: tuple[Region, ...]
    shapes: tuple[tuple[int, ...], ...]
    hops: tuple[tuple[Hop, Hop], ...]
    batches: tuple[Batch, ...]
    owned: tuple[int, ...]


def list_round(
    round_: Round, rank: int, device_type: str, dtypes: list[torch.dtype]
) -> RoundHere:
    """List what a rank does in a round.

    Args:
        round_: The round.
        rank: The rank.
        device_type: Type of the parameters' device.
        dtypes: Dtype of each parameter's gradient on its way.

    Returns:
        The list.
    """
    own = round_.on(rank)
    regions = tuple(part.layouts[0][rank] for part in own.parts)
    owned = tuple(
        i
        for i, part in enumerate(own.parts)
        if part.whole
        and part.matrix.route.kind == "owner"
        and part.matrix.route.owner == rank
        and part.matrix.rotated
    )
    hops = _hops(own, dtypes) if _moves(own, rank) else ()
    return RoundHere(
        tuple(sorted({part.matrix.index for part in round_.parts})),
        own.parts,
        regions,
        tuple(region.shape for region in regions),
        hops,
        _batches(own, rank, device_type, len(hops)),
        owned,
    )


def _moves(own: Round, rank: int) -> bool:
    """Whether a hop sends anything, changes a region or parts two rotations."""
    if not all(there.is_local and back.is_local for there, back in own.moves):
        return True
    return any(
        part.layouts[0][rank] != layout[rank] or not part.matrix.route.raw(k)
        for part in own.parts
        for k, layout in enumerate(part.layouts[1:])
    )


def _hops(own: Round, dtypes: list[torch.dtype]) -> tuple[tuple[Hop, Hop], ...]:
    hops = []
    for k, (who, (there, back)) in enumerate(zip(own.members, own.moves)):
        some = [own.parts[i].matrix for i in who]
        work = tuple(m.work_dtype for m in some)
        # A gradient that no stage has rotated yet travels in its own dtype.
        wire = tuple(dtypes[m.index] if m.route.raw(k) else m.work_dtype for m in some)
        # What only goes home is subtracted as it comes, region by region.
        home = [j for j, m in enumerate(some) if k == 0 and m.route.raw(0)]
        hops.append((
            Hop(there, who, wire, work, frozenset(), f"hop {k} there"),
            Hop(back, who, work, work, frozenset(home), f"hop {k} back"),
        ))
    return tuple(hops)


def _batches(own: Round, rank: int, device_type: str, hops: int) -> tuple[Batch, ...]:
    limit = BATCH_NUMEL.get(device_type, BATCH_NUMEL["cuda"])
    growing: dict[Any, list[int]] = {}
    size: dict[Any, int] = {}
    full = []
    for i, part in enumerate(own.parts):
        m = part.matrix
        here = None if part.whole else part.layouts[-1][rank]
        kind = (
            (*m.shape, m.left, m.right, m.work_dtype),
            # Ranks outside a team do not work on what others own.
            m.route.stages if m.route.kind != "owner" else rank in m.route.team,
            here.shape if here is not None else None,
        )
        growing.setdefault(kind, []).append(i)
        numel = m.view.numel if here is None else here.numel
        size[kind] = size.get(kind, 0) + numel
        if size[kind] + numel > limit:
            full.append(growing.pop(kind))
            del size[kind]
    which_together = [*full, *growing.values()]
    return tuple(_batch(own, which, rank, hops) for which in which_together)


def _batch(own: Round, which: list[int], rank: int, hops: int) -> Batch:
    parts = tuple(own.parts[i] for i in which)
    first = parts[0].matrix
    block = parts[0].layouts[-1][rank]
    here = rank in first.route.team and (parts[0].whole or block.numel > 0)
    stages = first.route.stages
    home = here and min(hops, len(stages) - 1) == 0
    return Batch(parts, tuple(which), first, stages, here, home)
