"""From parameters and options to matrices, and who works on each."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from sharded_adadiag.algorithm.spec import StateSpec
from sharded_adadiag.algorithm.state import (
    Rule,
    moment_dtype,
    rotated_sides,
    rotation_dtype,
)
from sharded_adadiag.options import Options
from sharded_adadiag.plan.cost import MatrixCost, refresh_cost, step_cost
from sharded_adadiag.plan.distribution import Candidate, choose
from sharded_adadiag.plan.geometry import Layout, cut_rows, reshaped
from sharded_adadiag.plan.layout import MatrixLayout
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.ownership import RefreshLoads, assign_owners
from sharded_adadiag.plan.route import (
    Route,
    broadcast_obstacle,
    broadcast_route,
    held_route,
    owner_route,
    team_route,
)
from sharded_adadiag.plan.schedule import Slots, When, give_slots, slot_weight
from sharded_adadiag.plan.spec import ParamSpec
from sharded_adadiag.plan.stacks import divide, runs
from sharded_adadiag.plan.teams import Demand, Team, choose_teams
from sharded_adadiag.plan.view import Share, needs_matrix


def plan_matrices(
    params: Sequence[ParamSpec],
    layouts: Sequence[Layout],
    *,
    rule: Rule,
    world_size: int,
    distribution: str,
    first_index: int = 0,
    planned: Sequence[MatrixPlan] = (),
    ranks_per_node: int | None = None,
) -> list[MatrixPlan]:
    """Plan every parameter that must be seen as a whole matrix.

    Args:
        params: What is equal on all ranks about each parameter.
        layouts: Where the entries of each are.
        rule: The optimizer.
        world_size: Number of ranks.
        distribution: ``"auto"``, ``"owner"`` or ``"broadcast"``.
        first_index: Position of the first parameter in the optimizer.
        planned: The plans made before, which weigh on their ranks.
        ranks_per_node: Consecutive ranks that share a node; None for all.

    Returns:
        The plans, equal on every rank.
    """
    specs: list[MatrixSpec] = []
    loads = [0] * world_size
    slots = _slots(params, rule, planned)
    for i, (param, layout) in enumerate(zip(params, layouts)):
        if needs_matrix(rule, param.shape, param.options):
            some = _matrices_of(first_index + i, param, layout, rule, loads)
            specs.extend(spec.at(slots[i]) if slots[i] else spec for spec in some)
    routes: dict[tuple[int, int], Route] = {}
    if distribution != "owner":
        routes = _broadcast(specs, world_size, distribution)
    routes |= {spec.key: spec.at_home() for spec in specs if spec.home is not None}
    plans = {
        spec.key: spec.plan(routes[spec.key]) for spec in specs if spec.key in routes
    }
    borne = [share for plan in (*planned, *plans.values()) for share in plan.shares()]
    rest = [spec for spec in specs if spec.key not in plans]
    if distribution == "auto":
        chosen = choose_teams(
            [spec.demand() for spec in rest],
            world_size,
            borne,
            ranks_per_node=ranks_per_node,
        )
    else:
        owners = assign_owners([spec.cost for spec in rest], world_size, borne)
        chosen = [Team.of_one(owner) for owner in owners]
    for spec, team in zip(rest, chosen):
        plans[spec.key] = spec.plan(spec.team_route(team))
    return _placed([plans[spec.key] for spec in specs])


def _slots(
    params: Sequence[ParamSpec], rule: Rule, planned: Sequence[MatrixPlan]
) -> list[list[int]]:
    """The slots of each parameter's matrices; none if all are refreshed at once."""
    weighed: list[list[tuple[int, int]]] = []
    for param in params:
        count, some = param.options.refresh_slots, []
        if count != 1 and needs_matrix(rule, param.shape, param.options):
            assert count != "auto", "the plan has taken a number"
            cols = param.view.cols
            for height in param.view.heights:
                left, right = rotated_sides((height, cols), param.options)
                weight = slot_weight(height, cols, left=left, right=right)
                some.append((count, weight))
        weighed.append(some)
    borne: Counter[When] = Counter()
    for m in planned:
        weight = slot_weight(*m.shape, left=m.left, right=m.right)
        borne.update(dict(m.cost.slots.shares(weight * m.share.count)))
    given = iter(give_slots([one for some in weighed for one in some], borne))
    return [[next(given) for _ in some] for some in weighed]


def _matrices_of(
    index: int, param: ParamSpec, layout: Layout, rule: Rule, loads: list[int]
) -> Iterator[MatrixSpec]:
    """The matrices of a parameter; of a stack those that will have one owner."""
    view, (_, cols) = param.view, param.stored
    if view.batch:
        shape = view.heights[0], view.cols
        left, right = rotated_sides(shape, param.options)
        work = _step_cost(*shape, left, right, param.options)
        for first, count, home in divide(view, layout, cols, (work, loads)):
            for start, size in runs(view, first, count):
                top = start * view.heights[0] * view.cols // cols
                share = Share(start, size, top, "stack")
                yield MatrixSpec.of(index, param, layout, rule, share, home)
        return
    top, kind = 0, "block" if len(view.heights) > 1 else "all"
    for i, height in enumerate(view.heights):
        yield MatrixSpec.of(index, param, layout, rule, Share(i, 1, top, kind))
        top += height


def _placed(plans: Sequence[MatrixPlan]) -> list[MatrixPlan]:
    """The plans with the places of stacks' states on their owners."""
    before: Counter[tuple[int, int]] = Counter()
    placed = []
    for plan in plans:
        if plan.share.kind == "stack":
            who = plan.index, plan.route.owner
            share = dataclasses.replace(plan.share, place=before[who])
            plan = dataclasses.replace(plan, share=share)
            before[who] += share.count
        placed.append(plan)
    return placed


def _broadcast(
    specs: Sequence[MatrixSpec], world_size: int, distribution: str
) -> dict[tuple[int, int], Route]:
    """The routes of the matrices on which all ranks work, by key."""
    specs = [spec for spec in specs if spec.share.kind != "stack"]
    candidates = [spec.candidate() for spec in specs]
    kinds = choose(candidates, world_size) if distribution == "auto" else None
    decompose = RefreshLoads()
    routes = {}
    for i, (spec, candidate) in enumerate(zip(specs, candidates)):
        if candidate.broadcast and (kinds is None or kinds[i] == "broadcast"):
            # Who has least to decompose so far computes its bases.
            head = decompose.least(range(world_size), spec.cost)
            decompose.add(head, spec.cost)
            routes[spec.key] = dataclasses.replace(candidate.broadcast, owner=head)
    return routes


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixSpec:
    """One matrix, or some alike of a stack, before it is known who works on it.

    Attributes:
        index: Position of the parameter in the optimizer.
        param: The parameter.
        view: What is stored and moved, and where it is stored.
        shape: Rows and columns of the matrix, or of each.
        share: Which of the parameter's matrices.
        home: The rank that stores all of some of a stack and works on them; None if
            that is to be decided.
        left: P is applied.
        right: Q is applied.
        cost: Work and state.
        copied_bytes: Bytes of the state of which each rank of a team has a copy.
        states: The tensors that are kept of it, by key.
        divisible: Its lines are independent of each other.
    """

    index: int
    param: ParamSpec
    view: MatrixLayout
    shape: tuple[int, int]
    share: Share
    home: int | None
    left: bool
    right: bool
    cost: MatrixCost
    copied_bytes: int
    states: Mapping[str, StateSpec]
    divisible: bool

    @classmethod
    def of(
        cls,
        index: int,
        param: ParamSpec,
        layout: Layout,
        rule: Rule,
        share: Share,
        home: int | None = None,
    ) -> MatrixSpec:
        """What some matrices of a parameter ask for.

        Args:
            index: Position of the parameter in the optimizer.
            param: The parameter.
            layout: Where its entries are.
            rule: The optimizer.
            share: Which of its matrices.
            home: The rank that stores all of them and works on them, or None.

        Returns:
            The spec.
        """
        options, count = param.options, share.count
        rows, cols = shape = param.view.heights[share.first], param.view.cols
        left, right = rotated_sides(shape, options)
        width = param.stored[1]
        height = count * rows * cols // width
        if share.kind != "all":
            layout = cut_rows(layout, share.top, share.top + height, width)
        # A matrix alone is seen as such, so that it may travel in blocks of its lines.
        seen = None
        if share.kind == "stack" and count == 1:
            seen = layout if width == cols else reshaped(layout, width, cols)
        if seen is not None:
            height, width, layout = rows, cols, seen
        sizes_of = param.grad_dtype.itemsize, param.work_dtype.itemsize
        name = share.name(param.name)
        matrix = MatrixLayout(name, height, width, layout, *sizes_of)
        states = rule.states(options, left=left, right=right)
        dtypes = (
            moment_dtype(options, param.dtype),
            rotation_dtype(options, param.dtype),
        )
        state_bytes: Counter[str] = Counter()
        for state in states.values():
            numel = math.prod(state.shape(shape, shape))
            state_bytes[state.kept] += count * numel * state.dtype(*dtypes).itemsize
        cost = MatrixCost(
            count * _step_cost(rows, cols, left, right, options),
            count
            * refresh_cost(
                rows, cols, left=left, right=right, basis=_decomposition(options)
            ),
            options.refresh_every,
            state_bytes.total(),
            Slots.one(count),
        )
        divisible = not rule.factored and options.noise_floor == 0 and left != right
        return cls(
            index,
            param,
            matrix,
            shape,
            share,
            home,
            left,
            right,
            cost,
            state_bytes["copy"] + state_bytes["sum"],
            states,
            divisible and (share.kind != "stack" or seen is not None),
        )

    def at(self, slots: Sequence[int]) -> MatrixSpec:
        """The same with the slots of the parameter's matrices."""
        first = self.share.first
        count = self.param.options.refresh_slots
        assert count != "auto"
        own = Slots.of(count, slots[first : first + self.share.count])
        cost = dataclasses.replace(self.cost, slots=own)
        return dataclasses.replace(self, cost=cost)

    @property
    def key(self) -> tuple[int, int]:
        """The key that its plan will have."""
        return self.index, self.share.first

    @property
    def two_sided_reproject(self) -> bool:
        """Whether a refresh mixes both dimensions of the moments."""
        options = self.param.options
        follow = options.on_refresh == "reproject" or options.first_moment == "original"
        return self.left and self.right and follow

    def candidate(self) -> Candidate:
        """The two ways to compute it, for the choice between them."""
        options = self.param.options
        alone = len(self.view.layout) == 1
        obstacle = broadcast_obstacle(
            self.view, two_sided_reproject=self.two_sided_reproject
        )
        other = None
        if not alone and not obstacle:
            # Gram matrices add up over blocks; those of a momentum are not at hand.
            basis = _decomposition(options)
            basis = "svd" if options.basis_from == "momentum" else basis
            other = broadcast_route(
                self.view, 0, left=self.left, right=self.right, basis=basis
            )
        return Candidate(
            self.view,
            other,
            self.copied_bytes,
            self.cost.state_bytes,
            options.refresh_every,
        )

    def demand(self) -> Demand:
        """What it asks of a team, for the choice of one."""
        rows, cols = self.view.rows, self.view.cols
        lines = min(rows, cols) if self.left and self.right else rows
        if self.left and not self.right:
            lines = cols
        if self.two_sided_reproject:
            lines = 1
        return Demand(self.cost, lines, self.copied_bytes)

    def team_route(self, team: Team) -> Route:
        """How a team works on it."""
        sides = {"left": self.left, "right": self.right}
        if len(team.ranks) == 1:
            return owner_route(self.view, team.head, **sides)
        return team_route(self.view, team.ranks, team.head, **sides)

    def at_home(self) -> Route:
        """The route of some of a stack."""
        assert self.home is not None
        return held_route(self.view, self.home, left=self.left, right=self.right)

    def plan(self, route: Route) -> MatrixPlan:
        """It, placed: with the way on which it is worked on."""
        options, dtype = self.param.options, self.param.dtype
        return MatrixPlan(
            self.index,
            self.view,
            self.shape,
            self.share,
            self.left,
            self.right,
            self.cost,
            route,
            moment_dtype(options, dtype),
            rotation_dtype(options, dtype),
            self.param.work_dtype,
            self.states,
            options.basis_from,
            self.divisible,
        )


def _step_cost(rows: int, cols: int, left: bool, right: bool, options: Options) -> int:
    """Multiply-adds of one step of a matrix, those of its averages included."""
    cost = step_cost(rows, cols, left=left, right=right)
    if options.basis_from == "gram":
        cost += rows * cols * (rows * left + cols * right)
    return cost


def _decomposition(options: Options) -> str:
    """How a basis is computed: of averages it is always the eigenvectors."""
    return "eigh" if options.basis_from == "gram" else options.basis
