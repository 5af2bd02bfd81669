"""Ways to call an optimizer that cannot work for ranks that step together.

Private name used, tried with torch 2.11 and 2.13:
``torch._C._current_graph_task_id``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.amp import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

# The backward pass that this thread is in the middle of; -1 if it is in none.
backward_pass = torch._C._current_graph_task_id


def refuse_in_backward(method: str) -> None:
    """Refuse a step that a gradient hook makes in the middle of a backward pass.

    Args:
        method: The optimizer's name.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        f"{method}.step() was called inside a backward pass (optimizer in "
        "backward, a gradient hook): the ranks exchange the gradients of all "
        "matrices at once, and hooks run one by one in an order that may differ "
        "between ranks; call step() after backward()"
    )


def refuse_local_scaler(scaler: Any, groups: list[dict[str, Any]]) -> None:
    """Refuse a gradient scaler whose ranks would skip different steps.

    ``torch.amp.GradScaler`` looks at this rank's gradients only. For DTensors torch
    makes that a matter of all ranks and under DDP all have the same, but the flat
    pieces of FSDP1 are plain tensors: one rank would skip and the others wait for it.

    Args:
        scaler: Who is about to call ``step``.
        groups: The optimizer's param groups.

    Raises:
        RuntimeError: For ``torch.amp.GradScaler`` and parameters of FSDP1.
    """
    if not isinstance(scaler, GradScaler) or isinstance(scaler, ShardedGradScaler):
        return
    params = (param for group in groups for param in group["params"])
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        raise RuntimeError(
            f"{type(scaler).__name__} sees only this rank's piece of the gradients of "
            "FullyShardedDataParallel, so ranks would skip different steps; use "
            "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler"
        )
