"""From parameters and options to a plan: what each rank computes, keeps and sends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from sharded_adadiag.algorithm.matrixize import matrix_shape
from sharded_adadiag.algorithm.state import (
    Rule,
    matrix_moments,
    moment_dtype,
    needs_matrix,
    rotated_sides,
    rotation_dtype,
)
from sharded_adadiag.options import Options
from sharded_adadiag.plan.cost import MatrixCost, refresh_cost, step_cost
from sharded_adadiag.plan.distribution import Candidate, choose
from sharded_adadiag.plan.geometry import Box, Layout
from sharded_adadiag.plan.layout import MatrixLayout
from sharded_adadiag.plan.ownership import assign_owners
from sharded_adadiag.plan.route import (
    Route,
    broadcast_obstacle,
    broadcast_route,
    owner_route,
)


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
    """What is the same on every rank about one parameter.

    Attributes:
        name: Its name, or its position as text.
        shape: Its logical shape.
        dtype: Its dtype.
        grad_dtype: Of its gradient, and of that on its way between ranks.
        options: Its group's options.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    options: Options

    @property
    def work_dtype(self) -> torch.dtype:
        """Of the computation: float32, or as wide as the parameter or its gradient."""
        widest = torch.promote_types(self.dtype, self.grad_dtype)
        return torch.promote_types(widest, torch.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixPlan:
    """One matrix's part of the plan.

    Attributes:
        index: Position of the parameter in the optimizer.
        view: Its matrix view and where it is stored.
        left: P is applied.
        right: Q is applied.
        cost: Work and state.
        route: How it is computed.
        moment_dtype: Of the stored moments.
        rotation_dtype: Of the stored rotations.
        work_dtype: Of the computation and of the update.
        moments: Names and dimensions of its moments.
    """

    index: int
    view: MatrixLayout
    left: bool
    right: bool
    cost: MatrixCost
    route: Route
    moment_dtype: torch.dtype
    rotation_dtype: torch.dtype
    work_dtype: torch.dtype
    moments: dict[str, tuple[str, ...]]

    def __hash__(self) -> int:
        return self.index

    @property
    def rotated(self) -> bool:
        """Whether any side is rotated."""
        return self.left or self.right

    def by_gram(self, basis: str) -> bool:
        """Whether a basis is computed from the sum of the ranks' Gram blocks.

        Args:
            basis: The option of its group.

        Returns:
            False if the gradient is assembled for it.
        """
        return basis == "eigh" and self.route.basis_from == "gram"

    def state_shapes(self, rank: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what a rank keeps; placeholders have no entries.

        Args:
            rank: The rank.

        Returns:
            The same keys for every rank.
        """
        region = self.route.moments.layout[rank]
        assert isinstance(region, Box)
        sizes = dict(zip("mn", region.shape))
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for key, dims in self.moments.items():
            shapes[key] = tuple(sizes[d] for d in dims), self.moment_dtype
        holds = self.route.holds_rotations(rank)
        for key, wanted, size in (
            ("rotation_left", self.left, self.view.rows),
            ("rotation_right", self.right, self.view.cols),
        ):
            if wanted:
                shapes[key] = (size, size) if holds else (0, 0), self.rotation_dtype
        return shapes

    def state_bytes(self, rank: int) -> int:
        """Bytes of moments and rotations on a rank."""
        return sum(
            math.prod(shape) * dtype.itemsize
            for shape, dtype in self.state_shapes(rank).values()
        )


def plan_matrices(
    facts: Sequence[ParamSpec],
    layouts: Sequence[Layout],
    *,
    method: Rule,
    world_size: int,
    distribution: str,
    first_index: int = 0,
    planned: Sequence[MatrixPlan] = (),
) -> list[MatrixPlan]:
    """Plan every parameter that must be seen as a whole matrix.

    Args:
        facts: Of all parameters.
        layouts: Where the entries of each are.
        method: The optimizer.
        world_size: Number of ranks.
        distribution: ``"auto"``, ``"owner"`` or ``"broadcast"``.
        first_index: Position of the first parameter in the optimizer.
        planned: The plans made before, which weigh on their owners.

    Returns:
        The plans, equal on every rank.
    """
    drafts = []
    for i, (fact, layout) in enumerate(zip(facts, layouts)):
        if needs_matrix(method, fact.shape, fact.options):
            drafts.append(_Draft.of(first_index + i, fact, layout, method))
    owners = assign_owners(
        [d.cost for d in drafts],
        world_size,
        [(plan.route.owner, plan.cost) for plan in planned],
    )
    candidates = [d.candidate(owner) for d, owner in zip(drafts, owners)]
    kinds = choose(candidates, world_size) if distribution == "auto" else None
    plans = []
    for i, (draft, candidate) in enumerate(zip(drafts, candidates)):
        kind = kinds[i] if kinds is not None else distribution
        wanted = candidate.broadcast if kind == "broadcast" else candidate.owner
        plans.append(draft.plan(wanted or candidate.owner))
    return plans


@dataclasses.dataclass(frozen=True, slots=True)
class _Draft:
    """A matrix before its owner is known."""

    index: int
    fact: ParamSpec
    view: MatrixLayout
    left: bool
    right: bool
    cost: MatrixCost
    rotation_bytes: int
    moments: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, index: int, fact: ParamSpec, layout: Layout, method: Rule) -> _Draft:
        options = fact.options
        rows, cols = matrix_shape(fact.shape)
        left, right = rotated_sides((rows, cols), options)
        sizes_of = fact.grad_dtype.itemsize, fact.work_dtype.itemsize
        matrix = MatrixLayout(fact.name, rows, cols, layout, *sizes_of)
        moments = matrix_moments(method, options)
        sizes = {"m": rows, "n": cols}
        moment_numel = sum(
            math.prod(sizes[d] for d in dims) for dims in moments.values()
        )
        rotation_numel = rows * rows * left + cols * cols * right
        rotation_bytes = rotation_numel * rotation_dtype(options, fact.dtype).itemsize
        moment_bytes = moment_numel * moment_dtype(options, fact.dtype).itemsize
        cost = MatrixCost(
            step_cost(rows, cols, left=left, right=right),
            refresh_cost(rows, cols, left=left, right=right, basis=options.basis),
            options.refresh_every,
            moment_bytes + rotation_bytes,
        )
        return cls(index, fact, matrix, left, right, cost, rotation_bytes, moments)

    def candidate(self, owner: int) -> Candidate:
        options = self.fact.options
        two_sided_reproject = (
            self.left and self.right and options.on_refresh == "reproject"
        )
        alone = len(self.view.layout) == 1
        obstacle = broadcast_obstacle(
            self.view, two_sided_reproject=two_sided_reproject
        )
        sides = {"left": self.left, "right": self.right}
        other = None
        if not alone and not obstacle:
            other = broadcast_route(self.view, owner, basis=options.basis, **sides)
        return Candidate(
            self.view,
            owner_route(self.view, owner, **sides),
            other,
            self.rotation_bytes,
            self.cost.state_bytes,
            options.refresh_every,
        )

    def plan(self, route: Route) -> MatrixPlan:
        options, dtype = self.fact.options, self.fact.dtype
        return MatrixPlan(
            self.index,
            self.view,
            self.left,
            self.right,
            self.cost,
            route,
            moment_dtype(options, dtype),
            rotation_dtype(options, dtype),
            self.fact.work_dtype,
            self.moments,
        )
