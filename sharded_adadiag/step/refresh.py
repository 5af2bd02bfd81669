"""New bases: from what they are computed, by whom, and who gets them.

The head of a matrix's team computes its basis. If it works on the whole matrix alone,
it has the gradient at hand; else the gradient travels to it, or the Gram matrices of
the ranks' blocks do and are added up there. The other ranks of the team get the
rotations. With a lag that is so, too, but the head computes its basis beside training
and the rotations are sent, and in force, that many steps later.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from sharded_adadiag.algorithm.basis import (
    Basis,
    basis_of_gram,
    compute_basis,
    gram_matrix,
)
from sharded_adadiag.algorithm.spec import NEXT_ROTATIONS
from sharded_adadiag.algorithm.update import basis_of, install
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
        for i in due.now:
            basis = basis_of(grads[i], states[i], options)
            step.bases.note(m, i, basis)
            install(states[i], basis, options, m.states)
        for i in due.begun:
            compute = functools.partial(basis_of, state=states[i], options=options)
            step.pending.begin(m, i, _due(step, m), grads[i], compute)


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
    gram, collected = yield from _collect(step, matrices)
    found: list[Basis] = []
    for m, by_gram, gathered in zip(matrices, gram, collected):
        basis = Basis(None, None)
        if m.route.owner == step.rank:
            with failures.carried(m.index):
                method = step.options_of(m).basis
                basis = _new_basis(gathered, m, method, by_gram=by_gram)
        found.append(basis)
    yield from _distribute(step, matrices, found, failures)


def _begin_together(
    step: Step, matrices: tuple[MatrixPlan, ...], failures: Failures
) -> Job:
    """Begin to compute such bases, on their heads."""
    gram, collected = yield from _collect(step, matrices)
    for m, by_gram, gathered in zip(matrices, gram, collected):
        if m.route.owner == step.rank:
            with failures.carried(m.index):
                compute = functools.partial(
                    _new_basis,
                    matrix=m,
                    method=step.options_of(m).basis,
                    by_gram=by_gram,
                )
                step.pending.begin(m, 0, _due(step, m), gathered, compute)


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
) -> Generator[Transfer, list[Tensor], tuple[tuple[bool, ...], list[Tensor]]]:
    """What bases are computed from, to the heads; and which of it are Gram matrices."""
    gram = tuple(m.by_gram(step.options_of(m).basis) for m in matrices)
    collect, _ = refresh_plans(matrices, gram, step.world_size)
    sent = [_statistic(step, m, by_gram) for m, by_gram in zip(matrices, gram)]
    work = [torch.float64 if g else m.work_dtype for m, g in zip(matrices, gram)]
    wire = [value.dtype for value in sent]
    collected = yield Transfer(collect, sent, wire, work, "collected")
    return gram, collected


def _distribute(
    step: Step,
    matrices: tuple[MatrixPlan, ...],
    found: Sequence[Basis],
    failures: Failures,
) -> Job:
    """Rotations from the heads to their teams, where they are in force at once."""
    gram = tuple(m.by_gram(step.options_of(m).basis) for m in matrices)
    _, distribute = refresh_plans(matrices, gram, step.world_size)
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


def _statistic(step: Step, matrix: MatrixPlan, by_gram: bool) -> Tensor:
    """What this rank sends to the head: its piece, or the Gram matrix of its block."""
    piece = step.gradient(matrix, matrix.view.layout[step.rank].shape)
    if not by_gram:
        return piece
    # Its own part of the piece: a replica has another.
    stages = matrix.route.stages
    own = next(s for s in stages if s.left or s.right).layout[step.rank]
    layout = matrix.view.layout
    block = window(piece, layout[step.rank], own, matrix.view.cols)
    return gram_matrix(block, left=matrix.left)


def _new_basis(
    gathered: Tensor, matrix: MatrixPlan, method: str, *, by_gram: bool
) -> Basis:
    """On the head: the new basis."""
    if not by_gram:
        precise = torch.promote_types(matrix.work_dtype, matrix.rotation_dtype)
        return compute_basis(
            gathered.to(precise),
            left=matrix.left,
            right=matrix.right,
            method=method,
        )
    if not bool(gathered.any()):  # zeros tell nothing of a basis
        return Basis(None, None)
    vectors = basis_of_gram(gathered, matrix.work_dtype)
    return Basis(
        vectors if matrix.left else None,
        vectors if matrix.right else None,
        "" if vectors is not None else "kept",
    )


def _sent(step: Step, side: Tensor | None, size: int, matrix: MatrixPlan) -> Tensor:
    """A rotation as it is sent: zeros where the old one is kept."""
    if side is None:
        size = size if matrix.route.owner == step.rank else 0
        side = torch.zeros((size, size), device=step.device)
    return side.to(matrix.rotation_dtype)
