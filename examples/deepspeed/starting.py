"""What the programs of this folder do before DeepSpeed starts.

The launcher runs this file on the flags, with the standard library alone.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from settings import Settings, check, parse

# Settings for which DeepSpeed has a place in its config file, or no use.
NO_FLAGS = (
    *("optimizer", "lr", "betas", "eps", "weight_decay", "refresh_every", "warmup"),
    *("distribution", "basis", "on_refresh", "batch", "micro_batch", "precision"),
    *("grad_clip", "device", "keep_last", "compare"),
)


def read_arguments(argv: Sequence[str] | None = None) -> tuple[Path, Settings]:
    """The path of the config file, and the settings that it leaves to flags."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument(
        "--deepspeed_config", type=Path, required=True, help="DeepSpeed's JSON file"
    )
    own.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher")
    settings = parse(argv, without=NO_FLAGS, parents=[own])
    return own.parse_known_args(argv)[0].deepspeed_config, settings


def prepare() -> str:
    """The kind of device DeepSpeed will use; call it before `deepspeed.initialize`.

    On a CPU that would compile an extension in C++ (a minute, and an error where there
    is no compiler) that only inference uses: here it is told that there is none.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed 0.19 calls by their old names what torch 2.13 has renamed: a warning
    # at each of thousands of calls.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    device = get_accelerator().device_name()
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return device


if __name__ == "__main__":
    sys.exit(check(read_arguments))
