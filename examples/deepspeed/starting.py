"""What DeepSpeed needs before it starts, on machines without a GPU and with one."""

from __future__ import annotations

import warnings

import deepspeed.ops
from deepspeed.accelerator import get_accelerator


def prepare() -> str:
    """The kind of device DeepSpeed will use; call it before `deepspeed.initialize`.

    On a CPU that would compile an extension in C++ (a minute, and an error where there
    is no compiler) that only inference uses: here it is told that there is none.
    """
    # DeepSpeed 0.19 calls by their old names what torch 2.13 has renamed: a warning
    # at each of thousands of calls.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    device = get_accelerator().device_name()
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return device
