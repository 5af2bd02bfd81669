"""What the ranks agree on before a step changes anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sharded_adadiag.config import Options
from sharded_adadiag.group_options import Reading, differences
from sharded_adadiag.replicas import check_replicas

if TYPE_CHECKING:
    from sharded_adadiag.engine import Engine

_NONFINITE, _SPARSE, _UNREDUCED = 1, 2, 3
# After 0 and 1: whether any gradient is not zero.
_NEW, _COMPLAINT = 2, 3


class Agreement:
    """One small all-reduce at the head of a step.

    It carries whether each parameter has a gradient on any rank, the worst problem
    found on any, and (until the first real step) whether any gradient is not zero:
    torch's state-dict helpers and DeepSpeed make a first step with zero gradients
    only to create the states. Further it tells whether a rank has new parameters or
    invalid options, and compares the ranks' param groups by a fingerprint.

    Once every group says ``nonfinite="ignore"`` there is none, and none of this is
    compared: ranks must then edit their groups alike.

    Args:
        engine: Whose steps they are.

    Attributes:
        started: A real step has been made.
        unplanned: The last call found new parameters and did nothing else.
        skipped_steps: Steps skipped for a non-finite gradient.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.started = False
        self.skipped_steps = 0
        self.unplanned = False
        self._checked = True  # ranks that stop checking must have agreed to it

    def nbytes(self) -> int:
        """Bytes of the all-reduce of an ordinary step; 0 if there is none."""
        entries = self.engine.entries
        checked = any(e.member and e.group["nonfinite"] != "ignore" for e in entries)
        return 4 * (len(entries) + 4) if self.engine.comm.size > 1 and checked else 0

    def reach(
        self, grads: Sequence[Tensor | None], now: Reading, *, new: bool
    ) -> list[bool] | None:
        """Agree on a step.

        Args:
            grads: This rank's gradients, by parameter.
            now: The options of each group.
            new: This rank has parameters that are not planned yet.

        Returns:
            Which parameters take part, the same on all ranks; None to do nothing.

        Raises:
            RuntimeError: On every rank, for a gradient on any that is sparse, not
                finite, or not the rank's piece of the whole.
            ValueError: On every rank, for options that are invalid or fixed by the
                plan, param groups that differ between ranks and, before the first
                step, different replicas.
        """
        own = _COMPLAINT if now.complaint else _NEW if new else 0
        checked = [
            not own and e.member and now.options[id(e.group)].nonfinite != "ignore"
            for e in self.engine.entries
        ]
        present = [int(grad is not None) for grad in grads]
        problem = 0 if own else self._problem(grads, checked)
        state = own or int(
            self.started
            or any(g is not None and not problem and bool(g.any()) for g in grads)
        )
        flags = [*present, problem, state, now.fingerprint, -now.fingerprint]
        if self.engine.comm.size > 1 and (
            any(checked) or self._checked or not self.started
        ):
            shared = torch.tensor(flags, dtype=torch.int32)
            shared = shared.to(self.engine.comm.device(self.engine.device))
            self.engine.comm.all_reduce_max_(shared)
            flags = shared.tolist()
        *present, problem, state, high, low = flags
        self.unplanned = state == _NEW
        if state == _COMPLAINT or high != -low:
            self._raise_differences(now)
        if self.unplanned:
            return None
        self._checked = any(checked)
        if problem:
            self._refuse(problem, now.options)
            return None
        if not state:
            return None
        if not self.started:
            check_replicas(self.engine)
        self.started = True
        return [bool(p) for p in present]

    def _raise_differences(self, now: Reading) -> None:
        """Tell every rank the same; a collective unless this rank is alone in it."""
        mine = now.complaint, self.engine.group_options.membership(now.options)
        alone = now.complaint and not self._checked and self.started
        told = [mine] if alone else self.engine.comm.all_gather_object(mine)
        raise ValueError(f"{differences(told)}; nothing has changed")

    def _problem(self, grads: Sequence[Tensor | None], checked: Sequence[bool]) -> int:
        """The worst problem of this rank's gradients; 0 if there is none."""
        there = [(i, g) for i, g in enumerate(grads) if g is not None]
        unfit = [
            4 * i + (_SPARSE if g.layout is not torch.strided else _UNREDUCED)
            for i, g in there
            if g.layout is not torch.strided
            or g.numel() != self.engine.entries[i].region.numel
        ]
        if unfit:
            return max(unfit)
        dense = [(i, g) for i, g in there if checked[i] and g.numel() > 0]
        if not dense:
            return 0
        # A sum is finite only if every entry is. It is one pass without a temporary
        # and one transfer to the host; a sum that merely overflowed is looked into.
        sums = [
            g.sum(dtype=torch.promote_types(g.dtype, torch.float32)) for _, g in dense
        ]
        doubtful = [
            (i, g)
            for (i, g), total in zip(dense, torch.stack(sums).tolist())
            if not math.isfinite(total)
        ]
        bad = [4 * i + _NONFINITE for i, g in doubtful if not g.isfinite().all()]
        return max(bad, default=0)

    def _refuse(self, problem: int, options: dict[int, Options]) -> None:
        index, kind = divmod(problem, 4)
        entry = self.engine.entries[index]
        name = entry.facts.name
        if kind == _SPARSE:
            raise RuntimeError(
                f"{name}: {self.engine.method.name} does not support sparse gradients; "
                "use a dense gradient (sparse=False)"
            )
        if kind == _UNREDUCED:
            raise RuntimeError(
                f"{name}: on at least one rank its gradient is not that rank's shard "
                "of it; the step was refused on every rank and nothing has changed; "
                "leave no_sync() before the last backward pass of a step, so that "
                "gradients are reduced"
            )
        if options[id(entry.group)].nonfinite == "skip":
            self.skipped_steps += 1
            return
        raise RuntimeError(
            f"{name}: its gradient has NaN or Inf entries on at least one rank; the "
            "step was refused on every rank and nothing has changed; look for the "
            'cause, or pass nonfinite="skip" to skip such steps'
        )
