"""The optimizer and the learning rate schedule of a run, from its flags."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Generator
from typing import Any

import torch
from settings import ROTATION_FLAGS, Settings
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

FLOOR = 0.1  # the last learning rate, as a share of the peak

# name of the flag -> class of sharded_adadiag, sides of a matrix that it rotates
_OURS = {
    "adam": ("AdaDiag", "none"),
    "adadiag": ("AdaDiag", "one"),
    "adadiag++": ("AdaDiag", "two"),
    "adafactor": ("AdafacDiag", "none"),
    "adafacdiag": ("AdafacDiag", "one"),
    "adafacdiag++": ("AdafacDiag", "two"),
    "hfac": ("HfacDiag", "none"),
    "hfacdiag": ("HfacDiag", "one"),
}


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer that `--optimizer` names, for the parameters of the model."""
    options: dict[str, Any] = {
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
    }
    for name in ("betas", "eps", *ROTATION_FLAGS):
        if getattr(settings, name) is not None:
            options[name] = getattr(settings, name)
    if settings.optimizer == "adamw" and settings.plain_lr is None:
        return torch.optim.AdamW(list(model.named_parameters()), **options)
    import sharded_adadiag

    with _shown(settings.rotates):
        groups = sharded_adadiag.param_groups(model)
    for group in groups:
        if settings.plain_lr is not None and not group["rotate"]:
            group["lr"] = settings.plain_lr
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    name, sides = _OURS[settings.optimizer]
    return getattr(sharded_adadiag, name)(groups, sides=sides, **options)


@contextlib.contextmanager
def _shown(wanted: bool) -> Generator[None]:
    """Prints what `param_groups` logs, on rank 0: what is rotated, what is not."""
    logger = logging.getLogger("sharded_adadiag")
    handler = logging.StreamHandler(sys.stdout)
    level = logger.level
    if wanted:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the states that this rank keeps."""
    values = [v for state in optimizer.state.values() for v in state.values()]
    return sum(_local(value).nbytes for value in values if isinstance(value, Tensor))


def adamw_bytes(model: nn.Module) -> int:
    """Bytes that AdamW would keep on this rank: two tensors like each parameter."""
    trained = [param for param in model.parameters() if param.requires_grad]
    return 2 * sum(_local(param).nbytes for param in trained)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def lr_factor(step: int, *, warmup: int, steps: int) -> float:
    """The learning rate of the update after `step` others, as a share of the peak.

    Rises linearly to 1 over `warmup` updates, then falls along a cosine that
    reaches the floor at the last update.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedule(optimizer: torch.optim.Optimizer, settings: Settings) -> LambdaLR:
    """Warm-up, then cosine."""
    return LambdaLR(
        optimizer,
        lambda step: lr_factor(step, warmup=settings.warmup, steps=settings.steps),
    )
