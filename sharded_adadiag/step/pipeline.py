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

from sharded_adadiag.algorithm.rotation import rotate, rotate_back
from sharded_adadiag.algorithm.sums import PartialSum, Sums, together
from sharded_adadiag.algorithm.update import rotations, update
from sharded_adadiag.comm.jobs import Failures, Job, Sum, Transfer
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.rounds import Part, Round
from sharded_adadiag.step.context import Batches, Step
from sharded_adadiag.step.refresh import refresh_here
from sharded_adadiag.step.states import apart, as_one

# What a part has at the moment: a piece, or what came of it region by region.
Work = list[Any]


def run_round(step: Step, round_: Round, batches: Batches, failures: Failures) -> Job:
    """Steps 2-7 of the paper for all parts of a round.

    Args:
        step: The step.
        round_: The parts and their exchanges.
        batches: The same parts, those alike together.
        failures: Notes what fails on this rank.

    Yields:
        Exchanges, and sums over the blocks of several ranks.
    """
    work: Work = [
        step.gradient(part.matrix, again=not part.whole) for part in round_.parts
    ]
    given = list(work)
    place = {id(part): i for i, part in enumerate(round_.parts)}
    mine = step.working(batches)
    depth = len(round_.moves)
    for k in range(depth):
        _rotate(step, mine, k, work, place, failures, back=False)
        yield from _hop(round_, k, work, back=False)
    for part, gradient in zip(round_.parts, work):
        route = part.matrix.route
        if part.whole and route.kind == "owner" and route.owner == step.rank:
            refresh_here(step, part.matrix, gradient, failures)
    moved = [now is not then for now, then in zip(work, given)]
    yield from _update(step, mine, work, (place, moved), failures)
    for k in reversed(range(depth)):
        yield from _hop(round_, k, work, back=True)
        _rotate(step, mine, k, work, place, failures, back=True)
    for part, pieces in zip(round_.parts, work):
        if failures.status:
            break
        if isinstance(pieces, Tensor):
            step.apply(part.matrix, pieces, part.layouts[0][step.rank])
        else:
            for region, piece in pieces:
                step.apply(part.matrix, piece, region)


def _hop(round_: Round, k: int, work: Work, *, back: bool) -> Job:
    """Between stages k and k + 1."""
    who = round_.members[k]
    some = [round_.parts[i].matrix for i in who]
    dtypes = [m.work_dtype for m in some]
    # A gradient that no stage has rotated yet travels in its own dtype.
    wire = [
        work[i].dtype if not back and m.route.raw(k) else m.work_dtype
        for i, m in zip(who, some)
    ]
    pieces = [work[i] for i in who]
    # What only goes home is subtracted as it comes, region by region.
    apart = [j for j, m in enumerate(some) if m.route.raw(0)] if back and k == 0 else ()
    into = f"hop {k} {'back' if back else 'there'}"
    plan = round_.moves[k][int(back)]
    moved = yield Transfer(plan, pieces, wire, dtypes, into, apart)
    for i, piece in zip(who, moved):
        work[i] = piece


def _rotate(
    step: Step,
    batches: Batches,
    k: int,
    work: Work,
    place: dict[int, int],
    failures: Failures,
    *,
    back: bool,
) -> None:
    """Apply the rotations of a stage that is not the last to this rank's pieces."""
    turn = rotate_back if back else rotate
    for batch in batches:
        stages = batch[0].matrix.route.stages
        if k >= len(stages) - 1 or not (stages[k].left or stages[k].right):
            continue
        with failures.carried(batch[0].matrix.index):
            dtype = batch[0].matrix.work_dtype
            grads = [work[place[id(part)]].to(dtype) for part in batch]
            states = [step.state(part.matrix) for part in batch]
            turned = turn(
                grads,
                rotations(states, "rotation_left", grads[0])
                if stages[k].left
                else None,
                rotations(states, "rotation_right", grads[0])
                if stages[k].right
                else None,
            )
            for part, result in zip(batch, turned):
                work[place[id(part)]] = result


def _update(
    step: Step,
    batches: Batches,
    work: Work,
    where: tuple[dict[int, int], list[bool]],
    failures: Failures,
) -> Job:
    """Rotate, update the moments and rotate back, in the last stage of each part."""
    place, moved = where

    def keep(batch: Sequence[Part], results: Sequence[Tensor]) -> None:
        each = iter(results)
        for part in batch:
            own = [next(each) for _ in range(part.matrix.share.count)]
            if step.rank not in part.matrix.route.team:
                continue
            i, update = place[id(part)], as_one(part.matrix, own)
            if moved[i]:  # an update may take the gradient's room: there is no more
                work[i].copy_(update)
            else:
                work[i] = update

    waiting: list[tuple[Sequence[Part], Sums[list[Tensor]]]] = []
    for batch in batches:
        m = batch[0].matrix
        here = step.rank in m.route.team
        with failures.carried(m.index):
            if here:
                grads = [
                    grad
                    for part in batch
                    for grad in apart(
                        part.matrix, work[place[id(part)]].to(m.work_dtype)
                    )
                ]
                states = [state for part in batch for state in step.states_of(part)]
            else:
                grads, states = _nothing_of(m, len(batch), step.device)
            rule = update(
                grads,
                states,
                method=step.rule,
                options=step.options_of(m),
                steps=[
                    count
                    for part in batch
                    for count in part.matrix.share.count * [step.count(part.matrix)]
                ],
                shape=m.shape,
                left=here and m.route.moments.left,
                right=here and m.route.moments.right,
            )
            if step.sums(m):
                waiting.append((batch, rule))
            else:
                keep(batch, _on_whole_matrices(rule))
    if waiting:
        splits = [batch[0].matrix.route.moments.split for batch, _ in waiting]
        rules = together([rule for _, rule in waiting])
        results = yield from _summed(rules, splits)
        for (batch, _), some in zip(waiting, results):
            keep(batch, some)


def _nothing_of(
    matrix: MatrixPlan, count: int, device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Gradients and states without entries, for sums that all ranks take part in.

    Along the dimension that the team does not divide they have the full length.

    Args:
        matrix: The matrix.
        count: How many of its kind.
        device: Where they shall be.

    Returns:
        Gradients, and states that have moments and no rotations.
    """
    rows, cols = matrix.view.rows, matrix.view.cols
    shape = (0, cols) if matrix.route.moments.split == "rows" else (rows, 0)
    sizes = dict(zip("mn", shape))
    dtype = matrix.work_dtype
    grads = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(count)]
    states = [
        {
            key: torch.zeros([sizes[d] for d in dims], dtype=dtype, device=device)
            for key, dims in matrix.moments.items()
        }
        for _ in range(count)
    ]
    return grads, states


def _on_whole_matrices(rule: Sums[list[Tensor]]) -> list[Tensor]:
    """Run a rule for which every partial sum is the sum."""
    try:
        asked = next(rule)
        while True:
            asked = rule.send([partial.value for partial in asked])
    except StopIteration as stop:
        return stop.value


def _summed(
    rules: Sums[list[list[Tensor]]], splits: Sequence[str]
) -> Generator[Sum, list[Tensor], list[list[Tensor]]]:
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
        i for i, sum_ in enumerate(asked) if sum_.over in ("all", splits[sum_.matrix])
    ]
