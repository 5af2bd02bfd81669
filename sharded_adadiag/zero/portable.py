"""Checkpoints that leave DeepSpeed: by parameter name, in full logical tensors.

A run under any ZeRO stage goes on under FSDP, DDP or one process, and back, on any
number of ranks: weights and states travel as DTensors sharded by rows, which
``torch.distributed.checkpoint`` writes once and reads anywhere.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.checkpoint.hooks import read_stamps, stamp
from sharded_adadiag.checkpoint.logical import LogicalState, StateTensor, as_column
from sharded_adadiag.checkpoint.saved_state import SavedState
from sharded_adadiag.params.local import LocalParam, device_of
from sharded_adadiag.step.engine import Engine


@torch.no_grad()
def portable_state_dict(engine: Any) -> dict[str, Any]:
    """The run of a DeepSpeed engine, for ``torch.distributed.checkpoint.save``.

    Weights are DeepSpeed's float32 master weights. The same keys come from
    ``get_model_state_dict`` and ``get_optimizer_state_dict`` of torch for a model under
    FSDP2 and an optimizer made of ``param_groups(model)``. A collective.

    Args:
        engine: What ``deepspeed.initialize`` returned, at ZeRO stage 1, 2 or 3.

    Returns:
        ``model`` and ``optimizer``.

    Raises:
        TypeError: If its optimizer is not one of this package.
        ValueError: At stage 0, where torch's own functions do.
    """
    with _flats_at_hand(engine) as (optimizer, ours):
        logical = LogicalState(ours.comm, device_of(ours.entries))
        tensors = [_weight(entry) for entry in ours.entries]
        weights = logical.save(tensors, [[entry.param] for entry in ours.entries])
        model = dict(zip((t.name for t in tensors), weights))
        model |= _untrained(engine.module, model)
        ours.put_bases()
        states = SavedState(ours.entries, ours.plan.matrices, ours.comm).save()
        groups = _groups(optimizer, ours)
    names = [entry.spec.name for entry in ours.entries]
    return {
        "model": model,
        "optimizer": {
            "state": {names[i]: state for i, state in states.items()},
            "param_groups": groups,
        },
    }


@torch.no_grad()
def load_portable_state_dict(engine: Any, state_dict: Mapping[str, Any]) -> None:
    """Continue in a DeepSpeed engine what `portable_state_dict` or torch saved.

    Learning rate and the other options stay those of the engine. Load into what
    `portable_state_dict` gives with ``torch.distributed.checkpoint.load``, then pass
    it here. A collective.

    Args:
        engine: What ``deepspeed.initialize`` returned, at ZeRO stage 1, 2 or 3.
        state_dict: ``model`` and ``optimizer``.

    Raises:
        TypeError: If the engine's optimizer is not one of this package.
        ValueError: For a missing weight or a wrong shape, naming the parameter.
    """
    with _flats_at_hand(engine) as (optimizer, ours):
        weights, states = state_dict["model"], state_dict["optimizer"]["state"]
        skipped = read_stamps(state_dict["optimizer"]["param_groups"])
        names = [entry.spec.name for entry in ours.entries]
        rest = _untrained_tensors(engine.module, names)
        missing = [name for name in [*names, *rest] if name not in weights]
        if missing:
            raise ValueError(f"{missing[0]}: the checkpoint has no such weight")
        logical = LogicalState(ours.comm, device_of(ours.entries))
        tensors = [_weight(entry) for entry in ours.entries]
        pieces = logical.load(tensors, [weights[name] for name in names])
        optimizer.state.clear()  # what the checkpoint lacks starts from zero
        ours.allocate()
        SavedState(ours.entries, ours.plan.matrices, ours.comm).load({
            i: states[n] for i, n in enumerate(names) if n in states
        })
        ours.mark_loaded()
        for entry, (piece,) in zip(ours.entries, pieces):
            entry.param.copy_(piece.view(entry.param.shape))
        optimizer._binding.skipped_steps = skipped
        for name in sorted(set(states) - set(names)):
            warnings.warn(
                f"{name}: the engine does not train it; its state was dropped",
                UserWarning,
                stacklevel=2,
            )
        _publish_weights(engine, ours)
        _load_untrained(rest, weights)


def _weight(entry: LocalParam) -> StateTensor:
    """The master weight of a parameter as a tensor of the saved form."""
    shape, layout = entry.spec.shape, entry.layout
    rows, cols = entry.spec.stored
    if len(shape) < 2:
        rows, cols, layout = math.prod(shape), 1, as_column(layout)
    name, dtype = entry.spec.name, entry.spec.dtype
    return StateTensor(name, "weight", shape, cols, ((rows, layout),), dtype)


@contextlib.contextmanager
def _flats_at_hand(engine: Any) -> Generator[tuple[Any, Engine]]:
    """The optimizer and its engine; stage 3 hides its flat tensors between steps."""
    zero = engine.optimizer
    optimizer = getattr(zero, "optimizer", zero)
    if not isinstance(getattr(optimizer, "rule", None), Rule):
        raise TypeError(
            f"the engine's optimizer is {type(optimizer).__name__}; only those of "
            "sharded_adadiag have a portable checkpoint"
        )
    if engine.zero_optimization_stage() == 0:
        raise ValueError(
            "at ZeRO stage 0 every rank has plain parameters: use get_state_dict and "
            "set_state_dict of torch.distributed.checkpoint.state_dict"
        )
    stage_3 = hasattr(zero, "_set_fp32_optimizer_param_groups")
    if stage_3:
        zero._set_fp32_optimizer_param_groups()
    try:
        yield optimizer, optimizer._binding.prepared()
    finally:
        if stage_3:
            zero._clear_fp32_optimizer_param_groups()


def _groups(optimizer: Any, ours: Engine) -> list[dict[str, Any]]:
    """The param groups as `param_groups` sorts them: matrices, and the rest."""
    sorted_groups = []
    for group in optimizer.param_groups:
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        stamp(options, optimizer._binding)
        members: dict[bool, list[str]] = {True: [], False: []}
        for entry in ours.entries:
            if entry.group is group:
                view = entry.spec.view
                matrix = min(max(view.heights, default=0), view.cols) > 1
                members[matrix and entry.spec.options.rotate].append(entry.spec.name)
        for rotate, names in members.items():
            if names:
                own = {"rotate": rotate, "params": names, "param_names": names}
                sorted_groups.append({**options, **own})
    return sorted_groups


def _untrained_tensors(
    module: torch.nn.Module, trained: Iterable[str]
) -> dict[str, Tensor]:
    """Frozen parameters and saved buffers; stage 3 may have cut the former."""
    saved, known = set(module.state_dict()), set(trained)
    named = [*module.named_buffers(), *module.named_parameters()]
    return {n: t for n, t in named if n not in known and n in saved}


def _untrained(
    module: torch.nn.Module, trained: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The same whole; stage 3 gathers parameters one by one."""
    import deepspeed

    rest = {}
    for name, tensor in _untrained_tensors(module, trained).items():
        with deepspeed.zero.GatheredParameters([tensor]):
            rest[name] = tensor.detach().clone()
    return rest


def _load_untrained(rest: dict[str, Tensor], weights: Mapping[str, Any]) -> None:
    import deepspeed

    for name, tensor in rest.items():
        value = weights[name]
        value = value.full_tensor() if isinstance(value, DTensor) else value
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.data.copy_(value)


def _publish_weights(engine: Any, ours: Engine) -> None:
    """Give the model the new master weights."""
    zero = engine.optimizer
    if hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()
    for stored, entry in engine.optimizer.optimizer._binding.flats.stored(ours):
        stored.copy_(entry.param)
    zero.checkpoint_event_epilogue()
