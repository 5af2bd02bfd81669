"""When each matrix gets a new basis.

With ``refresh_slots=K`` the matrices are refreshed in K portions, the *slots* of a
period, instead of all in one step: every T steps, as without, but slot s
``floor(s T / K)`` steps after slot 0. The slot of a matrix follows from the list of
parameters alone, so that a run is the same on every number of ranks: of what has the
same K, matrices go one by one to the slot with least to decompose so far, those that
take longest first.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping, Sequence

# K, and a slot.
When = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    """The slots of some matrices that are planned as one.

    Attributes:
        count: K, the slots of a period.
        taken: Each slot that any of them has, with the positions of those that have it.
    """

    count: int
    taken: tuple[tuple[int, Sequence[int]], ...]

    @classmethod
    def of(cls, count: int, each: Sequence[int]) -> Slots:
        """The slots of matrices.

        Args:
            count: K.
            each: The slot of each.

        Returns:
            The same, by slot.
        """
        by_slot: dict[int, list[int]] = {}
        for position, slot in enumerate(each):
            by_slot.setdefault(slot, []).append(position)
        return cls(count, tuple((s, tuple(some)) for s, some in by_slot.items()))

    @classmethod
    def one(cls, matrices: int) -> Slots:
        """The slots of so many matrices that are refreshed all at once."""
        return cls(1, ((0, range(matrices)),))

    @property
    def only(self) -> When:
        """When one matrix, or several of one slot, are refreshed."""
        ((slot, _),) = self.taken
        return self.count, slot

    def shares(self, amount: int) -> list[tuple[When, int]]:
        """What of an amount falls to each slot, if all matrices have as much of it.

        Args:
            amount: Of all matrices.

        Returns:
            When, and how much.
        """
        total = sum(len(some) for _, some in self.taken)
        return [
            ((self.count, slot), amount * len(some) // total)
            for slot, some in self.taken
        ]


def slot_weight(rows: int, cols: int, *, left: bool, right: bool) -> int:
    """How long a matrix takes to decompose, as far as slots are concerned.

    In multiply-adds as in `plan.cost`, for an SVD of the short side and a QR of the
    long one. It depends on nothing that may change in a run or between versions,
    because slots decide numbers.

    Args:
        rows: Number of rows of the matrix.
        cols: Number of columns of the matrix.
        left: P is computed.
        right: Q is computed.

    Returns:
        A weight; 0 if no side is rotated.
    """
    longest = max(rows if left else 0, cols if right else 0)
    if not longest:
        return 0
    short, long = sorted((rows, cols))
    null_space = short * long * long if longest > short else 0
    return short * short * (16 * short + long) + null_space


def give_slots(
    matrices: Sequence[tuple[int, int]], borne: Mapping[When, int]
) -> list[int]:
    """Give each matrix its slot by the rule of this module.

    Args:
        matrices: K and weight of each.
        borne: The weight of those that have slots already.

    Returns:
        The slots.
    """
    heaps: dict[int, list[tuple[int, int]]] = {}
    slots = [0] * len(matrices)
    for i in sorted(range(len(matrices)), key=lambda i: (-matrices[i][1], i)):
        count, weight = matrices[i]
        if count not in heaps:
            heaps[count] = [(borne.get((count, s), 0), s) for s in range(count)]
            heapq.heapify(heaps[count])
        least, slots[i] = heaps[count][0]
        heapq.heapreplace(heaps[count], (least + weight, slots[i]))
    return slots
