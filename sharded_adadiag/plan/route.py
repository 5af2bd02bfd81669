"""The distributions of the work: the stages a gradient passes.

`owner`: the full matrix on its owner, which applies both rotations. What works for
every layout, flat ranges included.

`team`: some ranks, each with an even block and a copy of the rotations. A rotation of
one side leaves the lines of the other independent, so it takes one stage; two sides
take two, row blocks for Q and then column blocks for P. Works for every layout, too.

`broadcast`: every rank has the rotations and its own block. A rotation mixes one
dimension, so its stage must hold that dimension whole: row blocks for Q, column
blocks for P. If that is how the matrix is stored the stage needs no hop. Replicas of a
piece divide it, so no work is done twice.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from sharded_adadiag.plan.blocks import even_blocks, spread, team_blocks
from sharded_adadiag.plan.geometry import Layout, Ranks, only_on
from sharded_adadiag.plan.layout import MatrixLayout, Storage

Kind = Literal["owner", "team", "broadcast"]
Split = Literal["none", "rows", "cols"]


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """One distribution of a matrix and what is done in it.

    Attributes:
        layout: The region of each rank.
        split: Which dimension the ranks' regions divide.
        left: P is applied here.
        right: Q is applied here.
    """

    layout: Layout
    split: Split
    left: bool = False
    right: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """The way of one matrix.

    Attributes:
        kind: Which distribution.
        team: The ranks that work on it and keep its rotations, in ascending order.
        owner: The head of the team, which computes its bases.
        stages: The first is the storage layout, the last holds the moments.
        basis_from: What the owner computes a basis from: the assembled
            ``"gradient"``, or the sum of the ranks' ``"gram"`` blocks.
    """

    kind: Kind
    team: Ranks
    owner: int
    stages: tuple[Stage, ...]
    basis_from: Literal["gradient", "gram"] = "gradient"

    @property
    def moments(self) -> Stage:
        """The stage in which the moments live."""
        return self.stages[-1]

    def raw(self, k: int) -> bool:
        """Whether hop k moves the gradient itself, not yet rotated."""
        return not any(stage.left or stage.right for stage in self.stages[: k + 1])

    def holds_rotations(self, rank: int) -> bool:
        """Whether a rank keeps a copy of the rotations."""
        return rank in self.team


def owner_route(matrix: MatrixLayout, owner: int, *, left: bool, right: bool) -> Route:
    """The owner computes everything on the full matrix."""
    layout = only_on(owner, matrix.rows, matrix.cols, len(matrix.layout))
    storage = Stage(matrix.layout, "none")
    team = range(owner, owner + 1)
    return Route("owner", team, owner, (storage, Stage(layout, "none", left, right)))


def held_route(matrix: MatrixLayout, owner: int, *, left: bool, right: bool) -> Route:
    """The route of an owner; if no other rank holds any of it nothing moves."""
    pieces = matrix.layout.pieces
    if len(pieces) == 1 and pieces[0][1] == range(owner, owner + 1):
        stage = Stage(matrix.layout, "none", left, right)
        return Route("owner", range(owner, owner + 1), owner, (stage,))
    return owner_route(matrix, owner, left=left, right=right)


def team_route(
    matrix: MatrixLayout, team: Ranks, head: int, *, left: bool, right: bool
) -> Route:
    """The ranks of a team rotate a block each.

    Args:
        matrix: The matrix's size and layout.
        team: At least two ascending ranks, no more than there are lines to divide.
        head: The one of them that computes the bases, from the assembled gradient.
        left: Whether P is applied.
        right: Whether Q is applied.

    Returns:
        The route.
    """
    assert len(team) > 1 and head in team
    ends = team, matrix.rows, matrix.cols, len(matrix.layout)
    stages = [Stage(matrix.layout, "none")]
    if right or not left:  # an unrotated factored rule works on any block
        stages.append(Stage(team_blocks(*ends, by_rows=True), "rows", right=right))
    if left:
        stages.append(Stage(team_blocks(*ends, by_rows=False), "cols", left=True))
    return Route("team", team, head, tuple(stages))


def broadcast_obstacle(matrix: MatrixLayout, *, two_sided_reproject: bool) -> str:
    """Why a matrix cannot take the broadcast route; empty if it can.

    Args:
        matrix: The matrix's size and layout.
        two_sided_reproject: It is rotated on both sides and its moments are
            re-expressed at a refresh: that mixes both dimensions, of which each
            rank has only one whole.

    Returns:
        The reason in a few words.
    """
    if matrix.storage is Storage.PIECES:
        return "its shards are not row or column blocks"
    if two_sided_reproject:
        return "reprojecting two sides needs the whole matrix"
    return ""


def broadcast_route(
    matrix: MatrixLayout, owner: int, *, left: bool, right: bool, basis: str
) -> Route:
    """Every rank rotates its own block.

    Args:
        matrix: The matrix's size and layout; see `broadcast_obstacle`.
        owner: The rank that computes the bases.
        left: Whether P is applied.
        right: Whether Q is applied.
        basis: ``"svd"`` or ``"eigh"``.

    Returns:
        The route.
    """
    world_size = len(matrix.layout)
    storage = matrix.storage
    rows = Stage(
        even_blocks(matrix.rows, matrix.cols, world_size, by_rows=True), "rows"
    )
    cols = Stage(
        even_blocks(matrix.rows, matrix.cols, world_size, by_rows=False), "cols"
    )
    # Replicas of a piece share its work: each takes a part of it, without a move, and
    # on the way back they exchange their parts of the update.
    first = Stage(matrix.layout, "none")
    whole = matrix.layout, matrix.rows, matrix.cols
    if storage is Storage.ROWS:
        rows = Stage(spread(*whole, by_rows=True), "rows")
    elif storage is Storage.COLS:
        cols = Stage(spread(*whole, by_rows=False), "cols")
    # A stage per rotation, the one that needs no hop first.
    order = [(rows, "right", right), (cols, "left", left)]
    if storage is Storage.COLS:
        order.reverse()
    work = [
        Stage(stage.layout, stage.split, left=side == "left", right=side == "right")
        for stage, side, wanted in order
        if wanted
    ]
    if not work:  # an unrotated factored rule works on any block
        work = [order[0][0]]
    stages = (*work,) if work[0].layout == first.layout else (first, *work)
    # Blocks that are whole on the one rotated side sum up to its Gram matrix.
    one_side_whole = storage is (Storage.ROWS if right else Storage.COLS)
    own_gram = basis == "eigh" and one_side_whole and left != right
    basis_from: Literal["gradient", "gram"] = "gram" if own_gram else "gradient"
    return Route("broadcast", range(world_size), owner, stages, basis_from)
