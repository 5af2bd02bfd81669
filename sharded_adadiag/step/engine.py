"""Carries out the plan of an optimizer, step by step.

It knows no framework (it gets regions and plain local tensors) and no formula (the
pipeline calls `algorithm`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch

from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.comm.collectives import Communicator
from sharded_adadiag.comm.exchange import Exchange
from sharded_adadiag.comm.jobs import Failures, Job, drive
from sharded_adadiag.options import Options
from sharded_adadiag.params.entry import Entry, device_of
from sharded_adadiag.params.exclusion import LOPSIDED
from sharded_adadiag.params.local import local
from sharded_adadiag.plan.exchange_plan import ExchangePlan
from sharded_adadiag.plan.matrices import MatrixPlan, plan_matrices
from sharded_adadiag.plan.report import Report, make_report
from sharded_adadiag.plan.rounds import Part, Round, make_rounds
from sharded_adadiag.step.agreement import Agreement
from sharded_adadiag.step.allocation import allocate
from sharded_adadiag.step.bases import KnownBases
from sharded_adadiag.step.batching import make_batches
from sharded_adadiag.step.context import Step
from sharded_adadiag.step.group_options import GroupOptions
from sharded_adadiag.step.pipeline import run_round, sum_bytes
from sharded_adadiag.step.plain import plain_update
from sharded_adadiag.step.refresh import groups, refresh_plans, refresh_together

logger = logging.getLogger("sharded_adadiag")


class Engine:
    """The plan of an optimizer and the machinery that carries it out.

    Args:
        method: The optimizer.
        comm: The ranks that share the parameters.
        distribution: ``"auto"``, ``"owner"`` or ``"broadcast"``.
        buffer_bytes: What a rank may use for what is on its way.

    Attributes:
        entries: Every parameter, planned and not forgotten; positions are for ever.
        matrices: The plan of those that are seen as matrices.
        rounds: What is worked on together, in order.
        shared: Rotated matrices of which no rank has the whole gradient in a round.
    """

    def __init__(
        self, method: Rule, comm: Communicator, distribution: str, buffer_bytes: int
    ) -> None:
        self.method = method
        self.comm = comm
        self.distribution = distribution
        self.buffer_bytes = buffer_bytes
        self.exchange = Exchange(comm)
        self.entries: list[Entry] = []
        self.matrices: list[MatrixPlan] = []
        self.rounds: list[Round] = []
        self.shared: list[MatrixPlan] = []
        self.bases = KnownBases()
        self.failures = Failures(comm)
        self.group_options = GroupOptions(self.entries, self.matrices)
        self.agreement = Agreement(
            method.name, comm, self.entries, self.group_options, self.bases
        )
        self._batches: list[list[list[Part]]] = []
        self._device_type = ""

    def extend(self, entries: Sequence[Entry]) -> None:
        """Plan further parameters; those planned before keep their owners and state.

        Args:
            entries: The new parameters.
        """
        matrices = plan_matrices(
            [entry.spec for entry in entries],
            [entry.layout for entry in entries],
            method=self.method,
            world_size=self.comm.size,
            distribution=self.distribution,
            first_index=len(self.entries),
            planned=self.matrices,
        )
        self.entries.extend(entries)
        self.matrices.extend(matrices)
        if self.comm.rank == 0:
            _warn_of_lopsided(matrices)
        self.regroup()

    def members(self) -> list[MatrixPlan]:
        """The matrices that are in a param group."""
        return [m for m in self.matrices if self.entries[m.index].member]

    def regroup(self) -> None:
        """Make the rounds for the parameters that are in the param groups now."""
        self.rounds = make_rounds(self.members(), self.comm.size, self.buffer_bytes)
        self._device_type = ""
        shared = [
            part.matrix
            for round_ in self.rounds
            for part in round_.parts
            if part.matrix.rotated
            and (part.matrix.route.kind != "owner" or not part.whole)
        ]
        self.shared = list(dict.fromkeys(shared))
        if self.comm.size > 1:
            self.agreement.watched = [
                m for m in self.shared if m.route.kind != "broadcast"
            ]
        self.group_options.forget()

    def allocate(self) -> None:
        """Create every state tensor that is missing, with the same keys on all ranks.

        Raises:
            ValueError: If an unpickled state tensor has another shape than planned.
        """
        allocate(self.entries, self.matrices, self.method, self.comm.rank)
        self.mark_started()

    def mark_loaded(self) -> None:
        """Note that the states, and perhaps the weights, have been replaced."""
        self.agreement.compared = 0
        self.failures = Failures(self.comm)
        self.mark_started()

    def mark_started(self) -> None:
        """See from the step counts whether a real step has been made."""
        self.bases.forget()
        self.agreement.started = any(
            float(entry.state()["step"]) > 0
            for entry in self.entries
            if entry.member and entry.state()
        )

    def step(self, *, new: bool = False) -> bool:
        """One step of every parameter that has a gradient on any rank.

        Args:
            new: This rank has parameters that are not planned yet.

        Returns:
            False if any rank has such ones, and nothing was done.

        Raises:
            RuntimeError: On every rank, if a gradient anywhere is non-finite or
                sparse (nothing has changed then). If a rank fails in the middle of a
                step, on it and on all that wait for its data at the end of the step,
                on the others at the head of the next.
            ValueError: On every rank, if options are invalid or differ.
        """
        now = self.group_options.read()
        grads = [entry.grad() for entry in self.entries]
        present = self.agreement.reach(grads, now, new=new, failures=self.failures)
        if present is None:
            return not self.agreement.unplanned
        step = Step(
            self.method,
            self.comm.rank,
            self.comm.size,
            device_of(self.entries),
            self.entries,
            now.options,
            grads,
            self.agreement.largest,
            present,
            self.bases,
            self.agreement.lacking,
        )
        others = set(range(len(present)))
        for m in self.matrices:
            others.discard(m.index)
            if present[m.index]:
                self.entries[m.index].state()["step"] += 1
        self._run(step, self._refreshes(step))
        self._run(step, self._round_jobs(step))
        self.failures.raise_noted([entry.spec.name for entry in self.entries])
        plain = [self.entries[i] for i in sorted(others) if present[i]]
        plain_update(self.method, plain, now.options)
        return True

    def _run(self, step: Step, jobs: Iterator[Job]) -> None:
        drive(jobs, self.exchange, self.failures, device=step.device)

    def _refreshes(self, step: Step) -> Iterator[Job]:
        """New bases of what no rank works on whole, before anything is updated."""
        due = [m for m in self.shared if step.refresh_due(m)]
        for group in groups(due, self.buffer_bytes):
            yield refresh_together(step, group, self.failures)

    def _round_jobs(self, step: Step) -> Iterator[Job]:
        batches = self._batched(step.device)
        for round_, some in zip(self.rounds, batches):
            if any(step.present[part.matrix.index] for part in round_.parts):
                yield run_round(step, round_, some, self.failures)

    def _batched(self, device: torch.device) -> list[list[list[Part]]]:
        """The batches of each round, made once."""
        if self._device_type != device.type:
            self._device_type = device.type
            self._batches = [
                make_batches(round_, self.comm.rank, device.type)
                for round_ in self.rounds
            ]
        return self._batches

    def report(self) -> Report:
        """What every rank computes, keeps and sends."""
        return make_report(self)

    def plain_bytes(self) -> int:
        """Bytes that this rank keeps besides the moments and rotations of matrices."""
        whole = {matrix.index for matrix in self.matrices}
        return sum(
            local(value).nbytes
            for i, entry in enumerate(self.entries)
            if entry.member
            for key, value in entry.state().items()
            if key == "step" or i not in whole
        )

    def refresh_plans(self) -> list[ExchangePlan]:
        """The exchanges of a refresh of every basis."""
        found: list[ExchangePlan] = []
        for group in groups(self.shared, self.buffer_bytes):
            basis = [self.entries[m.index].group["basis"] for m in group]
            by_gram = tuple(m.by_gram(b) for m, b in zip(group, basis))
            found.extend(refresh_plans(tuple(group), by_gram, self.comm.size))
        return found

    def sum_bytes(self) -> list[list[int]]:
        """Bytes of each all-reduce of sums over blocks in a step, by round."""
        groups_ = {id(e.group): e.group for e in self.entries if e.member}
        options = {key: Options.from_group(group) for key, group in groups_.items()}
        everyone = [True] * len(self.entries)
        rank, device = self.comm.rank, device_of(self.entries)
        step = Step(
            self.method,
            rank,
            self.comm.size,
            device,
            self.entries,
            options,
            [],
            {},
            everyone,
            self.bases,
            {},
        )
        return [
            sum_bytes(step, batches, lambda part: part.matrix.state_shapes(rank))
            for batches in self._batched(device)
        ]


def _warn_of_lopsided(matrices: Sequence[MatrixPlan]) -> None:
    lopsided = [
        m
        for m in matrices
        if m.rotated
        and max(m.view.rows, m.view.cols) > LOPSIDED * min(m.view.rows, m.view.cols)
    ]
    if lopsided:
        first = lopsided[0].view
        logger.warning(
            "%s: rotated as a %d x %d matrix, and %d more, over %d times as long as "
            "wide; if it is a stack of matrices or a table, put it in a group with "
            '"rotate": False',
            first.name,
            first.rows,
            first.cols,
            len(lopsided) - 1,
            LOPSIDED,
        )
