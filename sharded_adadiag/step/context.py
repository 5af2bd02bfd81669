"""What one step knows: made when it begins and handed down; it never communicates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_adadiag.algorithm.rotation import Scratch
from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.comm.exchange import window
from sharded_adadiag.options import Options
from sharded_adadiag.params.local import LocalParam
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.regions import Box, Region, entries_above
from sharded_adadiag.plan.rounds import Part
from sharded_adadiag.plan.schedule import Slots
from sharded_adadiag.step.bases import KnownBases
from sharded_adadiag.step.batching import Batch, RoundHere
from sharded_adadiag.step.pending import PendingBases
from sharded_adadiag.step.states import State, apart, states_of


class Refresh(NamedTuple):
    """What is to be done about the bases of a plan's matrices, by position.

    Attributes:
        now: Of these a basis is computed and in force at once.
        begun: Of these one is begun, to be in force ``refresh_lag`` steps later.
        arriving: Of these one that was begun is in force from this step on.
    """

    now: Sequence[int] = ()
    begun: Sequence[int] = ()
    arriving: Sequence[int] = ()


NO_REFRESH = Refresh()


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What one step knows.

    Attributes:
        rule: The optimizer.
        rank: This rank.
        world_size: Number of ranks.
        device: Where the parameters are.
        entries: Every parameter of the optimizer, by position.
        params: This rank's tensor of each parameter.
        held: The states of each parameter.
        counts: How many steps each parameter has made, this one included.
        scratch: Memory for one batch at a time.
        options: By identity of the param group.
        grads: This rank's gradient of each parameter, or None.
        largest: At least the largest magnitude in this rank's gradients, by position,
            as far as it was looked at.
        present: Whether each parameter takes part: some rank has a gradient of it.
        bases: Which matrices have a basis, as far as this rank has one of its own.
        pending: Bases that this rank computes beside training.
        lacking: Whether a matrix has no basis yet, by its key, where ranks outside
            its team must know.
        gradients: Gradients in the form in which they are used more than once, by
            key; of a parameter of several matrices also the flat gradient, by position.
    """

    rule: Rule
    rank: int
    world_size: int
    device: torch.device
    entries: Sequence[LocalParam]
    params: Sequence[Tensor | None]
    held: Sequence[dict[str, Any]]
    counts: Sequence[int]
    scratch: Scratch
    options: Mapping[int, Options]
    grads: Sequence[Tensor | None]
    largest: Mapping[int, float]
    present: Sequence[bool]
    bases: KnownBases
    pending: PendingBases
    lacking: Mapping[tuple[int, int], bool]
    gradients: dict[object, Tensor] = dataclasses.field(default_factory=dict)

    def options_of(self, matrix: MatrixPlan) -> Options:
        """The options of a matrix's group."""
        return self.options[id(self.entries[matrix.index].group)]

    def states(self, matrix: MatrixPlan) -> list[State]:
        """This rank's moments and rotations of each matrix of a plan."""
        return states_of(matrix, self.held[matrix.index])

    def state(self, matrix: MatrixPlan) -> State:
        """This rank's moments and rotations of a matrix that is none of a stack."""
        (state,) = self.states(matrix)
        return state

    def fade(self, index: int, averages: Sequence[str]) -> None:
        """Let averages of Gram matrices fade, to which the step will add.

        Args:
            index: Position of their parameter.
            averages: Their keys in its state.
        """
        beta = self.options[id(self.entries[index].group)].gram_beta
        for key in averages:
            self.held[index][key].mul_(beta)

    def count(self, matrix: MatrixPlan) -> int:
        """How many steps a matrix has made, this one included (t of the paper)."""
        return self.counts[matrix.index]

    def refreshes(self, matrix: MatrixPlan) -> Refresh:
        """Which bases of a plan's matrices this step begins to compute, and uses.

        It computes one on step 1, then every T steps in their slots (`plan.schedule`),
        and on every step until a gradient that is not zero has made the first one.

        Args:
            matrix: One that this rank works on, or of which the ranks have agreed
                whether it lacks a basis.

        Returns:
            Positions in the plan, the same on every rank that may be asked.
        """
        if not (matrix.left or matrix.right) or not self.present[matrix.index]:
            return NO_REFRESH
        since_first = self.count(matrix) - 1
        if since_first == 0:
            return Refresh(range(matrix.share.count))
        options, slots = self.options_of(matrix), matrix.cost.slots
        due = whose_turn(slots, since_first, options.refresh_every)
        lag = options.refresh_lag
        if not lag and len(due) == matrix.share.count:
            return Refresh(due)
        lacking = self._lacking(matrix)
        if not lag:
            return Refresh(sorted({*due, *lacking}) if lacking else due)
        arriving: Sequence[int] = ()
        if since_first > lag:
            arriving = whose_turn(slots, since_first - lag, options.refresh_every)
        return Refresh(
            lacking,
            [i for i in due if i not in lacking],
            [i for i in arriving if i not in lacking],
        )

    def _lacking(self, matrix: MatrixPlan) -> Sequence[int]:
        """Which matrices of a plan have no basis yet."""
        agreed = self.lacking.get(matrix.key)
        if agreed is not None:
            return [0] if agreed else []
        if matrix.key in self.bases.complete:
            return []
        return self.bases.lacking(matrix, self.held[matrix.index])

    def due(self, here: RoundHere) -> list[tuple[int, Refresh]]:
        """Which matrices of a round get a new basis from what is at hand.

        Args:
            here: The round.

        Returns:
            Positions of parts, each with what is due of the matrices in its plan.
        """
        found = ((i, self.refreshes(here.parts[i].matrix)) for i in here.owned)
        return [(i, due) for i, due in found if any(due)]

    def gradients_of(self, here: RoundHere) -> list[Tensor]:
        """The local gradient of each part's matrix, as `gradient` gives it."""
        return [
            self.gradient(part.matrix, shape, again=not part.whole)
            for part, shape in zip(here.parts, here.shapes)
        ]

    def gradient(
        self, matrix: MatrixPlan, shape: Sequence[int], *, again: bool = False
    ) -> Tensor:
        """The local gradient of a matrix; zeros if there is none.

        Args:
            matrix: The matrix.
            shape: The shape of the region of it that this rank stores.
            again: It will be asked for again in this step.

        Returns:
            The gradient as planned: its dtype, its sign, no entry too large to square.
        """
        found = self.gradients.get(matrix.key)
        if found is None:
            found = self._gradient(matrix, shape)
            if again:
                self.gradients[matrix.key] = found
        return found

    def _gradient(self, matrix: MatrixPlan, shape: Sequence[int]) -> Tensor:
        spec, grad = self.entries[matrix.index].spec, self.grads[matrix.index]
        if grad is None:
            return torch.zeros(shape, dtype=spec.grad_dtype, device=self.device)
        if matrix.share.kind != "all":
            if matrix.index not in self.gradients:  # it may have to be copied
                self.gradients[matrix.index] = grad.reshape(-1)
            grad = self._own(matrix, self.gradients[matrix.index])
        piece = grad.reshape(shape).to(spec.grad_dtype)
        # Greater entries count as this: their squares overflow as it is, and what is
        # summed over them on the way (norms, products with a rotation) does not.
        limit = torch.finfo(matrix.work_dtype).max / (2 * math.prod(matrix.shape))
        largest = self.largest.get(matrix.index, math.inf)
        if min(largest, torch.finfo(piece.dtype).max) > limit:
            piece = piece.clamp(-limit, limit)
        # The order in memory decides how a product rounds, and is lost on the way.
        piece = piece.contiguous()
        return -piece if self.options_of(matrix).maximize else piece

    def _own(self, matrix: MatrixPlan, flat: Tensor) -> Tensor:
        """A matrix's entries among those of its parameter that this rank holds."""
        region, view = self.entries[matrix.index].region, matrix.view
        width = self.entries[matrix.index].spec.stored[1]
        start = entries_above(region, matrix.share.top, width)
        return flat[start : start + view.layout[self.rank].numel]

    def working(self, batches: Iterable[Batch]) -> list[Batch]:
        """What of some batches this rank works on in this step.

        Args:
            batches: All of a round.

        Returns:
            The same without parts that take no part in the step or are other ranks',
            divided by param group and count of steps. Where sums over several ranks'
            blocks are made, every rank keeps the batch, with an empty block if need be.
        """
        found: list[Batch] = []
        for batch in batches:
            alike: dict[tuple[int, int], list[int]] = {}
            for i, part in enumerate(batch.parts):
                m = part.matrix
                if self.present[m.index] and (
                    batch.here or (part.whole and self.sums(m, batch.stages[-1].split))
                ):
                    kind = id(self.entries[m.index].group), self.count(m)
                    alike.setdefault(kind, []).append(i)
            for which in alike.values():
                some = batch
                if len(which) < len(batch.parts):
                    parts = tuple(batch.parts[i] for i in which)
                    places = tuple(batch.places[i] for i in which)
                    first = parts[0].matrix
                    some = dataclasses.replace(
                        batch, parts=parts, places=places, first=first
                    )
                found.append(some)
        return found

    def sums(self, matrix: MatrixPlan, split: str) -> bool:
        """Whether the update of a matrix adds up sums over several ranks' blocks.

        Args:
            matrix: The matrix.
            split: Which dimension the ranks divide.

        Returns:
            The same on every rank.
        """
        if split == "none":
            return False
        return self.rule.factored or self.options_of(matrix).noise_floor > 0.0

    def inputs_of(
        self, batch: Batch, work: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[State]]:
        """Gradient and state of each matrix of a batch.

        Args:
            batch: One of which this rank has the blocks.
            work: By position in the round, what there is of each part.

        Returns:
            Two lists; a part that is a stack gives several matrices.
        """
        grads: list[Tensor] = []
        states: list[State] = []
        for part, place in zip(batch.parts, batch.places):
            m = part.matrix
            grad = work[place].to(m.work_dtype)
            if not part.whole:
                grads.append(grad)
                states.append(self._cut(part, self.state(m)))
            elif m.share.kind == "all":
                grads.append(grad)
                states.append({
                    k: v for k, v in self.held[m.index].items() if k != "step"
                })
            else:
                grads += apart(m, grad)
                states += self.states(m)
        return grads, states

    def _cut(self, part: Part, state: State) -> State:
        """The rotations of a part's matrix, and what of its moments the part is."""
        here = part.layouts[-1][self.rank]
        held = part.matrix.route.moments.layout[self.rank]
        assert isinstance(here, Box) and isinstance(held, Box)
        for key, spec in part.matrix.states.items():
            if spec.kept == "block":
                state[key] = cut_moment(state[key], spec.dims, here, held)
        return state

    def apply_part(self, here: RoundHere, i: int, update: Any) -> None:
        """Step 7 for a part of a round.

        Args:
            here: The round.
            i: Position of the part.
            update: Its update, whole or as pairs of region and entries.
        """
        matrix, stored = here.parts[i].matrix, here.regions[i]
        if not self.present[matrix.index]:
            return
        pieces = [(stored, update)] if isinstance(update, Tensor) else update
        for region, piece in pieces:
            self.apply(matrix, stored, piece, region)

    def apply(
        self, matrix: MatrixPlan, stored: Region, update: Tensor, place: Region
    ) -> None:
        """Step 7 on a region of this rank's shard: decay, then subtract the update.

        Args:
            matrix: The matrix.
            stored: What of it this rank stores.
            update: The update of a region.
            place: That region.
        """
        options = self.options_of(matrix)
        lr = float(options.lr)
        param = there = self.params[matrix.index]
        assert param is not None and there is not None
        if place != stored or matrix.share.kind != "all":
            whole = param.reshape(-1)
            own = whole if matrix.share.kind == "all" else self._own(matrix, whole)
            there = window(own.view(stored.shape), stored, place, matrix.view.cols)
        if options.weight_decay:
            there.mul_(1.0 - lr * options.weight_decay)
        there.add_(update.view(there.shape), alpha=-lr)
        if there is not param and whole.data_ptr() != param.data_ptr():
            param.copy_(whole.view(param.shape))  # its strides allow no view


def whose_turn(slots: Slots, steps: int, every: int | None) -> Sequence[int]:
    """Which of some matrices are refreshed, if all have a basis.

    Args:
        slots: Theirs.
        steps: Steps since the first one.
        every: T, or None if there is no refresh but the first.

    Returns:
        Their positions.
    """
    if every is None:
        return ()
    for slot, some in slots.taken:
        if slot * every // slots.count == steps % every:
            return some  # no two slots share a step: K is at most T
    return ()


def cut_moment(moment: Tensor, dims: Sequence[str], here: Box, held: Box) -> Tensor:
    """The part of a moment that belongs to a block.

    Args:
        moment: With the dimensions ``dims``, of the block ``held``.
        dims: ``"m"`` and ``"n"`` in order.
        here: A block inside ``held``.
        held: What the rank has of the matrix.

    Returns:
        A view.
    """
    first = {"m": here.row_start - held.row_start, "n": here.col_start - held.col_start}
    length = dict(zip("mn", here.shape))
    for axis, dim in enumerate(dims):
        moment = moment.narrow(axis, first[dim], length[dim])
    return moment
