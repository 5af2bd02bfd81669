"""What one step knows: made when it begins and handed down; it never communicates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.comm.exchange import window
from sharded_adadiag.options import Options
from sharded_adadiag.params.entry import Entry
from sharded_adadiag.plan.geometry import Box, Region
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.rounds import Part
from sharded_adadiag.step.bases import KnownBases

# Parts of a round that are alike, and so are computed together.
Batches = Sequence[Sequence[Part]]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What one step knows.

    Attributes:
        rule: The optimizer.
        rank: This rank.
        world_size: Number of ranks.
        device: Where the parameters are.
        entries: Every parameter of the optimizer, by position.
        options: By identity of the param group.
        grads: This rank's gradient of each parameter, or None.
        largest: Largest magnitude in this rank's gradients, by position, as far as it
            was looked at.
        present: Whether each parameter takes part: some rank has a gradient of it.
        bases: Which matrices have a basis, as far as this rank has one of its own.
        lacking: Whether a matrix has no basis yet, by position, where ranks outside
            its team must know.
        gradients: Gradients in the form in which they are used more than once.
    """

    rule: Rule
    rank: int
    world_size: int
    device: torch.device
    entries: Sequence[Entry]
    options: Mapping[int, Options]
    grads: Sequence[Tensor | None]
    largest: Mapping[int, float]
    present: Sequence[bool]
    bases: KnownBases
    lacking: Mapping[int, bool]
    gradients: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def options_of(self, matrix: MatrixPlan) -> Options:
        """The options of a matrix's group."""
        return self.options[id(self.entries[matrix.index].group)]

    def state(self, matrix: MatrixPlan) -> dict[str, Tensor]:
        """This rank's moments and rotations of a matrix."""
        state = self.entries[matrix.index].state()
        return {key: value for key, value in state.items() if key != "step"}

    def state_of(self, part: Part) -> dict[str, Tensor]:
        """The rotations of a part's matrix, and what of its moments the part is."""
        state = self.state(part.matrix)
        if not part.whole:
            here = part.layouts[-1][self.rank]
            held = part.matrix.route.moments.layout[self.rank]
            assert isinstance(here, Box) and isinstance(held, Box)
            for key, dims in part.matrix.moments.items():
                state[key] = cut_moment(state[key], dims, here, held)
        return state

    def count(self, matrix: MatrixPlan) -> int:
        """How many steps a matrix has made, this one included (t of the paper)."""
        return int(self.entries[matrix.index].state()["step"])

    def refresh_due(self, matrix: MatrixPlan) -> bool:
        """Whether this step computes a new basis.

        It does on steps 1, T + 1, 2T + 1, ..., and on every step until a gradient that
        is not zero has made the first one.

        Args:
            matrix: One that this rank works on, or of which the ranks have agreed
                whether it lacks a basis.

        Returns:
            The same on every rank that may be asked.
        """
        if not matrix.rotated or not self.present[matrix.index]:
            return False
        since_first = self.count(matrix) - 1
        period = self.options_of(matrix).refresh_every
        if since_first == 0 or (period is not None and since_first % period == 0):
            return True
        agreed = self.lacking.get(matrix.index)
        if agreed is not None:
            return agreed
        return self.bases.lacks(matrix.index, self.entries[matrix.index].state)

    def gradient(self, matrix: MatrixPlan, *, again: bool = False) -> Tensor:
        """The local gradient in the shape of its region; zeros if there is none.

        Args:
            matrix: The matrix.
            again: It will be asked for again in this step.

        Returns:
            The gradient as planned: its dtype, its sign, no entry too large to square.
        """
        found = self.gradients.get(matrix.index)
        if found is None:
            found = self._gradient(matrix)
            if again:
                self.gradients[matrix.index] = found
        return found

    def _gradient(self, matrix: MatrixPlan) -> Tensor:
        entry, grad = self.entries[matrix.index], self.grads[matrix.index]
        if grad is None:
            dtype, device = entry.spec.grad_dtype, entry.param.device
            return torch.zeros(entry.region.shape, dtype=dtype, device=device)
        piece = grad.reshape(entry.region.shape).to(entry.spec.grad_dtype)
        # Greater entries count as this: their squares overflow as it is, and what is
        # summed over them on the way (norms, products with a rotation) does not.
        limit = torch.finfo(matrix.work_dtype).max / (2 * matrix.view.numel)
        largest = self.largest.get(matrix.index, math.inf)
        if min(largest, torch.finfo(piece.dtype).max) > limit:
            piece = piece.clamp(-limit, limit)
        # The order in memory decides how a product rounds, and is lost on the way.
        piece = piece.contiguous()
        return -piece if self.options_of(matrix).maximize else piece

    def working(self, batches: Iterable[Sequence[Part]]) -> list[list[Part]]:
        """What of some batches this rank works on in this step.

        Args:
            batches: Parts that are alike.

        Returns:
            The same without parts that take no part in the step or are other ranks',
            divided by param group. Where sums over several ranks' blocks are made,
            every rank keeps the batch, with an empty block if need be.
        """
        found: list[list[Part]] = []
        for batch in batches:
            alike: dict[int, list[Part]] = {}
            for part in batch:
                m = part.matrix
                if self.present[m.index] and self._works_on(part):
                    alike.setdefault(id(self.entries[m.index].group), []).append(part)
            found.extend(alike.values())
        return found

    def _works_on(self, part: Part) -> bool:
        """Whether this rank has a block of the part, or takes part in its sums."""
        if not part.whole:
            return part.layouts[-1][self.rank].numel > 0
        return self.rank in part.matrix.route.team or self.sums(part.matrix)

    def sums(self, matrix: MatrixPlan) -> bool:
        """Whether the update of a matrix adds up sums over several ranks' blocks."""
        if matrix.route.moments.split == "none":
            return False
        return self.rule.factored or self.options_of(matrix).noise_floor > 0.0

    def apply(self, matrix: MatrixPlan, update: Tensor, place: Region) -> None:
        """Step 7 on a region of this rank's shard: decay, then subtract the update.

        Args:
            matrix: The matrix; nothing is done if it takes no part.
            update: The update of that region.
            place: The region.
        """
        if not self.present[matrix.index]:
            return
        entry, options = self.entries[matrix.index], self.options_of(matrix)
        lr = float(options.lr)
        param = there = entry.param
        if place != entry.region:
            whole = param.reshape(entry.region.shape)
            there = window(whole, entry.region, place, matrix.view.cols)
        if options.weight_decay:
            there.mul_(1.0 - lr * options.weight_decay)
        there.add_(update.view(there.shape), alpha=-lr)
        if there is not param and whole.data_ptr() != param.data_ptr():
            param.copy_(whole.view(param.shape))  # its strides allow no view


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
