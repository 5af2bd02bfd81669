"""What is planned of one matrix: what each rank computes, keeps and sends of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from sharded_adadiag.algorithm.spec import StateSpec
from sharded_adadiag.plan.cost import MatrixCost
from sharded_adadiag.plan.layout import MatrixLayout
from sharded_adadiag.plan.regions import Box
from sharded_adadiag.plan.route import Route
from sharded_adadiag.plan.view import Share


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixPlan:
    """One matrix's part of the plan, or that of some alike of a stack on one owner.

    Attributes:
        index: Position of the parameter in the optimizer.
        view: What is stored and moved, and where it is stored. Several matrices of a
            stack are moved as one, whose rows may be whole matrices.
        shape: Rows and columns of the matrix, or of each.
        share: Which of the parameter's matrices.
        left: P is applied.
        right: Q is applied.
        cost: Work and state.
        route: How it is computed.
        moment_dtype: Dtype of the stored moments.
        rotation_dtype: Dtype of the stored rotations.
        work_dtype: Dtype of the computation and of the update.
        states: What is kept of it, by key.
        basis_from: What its bases are made of: the option of its group.
        divisible: Its lines are independent of each other, so that a step may work on
            some of them at a time: one side is rotated, and the rule asks for no sum.
        key: Position of the parameter, and of the first matrix among its own.
    """

    index: int
    view: MatrixLayout
    shape: tuple[int, int]
    share: Share
    left: bool
    right: bool
    cost: MatrixCost
    route: Route
    moment_dtype: torch.dtype
    rotation_dtype: torch.dtype
    work_dtype: torch.dtype
    states: Mapping[str, StateSpec]
    basis_from: str = "gradient"
    divisible: bool = False
    key: tuple[int, int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (self.index, self.share.first))

    def __hash__(self) -> int:
        return hash(self.key)

    def name(self, position: int) -> str:
        """The name of one of several matrices."""
        if self.share.count == 1:
            return self.view.name
        stack = self.view.name[: self.view.name.rindex("[")]
        return f"{stack}[{self.share.first + position}]"

    @property
    def held(self) -> bool:
        """Whether its owner alone stores it, so that nothing is moved."""
        return self.route.kind == "owner" and len(self.route.stages) == 1

    @property
    def rotated(self) -> bool:
        """Whether any side is rotated."""
        return self.left or self.right

    def made_of(self, basis: str) -> tuple[str, ...]:
        """What travels to the head for a basis of what no rank has whole.

        Args:
            basis: The option of its group.

        Returns:
            ``"gram"`` for the sum of the Gram matrices of the ranks' blocks, averages
            included, or ``"gradient"``; then the keys of states.
        """
        by_gram = self.route.basis_from == "gram"
        if self.basis_from == "gram" and by_gram:
            return ("gram",)
        return ("gram" if by_gram and basis == "eigh" else "gradient", *self.gathered)

    @property
    def gathered(self) -> tuple[str, ...]:
        """The states that the head gets for a basis, besides this step's gradient."""
        if self.basis_from == "momentum":
            return ("exp_avg",)
        return tuple(key for key, spec in self.states.items() if spec.kept == "sum")

    @property
    def refresh_bytes(self) -> int:
        """What the head gets for a basis, at most."""
        states = self.state_shapes(self.route.owner)
        kept = sum(
            math.prod(self.states[key].shape(self.shape, self.shape))
            * states[key][1].itemsize
            for key in self.gathered
        )
        return self.view.numel * self.view.work_itemsize + kept

    def state_shapes(self, rank: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what a rank keeps; placeholders have no entries.

        Args:
            rank: The rank.

        Returns:
            The same keys for every rank. Of a stack's states the first dimension
            counts the matrices.
        """
        holds = self.route.holds_rotations(rank)
        many: tuple[int, ...] = ()
        block = whole = copied = self.shape
        if self.share.kind == "stack":
            many = (self.share.count * holds,)
        else:
            region = self.route.moments.layout[rank]
            assert isinstance(region, Box)
            block, copied = region.shape, self.shape if holds else (0, 0)
            whole = self.shape if rank == self.route.owner else (0, 0)
        dtypes = self.moment_dtype, self.rotation_dtype
        return {
            key: (
                (*many, *spec.shape(block, whole if spec.kept == "head" else copied)),
                spec.dtype(*dtypes),
            )
            for key, spec in self.states.items()
        }

    def shares(self) -> list[tuple[int, MatrixCost]]:
        """What each rank that works on the matrix bears of its work and state."""
        whole = self.cost.step, max(self.view.numel, 1)
        moments = self.route.moments.layout
        shares = []
        for rank in self.route.team:
            step = whole[0] * moments[rank].numel // whole[1]
            refresh = self.cost.refresh if rank == self.route.owner else 0
            every, state = self.cost.refresh_every, self.state_bytes(rank)
            cost = MatrixCost(step, refresh, every, state, self.cost.slots)
            shares.append((rank, cost))
        return shares

    def state_bytes(self, rank: int) -> int:
        """Bytes of moments and rotations on a rank."""
        return sum(
            math.prod(shape) * dtype.itemsize
            for shape, dtype in self.state_shapes(rank).values()
        )
