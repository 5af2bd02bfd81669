"""Which rank owns which matrix: balanced in work, in bytes of state, and in slots."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from sharded_adadiag.plan.cost import MatrixCost
from sharded_adadiag.plan.schedule import When

# A change of owners: (matrix, new owner) pairs.
Change = tuple[tuple[int, int], ...]
# Of all work, and of all state.
Share = tuple[float, float]


def assign_owners(
    costs: Sequence[MatrixCost],
    world_size: int,
    borne: Sequence[tuple[int, MatrixCost]] = (),
) -> list[int]:
    """An owner for each matrix, so that the most loaded rank has least to do.

    A rank's load is the larger of its share of the work (per step, refreshes spread
    over their period) and its share of the state. Matrices are placed heaviest first
    on the least loaded rank (longest processing time first); then up to two matrices
    are moved or swapped while the most loaded rank gains. If bases are not all made in
    one step, matrices of the same cost then exchange their owners, so that in no step
    one rank has most of them to make.

    Args:
        costs: What each matrix costs.
        world_size: Number of ranks.
        borne: Owner and cost of the matrices that have an owner already.

    Returns:
        The owner of each matrix. Equal inputs give equal outputs.
    """
    loads = _Loads(costs, world_size, borne)
    for i in sorted(range(len(costs)), key=lambda i: (-max(loads.weights[i]), i)):
        loads.apply(((i, loads.least_after(i)),))
    for _ in range(4 * len(costs)):
        worst = loads.worst()
        # The margin keeps rounding from moving a matrix back and forth.
        best, chosen = loads.of(worst) * (1.0 - 1e-9), None
        for change in _changes(loads, worst):
            after = loads.worst_after(change)
            if after < best:
                best, chosen = after, change
        if chosen is None:
            break
        loads.apply(chosen)
    if any(cost.slots.count > 1 for cost in costs):
        return _apart_in_time(costs, loads.owners, borne)
    return loads.owners


class RefreshLoads:
    """What the bases that each rank computes take, in all and in each slot.

    Args:
        borne: Ranks and the costs of matrices whose bases they compute.
    """

    def __init__(self, borne: Iterable[tuple[int, MatrixCost]] = ()) -> None:
        self._total: Counter[int] = Counter()
        self._then: Counter[tuple[int, When]] = Counter()
        for rank, cost in borne:
            self.add(rank, cost)

    def add(self, rank: int, cost: MatrixCost) -> None:
        """A rank computes the bases of a matrix, or of several."""
        self._total[rank] += cost.refresh
        for when, part in cost.slots.shares(cost.refresh):
            self._then[rank, when] += part

    def then(self, rank: int, cost: MatrixCost) -> int:
        """What else a rank computes in the step in which a matrix is refreshed."""
        return self._then[rank, cost.slots.only]

    def least(self, ranks: Iterable[int], cost: MatrixCost) -> int:
        """Who of some ranks shall compute the basis of a matrix.

        Args:
            ranks: The ranks.
            cost: The matrix's.

        Returns:
            The rank with least to compute in the same step; of equals the one with
            least in all, then the first.
        """
        return min(ranks, key=lambda r: (self.then(r, cost), self._total[r], r))


def _apart_in_time(
    costs: Sequence[MatrixCost],
    owners: Sequence[int],
    borne: Sequence[tuple[int, MatrixCost]],
) -> list[int]:
    """Exchange the owners of matrices of the same cost, slot by slot."""
    loads, found = RefreshLoads(borne), list(owners)
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, cost in enumerate(costs):
        kind = cost.refresh, cost.refresh_every or 0, cost.step, cost.state_bytes
        alike.setdefault(kind, []).append(i)
    for _, which in sorted(alike.items(), reverse=True):
        places = Counter(owners[i] for i in which)
        for i in sorted(which, key=lambda i: (costs[i].slots.only, i)):
            # Who has most of them left has most choice later.
            order = ((loads.then(r, costs[i]), -left, r) for r, left in places.items())
            *_, found[i] = min(order)
            loads.add(found[i], costs[i])
            places.subtract([found[i]])
            if not places[found[i]]:
                del places[found[i]]
    return found


class _Loads:
    """Shares of work and of state bytes that each rank bears so far.

    Ranks that bear the same are looked at together, so that thousands without any
    matrix cost as much as one.
    """

    def __init__(
        self,
        costs: Sequence[MatrixCost],
        world_size: int,
        borne: Sequence[tuple[int, MatrixCost]],
    ) -> None:
        everything = [*costs, *(cost for _, cost in borne)]
        work = sum(c.per_step for c in everything) or 1.0
        state = sum(c.state_bytes for c in everything) or 1.0
        self.weights = [(c.per_step / work, c.state_bytes / state) for c in costs]
        self.shares = [(0.0, 0.0)] * world_size
        self.owned: list[list[int]] = [[] for _ in range(world_size)]
        self.owners = [-1] * len(costs)
        for rank, cost in borne:
            given = cost.per_step / work, cost.state_bytes / state
            self.shares[rank] = _sum(self.shares[rank], given, 1)
        self.alike: dict[Share, set[int]] = {}
        for rank, share in enumerate(self.shares):
            self.alike.setdefault(share, set()).add(rank)

    def of(self, rank: int) -> float:
        return max(self.shares[rank])

    def worst(self) -> int:
        """The most loaded rank, the first of several."""
        top = max(max(share) for share in self.alike)
        return min(min(r) for share, r in self.alike.items() if max(share) == top)

    def least_after(self, i: int) -> int:
        """The rank that would have the least load if it owned a matrix too."""
        after = {share: max(_sum(share, self.weights[i], 1)) for share in self.alike}
        least = min(after.values())
        return min(min(self.alike[s]) for s, load in after.items() if load == least)

    def after(self, rank: int, changes: Sequence[tuple[int, int]]) -> float:
        """A rank's load if matrices came (+1) or went (-1)."""
        return max(
            self.shares[rank][k] + sum(sign * self.weights[i][k] for i, sign in changes)
            for k in (0, 1)
        )

    def worst_after(self, change: Change) -> float:
        """The larger load of the ranks that a change touches."""
        touched: dict[int, list[tuple[int, int]]] = {}
        for i, rank in change:
            touched.setdefault(rank, []).append((i, 1))
            touched.setdefault(self.owners[i], []).append((i, -1))
        return max(self.after(rank, changes) for rank, changes in touched.items())

    def apply(self, change: Change) -> None:
        for i, rank in change:
            if self.owners[i] >= 0:
                self._bear(self.owners[i], i, -1)
                self.owned[self.owners[i]].remove(i)
            self._bear(rank, i, 1)
            bisect.insort(self.owned[rank], i)
            self.owners[i] = rank

    def _bear(self, rank: int, i: int, sign: int) -> None:
        old = self.shares[rank]
        self.alike[old].remove(rank)
        if not self.alike[old]:
            del self.alike[old]
        self.shares[rank] = new = _sum(old, self.weights[i], sign)
        self.alike.setdefault(new, set()).add(rank)


def _sum(share: Share, weight: Share, sign: int) -> Share:
    return share[0] + sign * weight[0], share[1] + sign * weight[1]


def _changes(loads: _Loads, worst: int) -> Iterator[Change]:
    """Up to two matrices of a rank against up to two of another's."""
    given = _handfuls(loads, loads.owned[worst])
    seen = set()
    for rank, others in enumerate(loads.owned):
        # Ranks that own the same kinds of matrices are interchangeable, too.
        kind = tuple(sorted(loads.weights[j] for j in others))
        if rank == worst or kind in seen:
            continue
        seen.add(kind)
        for taken in [(), *_handfuls(loads, others)]:
            for give in given:
                yield *((i, rank) for i in give), *((j, worst) for j in taken)


def _handfuls(loads: _Loads, matrices: Sequence[int]) -> list[tuple[int, ...]]:
    """One or two of the matrices; those of equal weight count as the same."""
    kinds: dict[tuple[Share, ...], tuple[int, ...]] = {}
    for size in (1, 2):
        for some in itertools.combinations(matrices, size):
            kinds.setdefault(tuple(loads.weights[i] for i in some), some)
    return list(kinds.values())
