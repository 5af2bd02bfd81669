"""Parameters that are not rotated: Adam where they lie, without communication."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sharded_adadiag.algorithm.adam import adam_
from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.options import Options
from sharded_adadiag.params.local import LocalParam, local

# torch's CPU kernel computes the entries after the last full vector with scalar code
# that rounds otherwise. Where they are depends on how a tensor is sharded, so tensors
# are padded to a multiple of this, which holds a vector of any dtype.
VECTOR_NUMEL = 64


def plain_update(
    rule: Rule, entries: Sequence[LocalParam], options: dict[int, Options]
) -> None:
    """AdamW on local shards; without momentum the gradient is the first moment.

    A gradient in another dtype than its parameter's is not rounded to it: the step is
    computed in the wider of both, at least in float32, and its results are rounded.

    Args:
        rule: The optimizer.
        entries: Parameters of which some rank has a gradient.
        options: The options of each param group, by the group's ``id``.
    """
    groups: dict[tuple[object, ...], list[LocalParam]] = {}
    for entry in entries:
        state = entry.state()
        state["step"] += 1
        grad = entry.grad()
        if grad is None or grad.numel() == 0:
            continue
        moment = local(state["exp_avg_sq"])
        key = (
            id(entry.group),
            entry.param.device,
            (entry.param.dtype, grad.dtype, moment.dtype),
            int(state["step"]),
            _needs_flattening(_tensors(entry)),
        )
        groups.setdefault(key, []).append(entry)
    for alike in groups.values():
        entry, group = alike[0], options[id(alike[0].group)]
        state = entry.state()
        given = [_tensors(entry) for entry in alike]
        tensors = [_in_one_dtype(t) for t in given]
        first = tensors[0]
        same = first["param"].dtype == first["exp_avg_sq"].dtype
        update = _adamw if same and "exp_avg" in first else _by_direction
        if any(_needs_flattening(t) for t in tensors):
            whole = {name: _joined([t[name] for t in tensors]) for name in tensors[0]}
            update([whole], group, int(state["step"]))
            for name, value in whole.items():
                if name != "grad":
                    _split_into(value, [t[name] for t in tensors])
        else:
            update(tensors, group, int(state["step"]))
        for before, after in zip(given, tensors):
            for name, value in before.items():
                if value is not after[name] and name != "grad":
                    value.copy_(after[name])


def _tensors(entry: LocalParam) -> dict[str, Tensor]:
    """The local tensors of a parameter, by name."""
    grad = entry.grad()
    assert grad is not None
    state = {k: local(v) for k, v in entry.state().items() if k != "step"}
    return {"param": entry.param, "grad": grad, **state}


def _in_one_dtype(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the widest dtype, if the gradient has another than the parameter."""
    if tensors["grad"].dtype == tensors["param"].dtype:
        return tensors
    widest = torch.float32
    for tensor in tensors.values():
        widest = torch.promote_types(widest, tensor.dtype)
    return {name: tensor.to(widest) for name, tensor in tensors.items()}


def _needs_flattening(tensors: dict[str, Tensor]) -> bool:
    """Whether torch's CPU kernel, which walks through memory, cannot take them."""
    param = tensors["param"]
    if param.device.type != "cpu":
        return False
    alike = all(tensor.stride() == param.stride() for tensor in tensors.values())
    return not alike or param.numel() % VECTOR_NUMEL != 0


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One flat tensor with all entries, and ones up to a full vector."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    missing = -sum(t.numel() for t in flat) % VECTOR_NUMEL
    return torch.cat([*flat, flat[0].new_ones(missing)])


def _split_into(whole: Tensor, tensors: Sequence[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        part = whole[start : start + tensor.numel()]
        tensor.copy_(part.view(tensor.shape))
        start += tensor.numel()


def _adamw(tensors: Sequence[dict[str, Tensor]], options: Options, step: int) -> None:
    """AdamW as torch has it."""
    fused = tensors[0]["param"].device.type == "cpu"
    adamw(
        [t["param"] for t in tensors],
        [t["grad"] for t in tensors],
        [t["exp_avg"] for t in tensors],
        [t["exp_avg_sq"] for t in tensors],
        [],
        [torch.tensor(step - 1.0) for _ in tensors],
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


def _by_direction(
    tensors: Sequence[dict[str, Tensor]], options: Options, step: int
) -> None:
    """Moments in a dtype of their own, or no first moment."""
    lr = float(options.lr)
    work = torch.promote_types(tensors[0]["grad"].dtype, torch.float32)
    directions = [t["grad"].to(work, copy=True) for t in tensors]
    adam_(directions, tensors, options, step)
    for t, direction in zip(tensors, directions):
        if options.weight_decay:
            t["param"].mul_(1.0 - lr * options.weight_decay)
        t["param"].add_(direction, alpha=lr if options.maximize else -lr)
