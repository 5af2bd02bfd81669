"""Parameters that are not rotated: Adam where they lie, without communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.adamw import adamw

from sharded_adadiag.algorithm.adam import adam_directions
from sharded_adadiag.algorithm.state import Method
from sharded_adadiag.config import Options
from sharded_adadiag.integrations.parameters import local

if TYPE_CHECKING:
    from sharded_adadiag.engine import Entry


def plain_update(
    method: Method, entries: Sequence[Entry], options: dict[int, Options]
) -> None:
    """AdamW on local shards; without momentum the gradient is the first moment.

    Args:
        method: The optimizer.
        entries: Parameters of which some rank has a gradient.
        options: Of each group, by its identity.
    """
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        grad = entry.grad()
        if grad is None or grad.numel() == 0:
            entry.state()["step"] += 1
            continue
        kinds = entry.param.dtype, grad.dtype, local(entry.state()["exp_avg_sq"]).dtype
        key = (id(entry.group), entry.param.device, *kinds, "exp_avg" in entry.state())
        groups.setdefault(key, []).append(entry)
    for alike in groups.values():
        entry = alike[0]
        group = options[id(entry.group)]
        same = entry.param.dtype == local(entry.state()["exp_avg_sq"]).dtype
        if same and "exp_avg" in entry.state():
            _fused(alike, group)
        else:
            _by_direction(alike, group)


def _fused(entries: Sequence[Entry], options: Options) -> None:
    """AdamW as torch has it."""
    fused = entries[0].param.device.type == "cpu"
    states = [entry.state() for entry in entries]
    adamw(
        [entry.param for entry in entries],
        _grads(entries),
        [local(state["exp_avg"]) for state in states],
        [local(state["exp_avg_sq"]) for state in states],
        [],
        [state["step"] for state in states],
        fused=fused,
        foreach=not fused,
        amsgrad=False,
        beta1=options.betas[0],
        beta2=options.betas[1],
        lr=float(options.lr),
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=options.maximize,
    )


def _by_direction(entries: Sequence[Entry], options: Options) -> None:
    """Moments in a dtype of their own, or no first moment."""
    lr = float(options.lr)
    states = [entry.state() for entry in entries]
    for state in states:
        state["step"] += 1
    moments = [
        {k: local(v) for k, v in state.items() if k != "step"} for state in states
    ]
    work = [g.float() if g.element_size() < 4 else g for g in _grads(entries)]
    directions = adam_directions(
        work, moments, options, [int(state["step"]) for state in states]
    )
    for entry, direction in zip(entries, directions):
        if options.weight_decay:
            entry.param.mul_(1.0 - lr * options.weight_decay)
        entry.param.add_(direction, alpha=lr if options.maximize else -lr)


def _grads(entries: Sequence[Entry]) -> list[Tensor]:
    return [grad for entry in entries if (grad := entry.grad()) is not None]
