"""Which ranks work on which matrix: the teams.

A *team* is the ranks that work on one matrix. One rank does all of it; *s* ranks take
an even block of its lines each (columns if P is applied, rows if Q is), and each keeps
its block's moments and a copy of the rotation. The *head* of the team computes the
basis.

The rule, in one place, integers only. Teams of one are tried first, because they copy
no rotation and exchange least. If some rank is then over the tolerance, matrices are
placed anew, heaviest first, each on the fewest ranks that have room for an even block
of it: in work, and in moments, to which the memory of the exchanges is proportional.
Ranks with most room come first, and a team stays on one node where that has room, if
all of them are on no more nodes for it. The better of the two wins. All of it counts
what the ranks bear already.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

from sharded_adadiag.plan.cost import MatrixCost
from sharded_adadiag.plan.geometry import Ranks, ranks_of
from sharded_adadiag.plan.ownership import RefreshLoads, assign_owners

# In percent of the mean: what the most loaded rank may do in a step, and may keep.
WORK_TOLERANCE = 105
STATE_TOLERANCE = 110
# How unevenly moments may lie before more work on the most loaded rank is tried.
MOMENTS_TOLERANCES = 110, 130, 160, 200
# Products of fewer lines are slower for each line.
MIN_LINES = 64

Borne = Sequence[tuple[int, MatrixCost]]


@dataclasses.dataclass(frozen=True, slots=True)
class Demand:
    """What a matrix asks of the ranks, and how far it may be divided.

    Attributes:
        cost: Work and state of the whole matrix.
        lines: What a team divides: the columns if P is applied, the rows if Q is; the
            fewer of both if both are. 1 if the matrix cannot be divided.
        rotation_bytes: What each rank of a team keeps besides its block's moments.
    """

    cost: MatrixCost
    lines: int
    rotation_bytes: int

    @property
    def max_ranks(self) -> int:
        """The largest team."""
        return max(self.lines // MIN_LINES, 1)

    def step_part(self, ranks: int) -> int:
        """Multiply-adds of a step for the largest block of a team's, rounded up."""
        return self._part(self.cost.step, ranks)

    def moments_part(self, ranks: int) -> int:
        """Bytes of moments of the largest block of a team's, rounded up."""
        return self._part(self.cost.state_bytes - self.rotation_bytes, ranks)

    def _part(self, amount: int, ranks: int) -> int:
        widest = -(-self.lines // ranks)
        return -(-amount * widest // self.lines)


@dataclasses.dataclass(frozen=True, slots=True)
class Team:
    """The ranks that work on one matrix.

    Attributes:
        ranks: In ascending order, which is that of their blocks.
        head: The rank that computes the basis, one of them.
    """

    ranks: Ranks
    head: int

    @classmethod
    def of_one(cls, rank: int) -> Team:
        """The team of one rank."""
        return cls(range(rank, rank + 1), rank)


def choose_teams(
    matrices: Sequence[Demand],
    world_size: int,
    borne: Borne = (),
    *,
    ranks_per_node: int | None = None,
) -> list[Team]:
    """Apply the rule of this module.

    Args:
        matrices: What each costs.
        world_size: Number of ranks.
        borne: Ranks and what they bear already, as often as it takes.
        ranks_per_node: Consecutive ranks that share a node; None for all.

    Returns:
        The team of each matrix. Equal inputs give equal outputs.
    """
    if not matrices:
        return []
    owners = assign_owners([m.cost for m in matrices], world_size, borne)
    alone = [range(owner, owner + 1) for owner in owners]
    excess = _excess(matrices, alone, world_size, borne)
    if excess > 0 and any(m.max_ranks > 1 for m in matrices):
        placed = _placed(matrices, world_size, borne, ranks_per_node or world_size)
        if _excess(matrices, placed, world_size, borne) < excess:
            return _with_heads(matrices, placed, borne)
    return [Team.of_one(owner) for owner in owners]


def _excess(
    matrices: Sequence[Demand],
    members: Sequence[Ranks],
    world_size: int,
    borne: Borne,
) -> float:
    """How far the worst rank is above the tolerances, relatively; 0 if none is."""
    work, state = [0] * world_size, [0] * world_size
    for rank, cost in borne:
        work[rank] += cost.step
        state[rank] += cost.state_bytes
    for matrix, ranks in zip(matrices, members):
        step = matrix.step_part(len(ranks))
        kept = matrix.moments_part(len(ranks)) + matrix.rotation_bytes
        for rank in ranks:
            work[rank] += step
            state[rank] += kept
    ratios = (
        100 * max(loads) * world_size / (sum(loads) * tolerance)
        for loads, tolerance in ((work, WORK_TOLERANCE), (state, STATE_TOLERANCE))
        if any(loads)
    )
    return max((ratio - 1 for ratio in ratios if ratio > 1), default=0.0)


def _placed(
    matrices: Sequence[Demand], world_size: int, borne: Borne, ranks_per_node: int
) -> list[Ranks]:
    """The ranks for each matrix, on fewer nodes if that can be had."""
    # Who stays on a node may leave no node with room for those that come later.
    placed = _fewest(matrices, world_size, borne, world_size)
    if ranks_per_node >= world_size:
        return placed
    near = _fewest(matrices, world_size, borne, ranks_per_node)
    return min(near, placed, key=lambda teams: _nodes(teams, ranks_per_node))


def _nodes(teams: Sequence[Ranks], ranks_per_node: int) -> int:
    """On how many nodes each team is, added up."""
    return sum(len({rank // ranks_per_node for rank in team}) for team in teams)


def _fewest(
    matrices: Sequence[Demand], world_size: int, borne: Borne, ranks_per_node: int
) -> list[Ranks]:
    """The fewest ranks for each matrix under the lowest bounds that can be met."""
    work, moments = [0] * world_size, [0] * world_size
    for rank, cost in borne:
        work[rank] += cost.step
        moments[rank] += cost.state_bytes
    all_work = sum(work) + sum(m.cost.step for m in matrices)
    all_moments = sum(moments) + sum(m.moments_part(1) for m in matrices)
    for bound in _bounds():
        most_work, most_moments = (
            max(-(-total * percent // (100 * world_size)), max(loads))
            for total, percent, loads in zip(
                (all_work, all_moments), bound, (work, moments)
            )
        )
        rooms = _Rooms(
            [most_work - load for load in work],
            [most_moments - load for load in moments],
            ranks_per_node,
        )
        placed = rooms.place(matrices)
        if placed is not None:
            return placed
    raise AssertionError("a rank has room for everything in the end")


def _bounds() -> Iterator[tuple[int, int]]:
    """Work and moments in percent of the mean, from the best to anything."""
    work = WORK_TOLERANCE
    while True:
        yield from ((work, moments) for moments in MOMENTS_TOLERANCES)
        yield work, 100 * work
        work += max(work // 50, 1)


class _Rooms:
    """What each rank may still take."""

    def __init__(
        self, work: list[int], moments: list[int], ranks_per_node: int
    ) -> None:
        self.work = work
        self.moments = moments
        self.ranks_per_node = ranks_per_node
        # Ranks with most room, and the first of equals, stand at the end.
        self.ascending = sorted((room, -rank) for rank, room in enumerate(work))

    def place(self, matrices: Sequence[Demand]) -> list[Ranks] | None:
        """The fewest ranks for each matrix, or None if there is no room for one."""
        members: list[Ranks] = [()] * len(matrices)
        heaviest = sorted(
            range(len(matrices)), key=lambda i: (-matrices[i].cost.step, i)
        )
        for i in heaviest:
            team = self._team(matrices[i])
            if team is None:
                return None
            self._take(team, matrices[i])
            members[i] = ranks_of(sorted(team))
        return members

    def _team(self, matrix: Demand) -> list[int] | None:
        for size in range(1, min(matrix.max_ranks, len(self.work)) + 1):
            work, moments = matrix.step_part(size), matrix.moments_part(size)
            if self.ascending[-size][0] >= work:
                team = self._roomiest(size, work, moments)
                if len(team) == size:
                    return team
        return None

    def _roomiest(self, size: int, work: int, moments: int) -> list[int]:
        """Up to `size` ranks with room, on one node if one has enough of them."""
        nodes: dict[int, list[int]] = {}
        roomiest: list[int] = []
        alike = self.ranks_per_node >= len(self.work)
        for room, negative in reversed(self.ascending):
            if room < work or (len(roomiest) == size and alike):
                break
            rank = -negative
            if self.moments[rank] >= moments:
                if len(roomiest) < size:
                    roomiest.append(rank)
                node = nodes.setdefault(rank // self.ranks_per_node, [])
                node.append(rank)
                if len(node) == size:
                    return node
        return roomiest

    def _take(self, team: Sequence[int], matrix: Demand) -> None:
        work = matrix.step_part(len(team))
        moments = matrix.moments_part(len(team))
        for rank in team:
            old = self.work[rank], -rank
            del self.ascending[bisect.bisect_left(self.ascending, old)]
            self.work[rank] -= work
            self.moments[rank] -= moments
            bisect.insort(self.ascending, (self.work[rank], -rank))


def _with_heads(
    matrices: Sequence[Demand],
    members: Sequence[Ranks],
    borne: Borne,
) -> list[Team]:
    """Each team's head is the member that has least to decompose."""
    loads = RefreshLoads(borne)
    heads = [0] * len(matrices)
    for i in sorted(range(len(matrices)), key=lambda i: (-matrices[i].cost.refresh, i)):
        heads[i] = loads.least(members[i], matrices[i].cost)
        loads.add(heads[i], matrices[i].cost)
    return [Team(ranks, head) for ranks, head in zip(members, heads)]
