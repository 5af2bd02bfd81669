"""Which rank owns which matrix: balanced in work and in bytes of state."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from sharded_adadiag.plan.cost import MatrixCost

# A change of owners: (matrix, new owner) pairs.
Change = tuple[tuple[int, int], ...]


def assign_owners(
    costs: Sequence[MatrixCost],
    allowed: Sequence[Sequence[int]],
    world_size: int,
    borne: Sequence[tuple[int, MatrixCost]] = (),
) -> list[int]:
    """An owner for each matrix, so that the most loaded rank has least to do.

    A rank's load is the larger of its share of the work (per step, refreshes spread
    over their period) and its share of the state. Matrices are placed heaviest first
    on the least loaded rank that may own them (longest processing time first); then
    up to two matrices are moved or swapped while the most loaded rank gains.

    Args:
        costs: Of each matrix.
        allowed: The ranks that may own each.
        world_size: Number of ranks.
        borne: Owner and cost of the matrices that have an owner already.

    Returns:
        The owner of each matrix. Equal inputs give equal outputs.
    """
    loads = _Loads(costs, world_size, borne)
    for i in sorted(range(len(costs)), key=lambda i: (-max(loads.weights[i]), i)):
        loads.apply((
            (i, min(allowed[i], key=lambda r: (loads.after(r, [(i, 1)]), r))),
        ))
    for _ in range(4 * len(costs)):
        worst = max(range(world_size), key=lambda r: (loads.of(r), -r))
        # The margin keeps rounding from moving a matrix back and forth.
        best, chosen = loads.of(worst) * (1.0 - 1e-9), None
        for change in _changes(loads, worst, allowed):
            after = loads.worst_after(change)
            if after < best:
                best, chosen = after, change
        if chosen is None:
            break
        loads.apply(chosen)
    return loads.owners


class _Loads:
    """Shares of work and of state bytes that each rank bears so far."""

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
        self.shares = [[0.0, 0.0] for _ in range(world_size)]
        for rank, cost in borne:
            self.shares[rank][0] += cost.per_step / work
            self.shares[rank][1] += cost.state_bytes / state
        self.owners = [-1] * len(costs)

    def of(self, rank: int) -> float:
        return max(self.shares[rank])

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
            for k in (0, 1):
                if self.owners[i] >= 0:
                    self.shares[self.owners[i]][k] -= self.weights[i][k]
                self.shares[rank][k] += self.weights[i][k]
            self.owners[i] = rank


def _changes(
    loads: _Loads, worst: int, allowed: Sequence[Sequence[int]]
) -> Iterator[Change]:
    """Up to two matrices of a rank against up to two of another's."""
    owned: dict[int, list[int]] = {}
    for i, owner in enumerate(loads.owners):
        owned.setdefault(owner, []).append(i)
    given = _handfuls(loads, owned.get(worst, []))
    seen = set()
    for rank in range(len(loads.shares)):
        others = owned.get(rank, [])
        # Ranks that own the same kinds of matrices are interchangeable, too.
        kind = tuple(sorted(loads.weights[j] for j in others))
        if rank == worst or kind in seen:
            continue
        seen.add(kind)
        for taken in [(), *_handfuls(loads, others)]:
            if any(worst not in allowed[j] for j in taken):
                continue
            for give in given:
                if all(rank in allowed[i] for i in give):
                    yield (
                        *((i, rank) for i in give),
                        *((j, worst) for j in taken),
                    )


def _handfuls(loads: _Loads, matrices: Sequence[int]) -> list[tuple[int, ...]]:
    """One or two of the matrices; those of equal weight count as the same."""
    kinds: dict[tuple[tuple[float, float], ...], tuple[int, ...]] = {}
    for size in (1, 2):
        for some in itertools.combinations(matrices, size):
            kinds.setdefault(tuple(loads.weights[i] for i in some), some)
    return list(kinds.values())
