"""Carries out the plan of an optimizer, step by step.

It knows no framework (it gets regions and plain local tensors) and no formula (the
pipeline calls `algorithm`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sharded_adadiag.algorithm.rotation import Scratch
from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.comm.collectives import Communicator
from sharded_adadiag.comm.exchange import Exchange
from sharded_adadiag.comm.jobs import Failures, Job, drive
from sharded_adadiag.options import Options
from sharded_adadiag.params.exclusion import LOPSIDED
from sharded_adadiag.params.local import (
    LocalParam,
    device_of,
    gradients,
    states,
    tensors,
)
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.plan import Plan
from sharded_adadiag.plan.report import Report, report_of
from sharded_adadiag.plan.sums import sums_of
from sharded_adadiag.step.agreement import Agreement
from sharded_adadiag.step.allocation import allocate
from sharded_adadiag.step.bases import KnownBases
from sharded_adadiag.step.batching import RoundHere, list_round
from sharded_adadiag.step.context import Step
from sharded_adadiag.step.group_options import GroupOptions
from sharded_adadiag.step.pending import PendingBases
from sharded_adadiag.step.pipeline import run_round
from sharded_adadiag.step.plain import plain_update
from sharded_adadiag.step.refresh import refresh_jobs
from sharded_adadiag.step.states import averages_of

logger = logging.getLogger("sharded_adadiag")


class Engine:
    """The plan of an optimizer and the machinery that carries it out.

    Args:
        rule: The optimizer.
        comm: The ranks that share the parameters.
        distribution: ``"auto"``, ``"owner"`` or ``"broadcast"``.
        buffer_bytes: What the exchanges of a step may take on a rank, or None.

    Attributes:
        entries: Every planned parameter; their positions never change.
        plan: What every rank keeps, computes and sends.
    """

    def __init__(
        self,
        rule: Rule,
        comm: Communicator,
        distribution: str,
        buffer_bytes: int | None,
    ) -> None:
        self.comm = comm
        self.exchange = Exchange(comm)
        self.scratch = Scratch()
        self.entries: list[LocalParam] = []
        self.bases = KnownBases()
        self.pending = PendingBases(self.bases)
        self.failures = Failures(comm)
        self.group_options = GroupOptions(self.entries)
        self.agreement = Agreement(
            rule.name, comm, self.entries, self.group_options, self.bases
        )
        self._device = torch.device("cpu")
        self.rounds: list[RoundHere] = []
        self._follow(Plan(comm.size, rule, distribution, buffer_bytes))

    def extend(
        self, entries: Sequence[LocalParam], ranks_per_node: int | None = None
    ) -> None:
        """Plan further parameters; those planned before keep their owners and state.

        Args:
            entries: The new parameters.
            ranks_per_node: Consecutive ranks that share a node; None if unknown.
        """
        known = len(self.plan.matrices)
        plan = dataclasses.replace(self.plan, ranks_per_node=ranks_per_node)
        plan = plan.extended(
            [entry.spec for entry in entries], [entry.layout for entry in entries]
        )
        for entry, spec in zip(entries, plan.specs[len(self.entries) :]):
            entry.spec = spec
            if entry.group.get("refresh_slots") == "auto":
                entry.group["refresh_slots"] = spec.options.refresh_slots
        if self.comm.rank == 0:
            _warn_of_lopsided(plan.matrices[known:])
        self.entries.extend(entries)
        self._follow(plan)

    def regroup(self) -> None:
        """Take note that parameters left, came back, or changed groups."""
        left_out = [i for i, entry in enumerate(self.entries) if not entry.member]
        self._follow(self.plan.without(left_out))

    def _follow(self, plan: Plan) -> None:
        """Go by a plan from now on: what a step would else look up is listed here."""
        self.plan = plan
        self.shared = plan.shared
        self.positions = sorted({m.index for m in plan.members})
        self.plain = plan.plain
        self.agreement.watched, self.agreement.has_lag = plan.watched, plan.has_lag
        cut = {
            part.matrix.key
            for round_ in plan.rounds
            for part in round_.parts
            if not part.whole
        }
        self.group_options.follow(plan.matrices, cut)
        self.averages = averages_of(plan.members)
        self._listed = False

    def allocate(self) -> None:
        """Create every state tensor that is missing, with the same keys on all ranks.

        Raises:
            ValueError: If an unpickled state tensor has another shape than planned.
        """
        allocate(self.entries, self.plan.matrices, self.plan.rule, self.comm.rank)
        self.mark_started()

    def mark_loaded(self) -> None:
        """Note that the states, and perhaps the weights, have been replaced."""
        self.pending.forget()
        self.agreement.compared = 0
        self.failures = Failures(self.comm)
        self.mark_started()

    def put_bases(self) -> None:
        """Put bases that are computed beside training into the states; a collective.

        Raises:
            RuntimeError: On every rank, if one could not be computed on any.
        """
        if not self.agreement.has_lag:
            return
        error = ""
        try:
            self.put_own_bases()
        except Exception as problem:
            error = f"rank {self.comm.rank}: {problem}"
        told = [text for text in self.comm.all_gather_object(error) if text]
        if told:
            raise RuntimeError(
                f"a basis could not be computed beside training ({told[0]}), so that "
                "the state is not saved; restart from an older checkpoint"
            )

    def put_own_bases(self) -> None:
        """The same without the other ranks."""
        self.pending.put_all(states(self.entries))

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
        self._list()
        self.agreement.broken = {}
        if self.pending.work:
            self.agreement.broken = self.pending.broken(states(self.entries))
        grads = gradients(self.entries)
        present = self.agreement.reach(grads, now, new=new, failures=self.failures)
        if present is None:
            return not self.agreement.unplanned
        held = states(self.entries)
        step = Step(
            self.plan.rule,
            self.comm.rank,
            self.comm.size,
            self._device,
            self.entries,
            tensors(self.entries),
            held,
            self._counted(held, present),
            self.scratch,
            now.options,
            grads,
            self.agreement.largest,
            present,
            self.bases,
            self.pending,
            self.agreement.lacking,
        )
        for i, keys in self.averages.items():
            if present[i]:
                step.fade(i, keys)
        if self.shared:
            budget = self.plan.budget
            self._run(step, refresh_jobs(step, self.shared, budget, self.failures))
        self._run(step, self._round_jobs(step))
        self.failures.receive(self.exchange.unread_statuses())
        if self.failures.status:
            self.failures.raise_noted([entry.spec.name for entry in self.entries])
        plain = [self.entries[i] for i in self.plain if present[i]]
        if plain:
            plain_update(self.plan.rule, plain, now.options)
        return True

    def _counted(
        self, held: Sequence[dict[str, Any]], present: Sequence[bool]
    ) -> list[int]:
        """How many steps each matrix has made with this one, which is counted now."""
        counts = [0] * len(held)
        stepped = [i for i in self.positions if present[i]]
        if stepped:
            steps = [held[i]["step"] for i in stepped]
            torch._foreach_add_(steps, 1)
            for i, count in zip(stepped, torch.stack(steps).tolist()):
                counts[i] = int(count)
        return counts

    def _run(self, step: Step, jobs: Iterator[Job]) -> None:
        drive(jobs, self.exchange, self.failures, device=step.device)

    def _round_jobs(self, step: Step) -> Iterator[Job]:
        for here in self.rounds:
            if any(step.present[i] for i in here.positions):  # the same on every rank
                yield run_round(step, here, self.failures)

    def _list(self) -> None:
        """List what this rank does in each round, unless the list is up to date."""
        device = device_of(self.entries)
        if self._listed and device == self._device:
            return
        self._device, self._listed = device, True
        dtypes = [entry.spec.grad_dtype for entry in self.entries]
        self.rounds = [
            list_round(round_, self.comm.rank, device.type, dtypes)
            for round_ in self.plan.rounds
        ]

    def report(self) -> Report:
        """What every rank computes, keeps and sends."""
        groups = {id(e.group): e.group for e in self.entries if e.member}
        options = {key: Options.from_group(group) for key, group in groups.items()}
        specs = [
            dataclasses.replace(
                e.spec, options=options[id(e.group)] if e.member else e.spec.options
            )
            for e in self.entries
        ]
        plan = dataclasses.replace(self.plan, specs=tuple(specs))
        return report_of(plan, sums_of(plan))


def _warn_of_lopsided(matrices: Sequence[MatrixPlan]) -> None:
    lopsided = [
        m for m in matrices if m.rotated and max(m.shape) > LOPSIDED * min(m.shape)
    ]
    if lopsided:
        first = lopsided[0]
        logger.warning(
            "%s: rotated as a %d x %d matrix, and %d more, over %d times as long as "
            "wide; if it is a stack of matrices or a table, put it in a group with "
            '"rotate": False',
            first.view.name,
            *first.shape,
            len(lopsided) - 1,
            LOPSIDED,
        )
