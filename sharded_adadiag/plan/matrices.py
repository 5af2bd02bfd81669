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
    team_route,
)
from sharded_adadiag.plan.teams import Demand, Team, choose_teams


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
        divisible: Its lines are independent of each other, so that a step may work on
            some of them at a time: one side is rotated, and the rule asks for no sum.
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
    divisible: bool = False

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

    def shares(self) -> list[tuple[int, MatrixCost]]:
        """What each rank that works on the matrix bears of its work and state."""
        whole = self.cost.step, max(self.view.numel, 1)
        moments = self.route.moments.layout
        shares = []
        for rank in self.route.team:
            step = whole[0] * moments[rank].numel // whole[1]
            refresh = self.cost.refresh if rank == self.route.owner else 0
            every, state = self.cost.refresh_every, self.state_bytes(rank)
            shares.append((rank, MatrixCost(step, refresh, every, state)))
        return shares

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
    ranks_per_node: int | None = None,
) -> list[MatrixPlan]:
    """Plan every parameter that must be seen as a whole matrix.

    Args:
        facts: Of all parameters.
        layouts: Where the entries of each are.
        method: The optimizer.
        world_size: Number of ranks.
        distribution: ``"auto"``, ``"owner"`` or ``"broadcast"``.
        first_index: Position of the first parameter in the optimizer.
        planned: The plans made before, which weigh on their ranks.
        ranks_per_node: Consecutive ranks that share a node; None for all.

    Returns:
        The plans, equal on every rank.
    """
    drafts = []
    for i, (fact, layout) in enumerate(zip(facts, layouts)):
        if needs_matrix(method, fact.shape, fact.options):
            drafts.append(_Draft.of(first_index + i, fact, layout, method))
    routes: dict[int, Route] = {}
    if distribution != "owner":
        routes = _broadcast(drafts, world_size, distribution)
    plans = {d.index: d.plan(routes[d.index]) for d in drafts if d.index in routes}
    borne = [share for plan in (*planned, *plans.values()) for share in plan.shares()]
    rest = [d for d in drafts if d.index not in plans]
    if distribution == "auto":
        chosen = choose_teams(
            [d.demand() for d in rest],
            world_size,
            borne,
            ranks_per_node=ranks_per_node,
        )
    else:
        owners = assign_owners([d.cost for d in rest], world_size, borne)
        chosen = [Team.of_one(owner) for owner in owners]
    for draft, team in zip(rest, chosen):
        plans[draft.index] = draft.plan(draft.team_route(team))
    return [plans[draft.index] for draft in drafts]


def _broadcast(
    drafts: Sequence[_Draft], world_size: int, distribution: str
) -> dict[int, Route]:
    """The routes of the matrices on which all ranks work, by index."""
    candidates = [draft.candidate() for draft in drafts]
    kinds = choose(candidates, world_size) if distribution == "auto" else None
    decompose = [0] * world_size
    routes = {}
    for i, (draft, candidate) in enumerate(zip(drafts, candidates)):
        if candidate.broadcast and (kinds is None or kinds[i] == "broadcast"):
            # Who has least to decompose so far computes its bases.
            head = min(range(world_size), key=lambda rank: (decompose[rank], rank))
            decompose[head] += draft.cost.refresh
            routes[draft.index] = dataclasses.replace(candidate.broadcast, owner=head)
    return routes


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
    divisible: bool

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
        divisible = not method.factored and options.noise_floor == 0 and left != right
        return cls(
            index, fact, matrix, left, right, cost, rotation_bytes, moments, divisible
        )

    @property
    def two_sided_reproject(self) -> bool:
        """Whether a refresh mixes both dimensions of the moments."""
        return self.left and self.right and self.fact.options.on_refresh == "reproject"

    def candidate(self) -> Candidate:
        options = self.fact.options
        alone = len(self.view.layout) == 1
        obstacle = broadcast_obstacle(
            self.view, two_sided_reproject=self.two_sided_reproject
        )
        other = None
        if not alone and not obstacle:
            other = broadcast_route(
                self.view, 0, left=self.left, right=self.right, basis=options.basis
            )
        return Candidate(
            self.view,
            other,
            self.rotation_bytes,
            self.cost.state_bytes,
            options.refresh_every,
        )

    def demand(self) -> Demand:
        rows, cols = self.view.rows, self.view.cols
        lines = min(rows, cols) if self.left and self.right else rows
        if self.left and not self.right:
            lines = cols
        if self.two_sided_reproject:
            lines = 1
        return Demand(self.cost, lines, self.rotation_bytes)

    def team_route(self, team: Team) -> Route:
        sides = {"left": self.left, "right": self.right}
        if len(team.ranks) == 1:
            return owner_route(self.view, team.head, **sides)
        return team_route(self.view, team.ranks, team.head, **sides)

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
            self.divisible,
        )
