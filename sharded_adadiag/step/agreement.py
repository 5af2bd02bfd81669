"""What the ranks agree on before a step changes anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_adadiag.comm.collectives import Communicator
from sharded_adadiag.comm.jobs import Failures
from sharded_adadiag.params.local import LocalParam, device_of
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.plan import has_copies
from sharded_adadiag.step.bases import KnownBases
from sharded_adadiag.step.group_options import GroupOptions, Reading, differences
from sharded_adadiag.step.replicas import check_presence, check_replicas

_NONFINITE, _SPARSE, _UNREDUCED, _WIDER, _BROKEN = 1, 2, 3, 4, 5
_KINDS = 8
# A problem is 8 x the parameter's position + its kind, and this much more if it ends
# the step with an error: the greatest of all ranks is the one that is dealt with.
_FATAL = 1 << 30
# A norm below this is that of finite entries, in any dtype, and none is much larger.
_SURE = 1e18
# After 0 and 1: whether any gradient is not zero.
_NEW, _COMPLAINT = 2, 3


class Agreement:
    """One small all-reduce at the head of a step.

    It carries whether each parameter has a gradient on any rank and, if ranks hold
    copies, whether it is missing on any; the worst problem found on any; and (until
    the first real step) whether any gradient is not zero: torch's state-dict helpers
    and DeepSpeed make a first step with zero gradients only to create the states.
    Further it tells whether a rank has new parameters or invalid options, and compares
    the ranks' param groups by a fingerprint.

    Once every group says ``nonfinite="ignore"`` there is none (unless some ranks work
    on a matrix together, and the others must know when, or bases are computed beside
    training, which may fail), and none of this is compared: ranks must then edit their
    groups alike.

    Args:
        name: The optimizer's, for messages.
        comm: The ranks.
        entries: The parameters; the list grows as more are planned.
        group_options: Reads the options of their groups.
        bases: Which matrices have a basis.

    Attributes:
        started: A real step has been made.
        compared: Number of parameters whose replicas were found to be equal.
        unplanned: The last call found new parameters and did nothing else.
        skipped_steps: Steps skipped for a non-finite gradient.
        largest: At least the largest magnitude in this rank's gradients in this step,
            by position of the parameter, as far as it was looked at.
        broken: What has failed of the bases that this rank computed beside training
            and that are due in this step, by position of the parameter.
        watched: Matrices of which ranks outside their team take part in a refresh.
        has_lag: Whether any bases are computed beside training.
        lacking: Whether each of these has no basis yet, by key.
    """

    def __init__(
        self,
        name: str,
        comm: Communicator,
        entries: Sequence[LocalParam],
        group_options: GroupOptions,
        bases: KnownBases,
    ) -> None:
        self.name = name
        self.comm = comm
        self.entries = entries
        self.group_options = group_options
        self.bases = bases
        self.broken: dict[int, BaseException] = {}
        self.watched: Sequence[MatrixPlan] = ()
        self.has_lag = False
        self.lacking: dict[tuple[int, int], bool] = {}
        self.started = False
        self.compared = 0
        self.skipped_steps = 0
        self.unplanned = False
        self.largest: dict[int, float] = {}
        self._copied: list[bool] = []
        self._numels: list[int] = []
        self._checked = True  # ranks that stop checking must have agreed to it

    @property
    def copied(self) -> list[bool]:
        """Whether ranks hold copies of any part of each parameter."""
        for entry in self.entries[len(self._copied) :]:
            self._copied.append(has_copies(entry.layout))
        return self._copied

    @property
    def numels(self) -> list[int]:
        """How many entries this rank holds of each parameter."""
        for entry in self.entries[len(self._numels) :]:
            self._numels.append(entry.region.numel)
        return self._numels

    def nbytes(self) -> int:
        """Bytes of the all-reduce of an ordinary step; 0 if there is none."""
        entries = self.entries
        checked = any(e.member and e.group["nonfinite"] != "ignore" for e in entries)
        flags = len(entries) + sum(self.copied) + len(self.watched) + 5
        made = self.comm.size > 1 and (checked or self.watched or self.has_lag)
        return 4 * flags if made else 0

    def reach(
        self,
        grads: Sequence[Tensor | None],
        now: Reading,
        *,
        new: bool,
        failures: Failures,
    ) -> list[bool] | None:
        """Agree on a step.

        Args:
            grads: This rank's gradients, by parameter.
            now: The options of each group.
            new: This rank has parameters that are not planned yet.
            failures: What this rank knows to have failed in an earlier step. Ranks
                that wait for no data of the rank that failed learn of it here.

        Returns:
            Which parameters take part, the same on all ranks; None to do nothing.

        Raises:
            RuntimeError: On every rank, if an earlier step, or a basis that is due,
                failed on any, and for a gradient on any that is sparse, not finite, of
                a wider dtype than planned or not the rank's piece of the whole, or
                that is missing on one of two ranks with the same piece.
            ValueError: On every rank, for options that are invalid or fixed by the
                plan, param groups that differ between ranks and, before the first
                step and the first one after a load, different replicas.
        """
        own = _COMPLAINT if now.complaint else _NEW if new else 0
        policies = [
            "ignore" if own or not e.member else now.options[id(e.group)].nonfinite
            for e in self.entries
        ]
        present = [int(grad is not None) for grad in grads]
        problem = 0 if own else self._problem(grads, policies)
        state = own or int(
            self.started
            or any(g is not None and not problem and bool(g.any()) for g in grads)
        )
        checked = any(policy != "ignore" for policy in policies)
        flags = [*present, *self._missing(grads), *self._lacks()]
        flags += [failures.status, problem, state, now.fingerprint, -now.fingerprint]
        must = bool(self.watched) or self.has_lag
        asked = checked or self._checked or not self.started or must
        if self.comm.size > 1 and asked:
            shared = torch.tensor(flags, dtype=torch.int32)
            shared = shared.to(self.comm.device(device_of(self.entries)))
            self.comm.all_reduce_max_(shared)
            flags = shared.tolist()
        *flags, failed, problem, state, high, low = flags
        failures.status = failed
        failures.raise_noted([entry.spec.name for entry in self.entries])
        self.unplanned = state == _NEW
        if state == _COMPLAINT or high != -low:
            self._raise_differences(now)
        if self.unplanned:
            return None
        self._checked = checked
        if problem:
            self._refuse(problem)
            return None
        lacks = flags[len(flags) - len(self.watched) :]
        self.lacking = {m.key: bool(x) for m, x in zip(self.watched, lacks)}
        self._compare(present, flags, weights=bool(state))
        if not state:
            return None
        self.started = True
        return [bool(p) for p in flags[: len(grads)]]

    def _missing(self, grads: Sequence[Tensor | None]) -> list[int]:
        """Whether this rank lacks a gradient, for each parameter with copies."""
        return [
            int(grad is None and entry.member and entry.region.numel > 0)
            for entry, grad, copied in zip(self.entries, grads, self.copied)
            if copied
        ]

    def _lacks(self) -> list[int]:
        """Whether this rank works without a basis, for each watched matrix."""
        return [
            int(
                self.comm.rank in m.route.team
                and self.bases.lacking(m, self.entries[m.index].state()) != []
            )
            for m in self.watched
        ]

    def _compare(
        self, present: Sequence[int], flags: Sequence[int], *, weights: bool
    ) -> None:
        """See that replicas have the same gradients and, once, the same weights."""
        missing = iter(flags[len(present) :])
        torn = [
            copied and bool(next(missing)) and bool(has)
            for has, copied in zip(flags, self.copied)
        ]
        if any(torn):
            check_presence(self.comm, self.entries, present, torn)
        if weights and self.compared < len(self.entries):
            check_replicas(self.comm, self.entries[self.compared :])
            self.compared = len(self.entries)

    def _raise_differences(self, now: Reading) -> None:
        """Tell every rank the same; a collective unless this rank is alone in it."""
        mine = now.complaint, self.group_options.membership(now.options)
        alone = now.complaint and not self._checked and self.started
        told = [mine] if alone else self.comm.all_gather_object(mine)
        raise ValueError(f"{differences(told)}; nothing has changed")

    def _problem(self, grads: Sequence[Tensor | None], policies: Sequence[str]) -> int:
        """The worst problem of this rank's gradients; 0 if there is none."""
        there = [(i, g) for i, g in enumerate(grads) if g is not None]
        unfit = [_FATAL + _KINDS * i + _BROKEN for i in self.broken]
        unfit += [
            _FATAL + _KINDS * i + kind
            for i, g in there
            if (kind := self._misfit(i, g)) != 0
        ]
        if unfit:
            return max(unfit)
        dense = [(i, g) for i, g in there if policies[i] != "ignore" and g.numel() > 0]
        self.largest = self._magnitudes(dense)
        return max(
            (
                (0 if policies[i] == "skip" else _FATAL) + _KINDS * i + _NONFINITE
                for i, largest in self.largest.items()
                if not math.isfinite(largest)
            ),
            default=0,
        )

    def _misfit(self, i: int, grad: Tensor) -> int:
        """What keeps a gradient from being taken as it is; 0 if nothing does."""
        entry = self.entries[i]
        if grad.layout is not torch.strided:
            return _SPARSE
        if grad.numel() != self.numels[i]:
            return _UNREDUCED
        planned = entry.spec.grad_dtype
        if torch.promote_types(grad.dtype, planned) != planned:
            return _WIDER
        return 0

    def _magnitudes(self, grads: Sequence[tuple[int, Tensor]]) -> dict[int, float]:
        """At least the largest absolute value of each: one pass, one read of the host.

        Args:
            grads: By position of the parameter.

        Returns:
            By position: the Frobenius norm or, where that is so large that its squares
            may have overflowed, what it bounds. NaN for a gradient that has one.
        """
        places = [i for i, _ in grads]
        some = [grad for _, grad in grads]
        if not some:
            return {}
        norms = [norm.float() for norm in torch._foreach_norm(some, 2)]
        return {
            i: norm if norm < _SURE else _largest(grad)
            for i, grad, norm in zip(places, some, torch.stack(norms).tolist())
        }

    def _refuse(self, problem: int) -> None:
        fatal, problem = divmod(problem, _FATAL)
        index, kind = divmod(problem, _KINDS)
        entry = self.entries[index]
        name = entry.spec.name
        if kind == _SPARSE:
            raise RuntimeError(
                f"{name}: {self.name} does not support sparse gradients; "
                "use a dense gradient (sparse=False)"
            )
        if kind == _UNREDUCED:
            raise RuntimeError(
                f"{name}: on at least one rank its gradient is not that rank's shard "
                "of it; the step was refused on every rank and nothing has changed; "
                "leave no_sync() before the last backward pass of a step, so that "
                "gradients are reduced"
            )
        if kind == _WIDER:
            raise RuntimeError(
                f"{name}: on at least one rank its gradient is wider than "
                f"{entry.spec.grad_dtype}, which was planned for; the step was "
                "refused on every rank and nothing has changed; set the parameter's "
                "grad_dtype before the first step"
            )
        if kind == _BROKEN:
            raise RuntimeError(
                f"{name}: a new basis of it is due, which could not be computed on the "
                "rank that does so beside training; the step was refused on every rank "
                "and nothing has changed; restart from a checkpoint"
            ) from self.broken.get(index)
        if not fatal:
            self.skipped_steps += 1
            return
        raise RuntimeError(
            f"{name}: its gradient has NaN or Inf entries on at least one rank; the "
            "step was refused on every rank and nothing has changed; look for the "
            'cause, or pass nonfinite="skip" to skip such steps'
        )


def _largest(grad: Tensor) -> float:
    """The largest absolute value; NaN if there is one."""
    return float(torch.stack(torch.aminmax(grad)).abs().max())
