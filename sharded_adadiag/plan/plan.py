"""The plan of an optimizer: what every rank keeps, computes and sends."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence

from sharded_adadiag.algorithm.state import Rule, moment_dtype
from sharded_adadiag.options import BUFFER_BYTES
from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.placing import plan_matrices
from sharded_adadiag.plan.quiet import no_collections
from sharded_adadiag.plan.rounds import Round, make_rounds
from sharded_adadiag.plan.slot_count import with_slot_counts
from sharded_adadiag.plan.spec import ParamSpec

# Without an option exchanges may take this part of the mean rank's state.
BUFFER_SHARE = 32
STEP_BYTES = 4  # the step count of a parameter is a float32 tensor


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is decided before a step, the same on every rank.

    It holds integers, names and options, neither tensors nor process groups, so it
    can be made anywhere. Parameters are told by their position in `specs`.

    Attributes:
        world_size: Number of ranks.
        rule: The optimizer.
        distribution: ``"auto"``, ``"owner"`` or ``"broadcast"``.
        buffer_bytes: What the exchanges of a step may take on a rank; None: `budget`.
        ranks_per_node: Consecutive ranks that are on one node; None: all are.
        specs: Every parameter.
        layouts: Where the entries of each parameter are.
        matrices: The parameters that are worked on as whole matrices, by position.
            All others are updated where they lie.
        rounds: What is exchanged and worked on together, in the order of a step.
        left_out: Positions of the parameters that are in no param group now.
            They keep their place and their owners, but take no part in a step.
    """

    world_size: int
    rule: Rule
    distribution: str = "auto"
    buffer_bytes: int | None = None
    ranks_per_node: int | None = None
    specs: tuple[ParamSpec, ...] = ()
    layouts: tuple[Layout, ...] = ()
    matrices: tuple[MatrixPlan, ...] = ()
    rounds: tuple[Round, ...] = ()
    left_out: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        assert len(self.specs) == len(self.layouts)
        assert all(len(layout) == self.world_size for layout in self.layouts)

    @classmethod
    def of(
        cls,
        specs: Sequence[ParamSpec],
        layouts: Sequence[Layout],
        *,
        rule: Rule,
        world_size: int,
        distribution: str = "auto",
        buffer_bytes: int | None = None,
        ranks_per_node: int | None = None,
    ) -> Plan:
        """Plan the work on these parameters.

        Args:
            specs: Every parameter.
            layouts: Where the entries of each are.
            rule: The optimizer.
            world_size: Number of ranks.
            distribution: ``"auto"``, ``"owner"`` or ``"broadcast"``.
            buffer_bytes: What the exchanges of a step may take on a rank; None for
                what `budget` says.
            ranks_per_node: Consecutive ranks that are on one node; None: all are.

        Returns:
            The plan; equal arguments give equal plans.
        """
        empty = cls(world_size, rule, distribution, buffer_bytes, ranks_per_node)
        return empty.extended(specs, layouts)

    @no_collections()
    def extended(self, specs: Sequence[ParamSpec], layouts: Sequence[Layout]) -> Plan:
        """The plan with further parameters, behind those it has.

        Args:
            specs: The new parameters.
            layouts: Where the entries of each are.

        Returns:
            A plan in which all that was planned before is as it was: owners and
            rounds too. The new matrices are placed with that load in mind. Where their
            options leave a number to the plan, its `specs` have one.
        """
        work = sum(m.cost.step for m in self.matrices)
        specs = with_slot_counts(specs, self.rule, self.world_size, work)
        matrices = plan_matrices(
            specs,
            layouts,
            rule=self.rule,
            world_size=self.world_size,
            distribution=self.distribution,
            first_index=len(self.specs),
            planned=self.matrices,
            ranks_per_node=self.ranks_per_node,
        )
        plan = dataclasses.replace(
            self,
            specs=(*self.specs, *specs),
            layouts=(*self.layouts, *layouts),
            matrices=(*self.matrices, *matrices),
        )
        return dataclasses.replace(
            plan, rounds=(*self.rounds, *plan._make_rounds(matrices))
        )

    @no_collections()
    def without(self, positions: Collection[int]) -> Plan:
        """The plan of a step in which just these parameters take no part.

        Args:
            positions: Of the parameters that are in no param group; those left out
                before and not named here take part again.

        Returns:
            The plan with the same owners. Its rounds are made anew if other
            matrices than before take part.
        """
        left_out = frozenset(positions)
        changed = left_out ^ self.left_out
        plan = dataclasses.replace(self, left_out=left_out)
        if all(m.index not in changed for m in self.matrices):
            return plan
        rounds = tuple(self._make_rounds(plan.members))
        return dataclasses.replace(plan, rounds=rounds)

    @property
    def budget(self) -> int:
        """Bytes that the exchanges of a step may take on a rank.

        If the user did not say, a part of what a rank keeps anyway, of states or of
        weights, so that a large model on few ranks, or in many copies, does not travel
        in thousands of rounds.
        """
        if self.buffer_bytes is not None:
            return self.buffer_bytes
        state = sum(m.cost.state_bytes for m in self.matrices)
        weights = sum(m.view.layout.numel * m.view.work_itemsize for m in self.matrices)
        kept = max(state, weights) // self.world_size
        return max(BUFFER_BYTES, kept // BUFFER_SHARE)

    @property
    def members(self) -> tuple[MatrixPlan, ...]:
        """The matrices that take part in a step."""
        return tuple(m for m in self.matrices if m.index not in self.left_out)

    @property
    def plain(self) -> tuple[int, ...]:
        """Positions of the parameters in a group that are updated where they lie."""
        apart = self.left_out | {m.index for m in self.matrices}
        return tuple(i for i in range(len(self.specs)) if i not in apart)

    def plain_bytes(self, position: int) -> int:
        """Bytes of state for each entry of a parameter that is updated where it lies.

        Args:
            position: The parameter's position in the optimizer.

        Returns:
            Its moments' item sizes, added up.
        """
        spec = self.specs[position]
        count = len(self.rule.plain_states(spec.options))
        return count * moment_dtype(spec.options, spec.dtype).itemsize

    @property
    def shared(self) -> tuple[MatrixPlan, ...]:
        """Rotated matrices of which no rank has the whole gradient in a round."""
        found = {
            part.matrix.key: part.matrix
            for round_ in self.rounds
            for part in round_.parts
            if part.matrix.rotated
            and (part.matrix.route.kind != "owner" or not part.whole)
        }
        return tuple(found.values())

    @property
    def watched(self) -> tuple[MatrixPlan, ...]:
        """Matrices of which ranks outside their team take part in a refresh."""
        if self.world_size == 1:
            return ()
        return tuple(m for m in self.shared if len(m.route.team) < self.world_size)

    @property
    def has_lag(self) -> bool:
        """Whether any bases are computed beside training."""
        return any(spec.options.refresh_lag for spec in self.specs)

    @property
    def agreement_bytes(self) -> int:
        """Bytes of the all-reduce at the head of a step; 0 if there is none.

        Four bytes for each flag: a gradient is there, of each parameter; one is
        missing, of each that several ranks hold copies of; there is no basis yet, of
        each matrix in `watched`; and five for the rest.
        """
        taking_part = (s for i, s in enumerate(self.specs) if i not in self.left_out)
        checked = any(spec.options.nonfinite != "ignore" for spec in taking_part)
        watched = len(self.watched)
        if self.world_size == 1 or not (checked or watched or self.has_lag):
            return 0
        alike = Counter(self.layouts)
        copied = sum(count for layout, count in alike.items() if has_copies(layout))
        return 4 * (len(self.specs) + copied + watched + 5)

    def _make_rounds(self, matrices: Sequence[MatrixPlan]) -> list[Round]:
        return make_rounds(matrices, self.world_size, self.budget)


def has_copies(layout: Layout) -> bool:
    """Whether several ranks hold the same part of a parameter.

    Args:
        layout: What each rank holds.

    Returns:
        False if every entry is on one rank only.
    """
    return any(len(ranks) > 1 for _, ranks in layout.pieces)
