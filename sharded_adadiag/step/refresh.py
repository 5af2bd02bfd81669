"""New bases: from what they are computed, by whom, and who gets them.

The head of a matrix's team computes its basis. If it works on the whole matrix alone,
it has the gradient at hand; else the gradient travels to it, or the Gram matrices of
the ranks' blocks do and are added up there. The other ranks of the team get the
rotations. With a lag that is so, too, but the head computes its basis beside training
and the rotations are sent, and in force, that many steps later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sharded_adadiag.algorithm.basis import Basis, gram_matrix
from sharded_adadiag.algorithm.spec import NEXT_ROTATIONS
from sharded_adadiag.algorithm.statistic import (
    basis_of,
    momentum,
    statistic,
    with_gradient,
)
from sharded_adadiag.algorithm.update import install
from sharded_adadiag.comm.exchange import window
from sharded_adadiag.comm.jobs import Failures, Job, Transfer
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.refresh import refresh_plans
from sharded_adadiag.plan.rounds import refresh_rounds
from sharded_adadiag.step.context import Refresh, Step
from sharded_adadiag.step.states import State, apart


def refresh_here(
    step: Step, m: MatrixPlan, due: Refresh, gradient: Tensor, failures: Failures
) -> None:
    """New bases of matrices whose whole gradient is at hand.

    Args:
        step: The step.
        m: Matrices that this rank alone works on.
        due: What is due of them.
        gradient: What was gathered of their gradient.
        failures: Notes what fails.
    """
    with failures.carried(m.index):
        options, states = step.options_of(m), step.states(m)
        for i in due.arriving:
            install(states[i], _arrived(step, m, i, states[i]), options, m.states)
        grads = apart(m, gradient.to(m.work_dtype))
        decay = step.rule.decay_of_first(options, step.count(m))
        compute = _how(step, m)
        for i in due.now:
            basis = compute(statistic(grads[i], states[i], options, decay))
            step.bases.note(m, i, basis)
            install(states[i], basis, options, m.states)
        for i in due.begun:
            made = statistic(grads[i], states[i], options, decay)
            step.pending.begin(m, i, _due(step, m), made, compute)


def refresh_jobs(
    step: Step, matrices: Sequence[MatrixPlan], budget: int, failures: Failures
) -> Iterator[Job]:
    """New bases of what no rank works on whole, before anything is updated.

    Args:
        step: The step.
        matrices: Equal on every rank.
        budget: Bytes that the exchanges of a step may take on a rank.
        failures: Notes what fails.

    Yields:
        Jobs for as many of those that are due as fit the budget.
    """
    due = [(m, step.refreshes(m)) for m in matrices]
    for some in refresh_rounds([m for m, d in due if d.arriving], budget):
        yield _arrive_together(step, some, failures)
    for some in refresh_rounds([m for m, d in due if d.now], budget):
        yield _refresh_together(step, some, failures)
    for some in refresh_rounds([m for m, d in due if d.begun], budget):
        yield _begin_together(step, some, failures)


def _refresh_together(
    step: Step, matrices: tuple[MatrixPlan, ...], failures: Failures
) -> Job:
    """New bases of matrices that several ranks work on, or one in several rounds."""
    collected = yield from _collect(step, matrices)
    found: list[Basis] = []
    for m, gathered in zip(matrices, collected):
        basis = Basis(None, None)
        if m.route.owner == step.rank:
            with failures.carried(m.index):
                basis = _how(step, m)(_made(step, m, gathered))
        found.append(basis)
    yield from _distribute(step, matrices, found, failures)


def _begin_together(
    step: Step, matrices: tuple[MatrixPlan, ...], failures: Failures
) -> Job:
    """Begin to compute such bases, on their heads."""
    collected = yield from _collect(step, matrices)
    for m, gathered in zip(matrices, collected):
        if m.route.owner == step.rank:
            with failures.carried(m.index):
                made = _made(step, m, gathered)
                step.pending.begin(m, 0, _due(step, m), made, _how(step, m))


def _arrive_together(
    step: Step, matrices: tuple[MatrixPlan, ...], failures: Failures
) -> Job:
    """Send such bases, which were begun in an earlier step."""
    found: list[Basis] = []
    for m in matrices:
        basis = Basis(None, None)
        if m.route.owner == step.rank:
            with failures.carried(m.index):
                basis = _arrived(step, m, 0, step.state(m))
        found.append(basis)
    yield from _distribute(step, matrices, found, failures)


def _due(step: Step, matrix: MatrixPlan) -> int:
    """The matrix's step from which a basis that is begun now is in force."""
    return step.count(matrix) + step.options_of(matrix).refresh_lag


def _arrived(step: Step, matrix: MatrixPlan, position: int, state: State) -> Basis:
    """On the head: the basis that is in force from now on, taken out of the state."""
    step.pending.put(matrix, position, state)
    precise = torch.promote_types(matrix.work_dtype, matrix.rotation_dtype)
    sides: dict[str, Tensor] = {}
    for key in NEXT_ROTATIONS:
        if key in state and bool(state[key].any()):
            sides[key] = state[key].to(precise, copy=True)
            state[key].zero_()
    left, right = map(sides.get, NEXT_ROTATIONS)
    return Basis(left, right)


def _collect(
    step: Step, matrices: tuple[MatrixPlan, ...]
) -> Generator[Transfer, list[Tensor], list[dict[str, Tensor]]]:
    """What bases are made of, to the heads: of each matrix its parts, by name."""
    made = _made_of(step, matrices)
    collect, _ = refresh_plans(matrices, made, step.world_size)
    parts = [(m, part) for m, some in zip(matrices, made) for part in some]
    sent = [_part(step, m, part) for m, part in parts]
    wire = [value.dtype for value in sent]
    work = [
        m.work_dtype if part == "gradient" else dtype
        for (m, part), dtype in zip(parts, wire)
    ]
    arrived = iter((yield Transfer(collect, sent, wire, work, "collected")))
    return [{part: next(arrived) for part in some} for some in made]


def _made_of(
    step: Step, matrices: tuple[MatrixPlan, ...]
) -> tuple[tuple[str, ...], ...]:
    return tuple(m.made_of(step.options_of(m).basis) for m in matrices)


def _distribute(
    step: Step,
    matrices: tuple[MatrixPlan, ...],
    found: Sequence[Basis],
    failures: Failures,
) -> Job:
    """Rotations from the heads to their teams, where they are in force at once."""
    made = _made_of(step, matrices)
    _, distribute = refresh_plans(matrices, made, step.world_size)
    sides = [
        (side, size, m)
        for m, basis in zip(matrices, found)
        for side, wanted, size in (
            (basis.left, m.left, m.view.rows),
            (basis.right, m.right, m.view.cols),
        )
        if wanted
    ]
    dtypes = [m.rotation_dtype for _, _, m in sides]
    rotations = [_sent(step, *side) for side in sides]
    arrived = yield Transfer(distribute, rotations, dtypes, dtypes, "rotations")
    arrivals = iter(arrived)
    for m, basis in zip(matrices, found):
        precise = torch.promote_types(m.work_dtype, m.rotation_dtype)
        new = [next(arrivals) if wanted else None for wanted in (m.left, m.right)]
        if failures.status or step.rank not in m.route.team:
            continue
        # Zeros stand for: keep the old one.
        left, right = (
            side.to(precise) if side is not None and bool(side.any()) else None
            for side in new
        )
        basis = Basis(left, right, basis.fallback)
        step.bases.note(m, 0, basis)
        install(step.state(m), basis, step.options_of(m), m.states)


def _part(step: Step, matrix: MatrixPlan, part: str) -> Tensor:
    """What this rank sends to the head: its piece, a Gram matrix, or a state."""
    if part in matrix.states:
        if step.rank in matrix.route.team:
            return step.state(matrix)[part].contiguous()
        spec = matrix.states[part]
        dtype = spec.dtype(matrix.moment_dtype, matrix.rotation_dtype)
        return torch.zeros((0, 0), dtype=dtype, device=step.device)
    piece = step.gradient(matrix, matrix.view.layout[step.rank].shape)
    if part == "gradient":
        return piece
    # Its own part of the piece: a replica has another.
    stages = matrix.route.stages
    own = next(s for s in stages if s.left or s.right).layout[step.rank]
    layout = matrix.view.layout
    block = window(piece, layout[step.rank], own, matrix.view.cols)
    if matrix.basis_from == "gram":
        key = "gram_left" if matrix.left else "gram_right"
        average = step.state(matrix)[key]
        return with_gradient(average, block, step.options_of(matrix), key)
    return gram_matrix(block, left=matrix.left)


def _made(
    step: Step, matrix: MatrixPlan, gathered: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """On the head: what a basis is made of, as from `statistic`."""
    options = step.options_of(matrix)
    if "gram" in gathered:
        return {"gram_left" if matrix.left else "gram_right": gathered["gram"]}
    grad = gathered["gradient"]
    if matrix.basis_from == "gram":
        return {
            key: with_gradient(gathered[key], grad, options, key)
            for key in matrix.gathered
        }
    if matrix.basis_from == "momentum":
        decay = step.rule.decay_of_first(options, step.count(matrix))
        return {
            "gradient": momentum(grad, gathered["exp_avg"], step.state(matrix), decay)
        }
    return gathered


def _how(step: Step, matrix: MatrixPlan) -> Callable[[Mapping[str, Tensor]], Basis]:
    """On the head: from what a basis is made of to the basis."""
    return functools.partial(
        basis_of,
        left=matrix.left,
        right=matrix.right,
        method=step.options_of(matrix).basis,
        dtype=torch.promote_types(matrix.work_dtype, matrix.rotation_dtype),
    )


def _sent(step: Step, side: Tensor | None, size: int, matrix: MatrixPlan) -> Tensor:
    """A rotation as it is sent: zeros where the old one is kept."""
    if side is None:
        size = size if matrix.route.owner == step.rank else 0
        side = torch.zeros((size, size), device=step.device)
    return side.to(matrix.rotation_dtype)
