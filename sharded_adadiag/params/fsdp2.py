"""FSDP2 (``fully_shard``): its DTensors tell all, as long as they are the parameters.

Private names read, tried with torch 2.11 and 2.13: ``FSDPModule._get_fsdp_state``, its
``_fsdp_param_groups`` (``_fsdp_param_group`` before 2.12) and their ``is_unsharded``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def refuse_unsharded(model: nn.Module) -> None:
    """Refuse a model of which FSDP2 has gathered a module for computation.

    Between forward and backward pass the parameters of such a module are full plain
    tensors that soon vanish; an optimizer made of them would train nothing.

    Args:
        model: Any model; one without FSDP2 modules is accepted.

    Raises:
        RuntimeError: Naming the module and the remedy.
    """
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", [state._fsdp_param_group])
        if any(group is not None and group.is_unsharded for group in groups):
            raise RuntimeError(
                f"{name or 'the model'}: fully_shard has gathered its parameters for a "
                "forward or backward pass; make the optimizer before the first "
                "forward pass, or call reshard() on the module"
            )
