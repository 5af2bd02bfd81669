"""A round of matrices through their stages and back, whatever the distribution.

A gradient starts in the layout in which the framework stores it. Each stage of its
route moves it (if it must move) and applies one or both rotations; in the last stage
the moments are updated; then everything goes back the same way and is subtracted from
the weights. With one owner there are two stages, the last holds the whole matrix and
applies both rotations. With blocks there are one to three, and every rank of the team
works on its own block.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_adadiag.algorithm.rotation import Scratch, rotate, rotate_back
from sharded_adadiag.algorithm.statistic import add_grams_
from sharded_adadiag.algorithm.sums import PartialSum, Sums, together
from sharded_adadiag.algorithm.update import rotations, update
from sharded_adadiag.comm.jobs import Failures, Job, Sum, Transfer
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.step.batching import Batch, Hop, RoundHere
from sharded_adadiag.step.context import Step
from sharded_adadiag.step.refresh import refresh_here
from sharded_adadiag.step.states import as_one

# What a part has at the moment: a piece, what came of it region by region, or None
# once the weight has been updated.
Work = list[Any]


def run_round(step: Step, here: RoundHere, failures: Failures) -> Job:
    """Steps 2-7 of the paper for all parts of a round.

    Args:
        step: The step.
        here: The round as this rank sees it.
        failures: Notes what fails on this rank.

    Yields:
        Exchanges, and sums over the blocks of several ranks.
    """
    work: Work = list(step.gradients_of(here))
    given = list(work)
    batches = step.working(here.batches)
    for k, (there, _) in enumerate(here.hops):
        _average(step, batches, k, work, failures)
        _rotate(step, batches, k, work, failures, back=False)
        yield from _hop(there, work)
    _average(step, batches, -1, work, failures)
    for i, due in step.due(here):
        refresh_here(step, here.parts[i].matrix, due, work[i], failures)
    moved = [now is not then for now, then in zip(work, given)]
    yield from _update(step, here, batches, work, moved, failures)
    for k, (_, back) in reversed(list(enumerate(here.hops))):
        yield from _hop(back, work)
        _rotate(step, batches, k, work, failures, back=True)
    for i, one in enumerate(work):
        if one is not None and not failures.status:
            step.apply_part(here, i, one)


def _hop(hop: Hop, work: Work) -> Job:
    """Between two stages."""
    pieces = [work[i] for i in hop.who]
    moved = yield Transfer(hop.plan, pieces, hop.wire, hop.work, hop.into, hop.apart)
    for i, piece in zip(hop.who, moved):
        work[i] = piece


def _average(
    step: Step, batches: Sequence[Batch], k: int, work: Work, failures: Failures
) -> None:
    """Add this rank's pieces to the averages of the sides rotated in a stage."""
    for batch in batches:
        if not batch.here or k >= len(batch.stages) - 1:
            continue
        options, stage = step.options_of(batch.first), batch.stages[k]
        if options.basis_from == "gram" and (stage.left or stage.right):
            with failures.carried(batch.first.index):
                grads, states = step.inputs_of(batch, work)
                add_grams_(states, grads, options, left=stage.left, right=stage.right)


def _rotate(
    step: Step,
    batches: Sequence[Batch],
    k: int,
    work: Work,
    failures: Failures,
    *,
    back: bool,
) -> None:
    """Apply the rotations of a stage that is not the last to this rank's pieces."""
    turn = rotate_back if back else rotate
    for batch in batches:
        stages = batch.stages
        if k >= len(stages) - 1 or not (stages[k].left or stages[k].right):
            continue
        with failures.carried(batch.first.index):
            grads = [work[i].to(batch.first.work_dtype) for i in batch.places]
            states = [step.state(part.matrix) for part in batch.parts]
            left, right = (
                rotations(states, key, grads[0]) if wanted else None
                for key, wanted in (
                    ("rotation_left", stages[k].left),
                    ("rotation_right", stages[k].right),
                )
            )
            for i, result in zip(batch.places, turn(grads, left, right, Scratch())):
                work[i] = result


def _update(
    step: Step,
    here: RoundHere,
    batches: Sequence[Batch],
    work: Work,
    moved: Sequence[bool],
    failures: Failures,
) -> Job:
    """Rotate, update the moments and rotate back, in the last stage of each part."""
    waiting: list[tuple[Batch, Sums[Tensor]]] = []
    for batch in batches:
        with failures.carried(batch.first.index):
            if step.sums(batch.first, batch.stages[-1].split):
                waiting.append((batch, _begun(step, batch, work, Scratch())))
                continue
            # What goes at once into the weights, or where the gradients came, needs
            # memory for one batch at a time.
            brief = batch.home or all(moved[i] for i in batch.places)
            scratch = step.scratch if brief else Scratch()
            updates = _on_whole_matrices(_begun(step, batch, work, scratch))
            _keep(batch, updates, work, moved)
            if batch.home and not failures.status:
                for i in batch.places:
                    step.apply_part(here, i, work[i])
                    work[i] = None
    if waiting:
        splits = [batch.stages[-1].split for batch, _ in waiting]
        rules = together([rule for _, rule in waiting])
        results = yield from _summed(rules, splits)
        for (batch, _), some in zip(waiting, results):
            _keep(batch, some, work, moved)


def _begun(step: Step, batch: Batch, work: Work, scratch: Scratch) -> Sums[Tensor]:
    """The rule of a batch, about to run."""
    m, stage = batch.first, batch.stages[-1]
    if batch.here:
        grads, states = step.inputs_of(batch, work)
    else:
        grads, states = _nothing_of(m, stage.split, len(batch.parts), step.device)
    return update(
        grads,
        states,
        rule=step.rule,
        options=step.options_of(m),
        step=step.count(m),
        shape=m.shape,
        sides=(stage.left, stage.right) if batch.here else (False, False),
        scratch=scratch,
    )


def _keep(batch: Batch, updates: Tensor, work: Work, moved: Sequence[bool]) -> None:
    """Put the updates of a batch in the place of its gradients."""
    if not batch.here:
        return
    each = iter(updates.unbind())
    for part, i in zip(batch.parts, batch.places):
        m = part.matrix
        if part.whole and m.share.kind == "stack":
            one = as_one(m, [next(each) for _ in range(m.share.count)])
        else:
            one = next(each)
        if moved[i]:  # an update may take the gradient's room: there is no more
            work[i].copy_(one)
        else:
            work[i] = one


def _nothing_of(
    matrix: MatrixPlan, split: str, count: int, device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Gradients and states without entries, for sums that all ranks take part in.

    Along the dimension that the team does not divide they have the full length.

    Args:
        matrix: The matrix.
        split: Which dimension the team divides.
        count: How many of its kind.
        device: Where they shall be.

    Returns:
        Gradients, and states that have moments and no rotations.
    """
    rows, cols = matrix.view.rows, matrix.view.cols
    shape = (0, cols) if split == "rows" else (rows, 0)
    dtype = matrix.work_dtype
    grads = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(count)]
    states = [
        {
            key: torch.zeros(spec.shape(shape, ()), dtype=dtype, device=device)
            for key, spec in matrix.states.items()
            if spec.kept == "block"
        }
        for _ in range(count)
    ]
    return grads, states


def _on_whole_matrices(rule: Sums[Tensor]) -> Tensor:
    """Run a rule for which every partial sum is the sum."""
    try:
        asked = next(rule)
        while True:
            asked = rule.send([partial.value for partial in asked])
    except StopIteration as stop:
        return stop.value


def _summed(
    rules: Sums[list[Tensor]], splits: Sequence[str]
) -> Generator[Sum, list[Tensor], list[Tensor]]:
    """Run rules whose blocks' sums are added up over the ranks."""
    try:
        asked = next(rules)
        while True:
            totals = [partial.value for partial in asked]
            across = _crossing(asked, splits)
            if across:
                summed = yield Sum([totals[i] for i in across])
                for i, total in zip(across, summed):
                    totals[i] = total
            asked = rules.send(totals)
    except StopIteration as stop:
        return stop.value


def _crossing(asked: Sequence[PartialSum], splits: Sequence[str]) -> list[int]:
    """Positions of the sums that go over several ranks' blocks."""
    return [
        i for i, sum_ in enumerate(asked) if sum_.over in ("all", splits[sum_.batch])
    ]
