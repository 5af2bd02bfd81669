"""What each rank works on in which round, under a bound on the bytes of a round.

Every rank has blocks of matrices to work on. Lines of some are independent of each
other and may be cut over rounds; the others are worked on whole, by all of their team
in one round. Rounds fill evenly when every rank takes about as much as it can in each:

* what stays whole goes, heaviest first, to the round in which its team has done least;
* what is cut is poured in, a round's room at a time, in order of falling work per byte,
  so that all ranks do about as much in a round as their bytes are equal.

A rank that stores rows sends rows: if all ranks began with the first rows of their
matrices, the first ranks would send everything. So each begins elsewhere, and goes
around. The same holds for the order of matrices that lie on few ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from sharded_adadiag.plan.geometry import Box, FlatRange, Ranks
from sharded_adadiag.plan.matrices import MatrixPlan

# Cuts are at multiples of these lines or fewer: products of odd widths are slower.
LINES = 64
# At least so many in a round, whatever its bound: narrower products cost much more.
FEWEST_LINES = 16
# A round's room is filled to within one of so many parts.
FINENESS = 16

# The blocks of one matrix in one round, by rank; None for all of it.
Blocks = dict[int, Box] | None


@dataclasses.dataclass(slots=True)
class Packing:
    """Rounds as they fill.

    Attributes:
        rounds: Of each, the blocks by position of the matrix.
        used: Bytes by rank and round.
        work: Multiply-adds by rank and round.
    """

    rounds: list[dict[int, Blocks]]
    used: list[list[int]]
    work: list[list[float]]

    @property
    def efficiency(self) -> float:
        """The mean rank's work over the sum of the rounds' most loaded ranks'."""
        busiest = sum(max(works) for works in zip(*self.work))
        mean = sum(map(sum, self.work)) / len(self.work)
        return mean / busiest if busiest else 1.0

    def add_round(self) -> None:
        """One more round, empty."""
        self.rounds.append({})
        for rank in range(len(self.used)):
            self.used[rank].append(0)
            self.work[rank].append(0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One matrix as a packing sees it.

    Attributes:
        position: In the list of matrices.
        blocks: What each rank works on.
        by_rows: The lines are rows.
        line_bytes: The most that a rank sends or receives for one line.
        line_work: Multiply-adds of a step for one line.
        origin: Where its storage begins, as a share of all ranks.
        phase: Where a team of several begins in its blocks, as a share of them.
    """

    position: int
    blocks: tuple[tuple[Box, Ranks], ...]
    by_rows: bool
    line_bytes: int
    line_work: float
    origin: float
    phase: float

    @classmethod
    def of(cls, position: int, matrix: MatrixPlan, phase: float) -> Item:
        """The item of a matrix."""
        view, moments = matrix.view, matrix.route.moments
        by_rows = moments.split == "rows" or (matrix.right and not matrix.left)
        lines, length = view.rows, view.cols
        if not by_rows:
            lines, length = length, lines
        # Every holder of a piece is sent its update.
        copies = max((len(ranks) for _, ranks in view.layout.pieces), default=1)
        moves = len(matrix.route.stages) > 1
        first = view.layout.pieces[0][1][0] if view.layout.pieces else 0
        return cls(
            position,
            tuple((b, r) for b, r in moments.layout.pieces if isinstance(b, Box)),
            by_rows,
            length * view.work_itemsize * copies * moves,
            matrix.cost.step / lines,
            first / len(view.layout),
            phase,
        )

    def lines(self, block: Box) -> int:
        """Lines of a block."""
        return block.shape[0 if self.by_rows else 1]

    def nbytes(self, block: Box) -> int:
        """Bytes that a rank sends or receives for a block."""
        return self.lines(block) * self.line_bytes

    def slice(self, block: Box, start: int, stop: int) -> Box:
        """Some lines of a block."""
        top, left = block.row_start, block.col_start
        if self.by_rows:
            return Box(top + start, top + stop, left, block.col_stop)
        return Box(top, block.row_stop, left + start, left + stop)


def pack(
    matrices: Sequence[MatrixPlan], world_size: int, limit: int
) -> tuple[Packing, list[int]]:
    """Rounds in which no rank sends or receives more than a limit, where possible.

    Args:
        matrices: All of them.
        world_size: Number of ranks.
        limit: Bytes.

    Returns:
        The packing, and of each round the most that a rank sends or receives.
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
    best = _within(matrices, items, must, world_size, limit)
    if must != may and best[0].efficiency < 0.95:
        finer = _within(matrices, items, may, world_size, limit)
        if finer[0].efficiency > best[0].efficiency:
            best = finer
    return best


def _items(matrices: Sequence[MatrixPlan]) -> list[Item]:
    """The items; the phases of those alike are spread evenly."""
    alike: dict[tuple[int, int], list[int]] = {}
    for i, m in enumerate(matrices):
        alike.setdefault((m.view.rows, m.view.cols), []).append(i)
    phases = {i: k / len(some) for some in alike.values() for k, i in enumerate(some)}
    return [Item.of(i, m, phases[i]) for i, m in enumerate(matrices)]


def _within(
    matrices: Sequence[MatrixPlan],
    items: Sequence[Item],
    cut: set[int],
    world_size: int,
    limit: int,
) -> tuple[Packing, list[int]]:
    """Pack with less in a round until those who store the matrices send no more."""
    room = limit
    for _ in range(5):
        packing = _fill(items, cut, world_size, room)
        most = _most_bytes(matrices, items, packing)
        worst = max(most, default=0)
        if worst <= limit or not cut:
            break
        room = room * limit // (worst + worst // 16)
    return packing, most


def _fill(items: Sequence[Item], cut: set[int], world_size: int, room: int) -> Packing:
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
    for rank, queue in enumerate(queues):
        share = rank / world_size
        queue.sort(key=lambda entry: _turn(entry[0], share))
        _pour(packing, rank, queue, room)
    return packing


def _heaviest(item: Item) -> float:
    return max((item.line_work * item.lines(box) for box, _ in item.blocks), default=0)


def _turn(item: Item, share: float) -> tuple[float, bool, float, int]:
    """The order in which a rank works on what it may cut."""
    intensity = item.line_work / item.line_bytes
    away = (item.origin - share) % 1.0
    return -intensity, item.by_rows, away, item.position


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


def _pour(
    packing: Packing, rank: int, queue: Sequence[tuple[Item, Box]], room: int
) -> None:
    """Fill the rounds' room one after another."""
    used, work = packing.used[rank], packing.work[rank]
    k = poured = 0
    for item, block in queue:
        lines = item.lines(block)
        first = _first_line(item, block, rank / len(packing.used), poured, room)
        # Up to the end, and then what lies before the first.
        for start, stop in ((first, lines), (0, first)):
            while start < stop:
                if k == len(packing.rounds):
                    packing.add_round()
                taken = _lines_that_fit(item, room, used[k], stop - start)
                if taken and item.position not in packing.rounds[k]:
                    packing.rounds[k][item.position] = {}
                blocks = packing.rounds[k].get(item.position)
                if not taken or (blocks is not None and rank in blocks):
                    k += 1  # no room, or the round has lines of the block already
                    continue
                assert blocks is not None
                blocks[rank] = item.slice(block, start, start + taken)
                used[k] += taken * item.line_bytes
                work[k] += taken * item.line_work
                start += taken
                poured += taken * item.line_bytes


def _lines_that_fit(item: Item, room: int, used: int, left: int) -> int:
    """Lines for a round with so many bytes used; all that is left if there is room."""
    fit = max(room - used, 0) // item.line_bytes
    if not used:
        fit = max(fit, FEWEST_LINES)
    if fit >= left:
        return left
    step = _step(item, room)
    return fit // step * step


def _step(item: Item, room: int) -> int:
    """Cuts are at multiples of this power of two."""
    step = LINES
    while step > 1 and step * item.line_bytes * FINENESS > room:
        step //= 2
    return step


def _first_line(item: Item, block: Box, share: float, poured: int, room: int) -> int:
    """Where a rank begins in a block of rows.

    At each moment the ranks are at different rows, evenly spaced. The end of the block
    falls on the end of a round.
    """
    lines = item.lines(block)
    a_round = room // item.line_bytes
    step = _step(item, room)
    a_round = a_round // step * step
    if not item.by_rows or a_round < 1 or lines <= a_round:
        return 0
    if len(item.blocks) > 1:
        share = item.phase
    wanted = (share + poured / (lines * item.line_bytes)) % 1.0 * lines
    in_this = (room - poured % room) // item.line_bytes // step * step
    rounds = round((lines - in_this - wanted) / a_round)
    return max(lines - in_this - rounds * a_round, 0) % lines


def _most_bytes(
    matrices: Sequence[MatrixPlan], items: Sequence[Item], packing: Packing
) -> list[int]:
    """Of each round, the most that a rank sends or receives."""
    worked = [max(used) for used in zip(*packing.used)]
    stored = [_stored(matrices, items, blocks) for blocks in packing.rounds]
    return [max(pair) for pair in zip(worked, stored)]


def _stored(
    matrices: Sequence[MatrixPlan], items: Sequence[Item], some: Mapping[int, Blocks]
) -> int:
    """The most that a rank has stored of a round's blocks, in bytes."""
    # Columns of matrices that lie alike add up.
    shares: dict[int, tuple[MatrixPlan, float]] = {}
    held: dict[int, float] = {}
    for i, blocks in some.items():
        matrix, item = matrices[i], items[i]
        if len(matrix.route.stages) < 2:
            continue
        layout, cols = matrix.view.layout, matrix.view.cols
        if blocks is None or not item.by_rows:
            share = 1.0
            if blocks is not None:
                share = sum(map(item.lines, blocks.values())) / cols
            so_far = shares.get(id(layout), (matrix, 0.0))[1]
            size = matrix.view.work_itemsize
            shares[id(layout)] = matrix, so_far + share * size
            continue
        for block in blocks.values():
            wanted = FlatRange(block.row_start * cols, block.row_stop * cols)
            for _, region, ranks in layout.overlapping(wanted, cols):
                for rank in ranks:
                    nbytes = region.numel * matrix.view.work_itemsize
                    held[rank] = held.get(rank, 0.0) + nbytes
    for matrix, share in shares.values():
        for piece, ranks in matrix.view.layout.pieces:
            for rank in ranks:
                held[rank] = held.get(rank, 0.0) + piece.numel * share
    return int(max(held.values(), default=0.0))
