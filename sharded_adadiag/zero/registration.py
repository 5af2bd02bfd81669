"""How DeepSpeed finds an optimizer that its config file names.

DeepSpeed looks up a name that it does not know in ``torch.optim``, and takes an
optimizer for ZeRO whose exact type is in a list of its own. There is no other registry.

Private name used, tried with DeepSpeed 0.19.8:
``deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS``.
"""

from __future__ import annotations

import sys

import torch


def register(*optimizers: type[torch.optim.Optimizer]) -> None:
    """Make optimizers known by name, as ``"optimizer": {"type": NAME}``.

    Args:
        *optimizers: Classes, known by their own names.
    """
    for optimizer in optimizers:
        setattr(torch.optim, optimizer.__name__, optimizer)


def admit_to_zero(optimizer: type[torch.optim.Optimizer]) -> None:
    """Tell DeepSpeed, if it is in use, that ZeRO may wrap an optimizer.

    With this ``zero_allow_untested_optimizer`` is not needed.

    Args:
        optimizer: The class; exactly this type is admitted.
    """
    zero = sys.modules.get("deepspeed.runtime.zero.utils")
    admitted = getattr(zero, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if admitted is not None and optimizer not in admitted:
        admitted.append(optimizer)
