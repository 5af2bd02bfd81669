"""What each rank works on in which round, under a bound on the bytes of a round.

Every rank has blocks of matrices to work on. Lines of some are independent of each
other and may be cut over rounds; the others are worked on whole, by all of their team
in one round. Rounds fill evenly when every rank takes about as much as it can in each:

* what stays whole goes, heaviest first, to the round in which its team has done least;
* what is cut is poured in, a round's room at a time, in order of falling work per byte,
  so that all ranks do about as much in a round as their bytes are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from sharded_adadiag.plan.items import Blocks, Item, Packing
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.pouring import FEWEST_LINES, pour
from sharded_adadiag.plan.regions import Box
from sharded_adadiag.plan.storing import most_stored

# How much of the limit a rank works on in a round, in percent. The less it is, the
# less often a rank waits for one that sends to others already, but the more rounds
# there are.
FILL_PERCENT = 100, 60, 40, 28, 20
# Among more ranks than this, several always ask one at a time: the first fills of
# those above fail, so they are not tried.
MANY_RANKS = 16
MANY_FILL_PERCENT = 40, 24
# Of the efficiency that the balance of the ranks allows.
ENOUGH = 0.93


def pack(
    matrices: Sequence[MatrixPlan], world_size: int, limit: int
) -> tuple[list[dict[int, Blocks]], list[int]]:
    """Rounds in which no rank sends or receives more than a limit, where possible.

    Args:
        matrices: All of them.
        world_size: Number of ranks.
        limit: Bytes.

    Returns:
        The blocks of each round, and the most that a rank sends or receives in it.
    """
    items = _items(matrices)
    may = {
        i
        for i, m in enumerate(matrices)
        if m.divisible and len(m.route.stages) == 2 and items[i].line_bytes
    }
    must = {
        i
        for i in may
        if max((items[i].nbytes(box) for box, _ in items[i].blocks), default=0) > limit
    }
    line = max((items[i].line_bytes for i in may), default=0)
    rooms = _rooms(limit, FEWEST_LINES * line, many=world_size > MANY_RANKS)
    tried = []
    for cut in (must, may) if must != may else (must,):
        for room in rooms if cut == may else (limit,):
            packing = _fill(items, cut, world_size, (room, limit))
            tried.append(packing)
            if packing.efficiency >= ENOUGH * packing.evenness:
                most = _most_bytes(matrices, items, packing)
                if max(most, default=0) <= limit or not cut:
                    return packing.rounds, most
    # Bytes take long to count, so only here of those that did not do.
    counted = [(packing, _most_bytes(matrices, items, packing)) for packing in tried]
    best, most = max(counted, key=lambda pair: _key(pair[0], pair[1], limit))
    return best.rounds, most


def _rooms(limit: int, least: int, *, many: bool) -> list[int]:
    """Bytes that a rank works on in a round, to be tried one after the other.

    Args:
        limit: The most.
        least: What it has in any case, as far as the limit allows.
        many: There are many ranks.

    Returns:
        Falling, each once.
    """
    percents = MANY_FILL_PERCENT if many else FILL_PERCENT
    rooms = (max(limit * percent // 100, least, 1) for percent in percents)
    return list(dict.fromkeys(min(room, limit) for room in rooms))


def _key(packing: Packing, most: Sequence[int], limit: int) -> tuple[int, float]:
    """Fewer rounds over the limit are better, and then more efficient ones."""
    return -sum(nbytes > limit for nbytes in most), packing.efficiency


def _most_bytes(
    matrices: Sequence[MatrixPlan], items: Sequence[Item], packing: Packing
) -> list[int]:
    """The most bytes that a rank sends or receives, by round."""
    worked = [max(used) for used in zip(*packing.used)]
    stored = [most_stored(matrices, items, blocks) for blocks in packing.rounds]
    return [max(pair) for pair in zip(worked, stored)]


def _items(matrices: Sequence[MatrixPlan]) -> list[Item]:
    """The items; the phases of those alike are spread evenly."""
    alike: dict[tuple[int, int], list[int]] = {}
    for i, m in enumerate(matrices):
        alike.setdefault((m.view.rows, m.view.cols), []).append(i)
    phases = {i: k / len(some) for some in alike.values() for k, i in enumerate(some)}
    return [Item.of(i, m, phases[i]) for i, m in enumerate(matrices)]


def _fill(
    items: Sequence[Item], cut: set[int], world_size: int, bounds: tuple[int, int]
) -> Packing:
    room, limit = bounds
    whole = [item for item in items if item.position not in cut]
    queues: list[list[tuple[Item, Box]]] = [[] for _ in range(world_size)]
    bytes_, alone = [0] * world_size, [0] * world_size
    for item in items:
        for block, ranks in item.blocks:
            for rank in ranks:
                nbytes = item.nbytes(block)
                if item.position in cut:
                    queues[rank].append((item, block))
                elif nbytes > room:
                    alone[rank] += 1
                    continue
                bytes_[rank] += nbytes
    count = max((n + -(-b // room) for n, b in zip(alone, bytes_)), default=0)
    count = max(count, 1)
    packing = Packing(
        [{} for _ in range(count)],
        [[0] * count for _ in range(world_size)],
        [[0.0] * count for _ in range(world_size)],
    )
    for item in sorted(whole, key=lambda item: (-_heaviest(item), item.position)):
        _place_whole(packing, item, room)
    pour(packing, queues, room, limit)
    return packing


def _heaviest(item: Item) -> float:
    return max((item.line_work * item.lines(box) for box, _ in item.blocks), default=0)


def _place_whole(packing: Packing, item: Item, room: int) -> None:
    """To the round in which its team has done least, if all of them have room."""
    takes = [
        (rank, item.nbytes(block), item.line_work * item.lines(block))
        for block, ranks in item.blocks
        for rank in ranks
    ]
    best, least = -1, 0.0
    for k in range(len(packing.rounds)):
        # What is over the bound by itself shares a round with nothing of its ranks.
        fits = all(
            not packing.used[rank][k] or packing.used[rank][k] + nbytes <= room
            for rank, nbytes, _ in takes
        )
        if fits:
            done = max((packing.work[r][k] + work for r, _, work in takes), default=0.0)
            if best < 0 or done < least:
                best, least = k, done
    if best < 0:
        best = len(packing.rounds)
        packing.add_round()
    packing.rounds[best][item.position] = None
    for rank, nbytes, work in takes:
        packing.used[rank][best] += nbytes
        packing.work[rank][best] += work
