"""Imports sharded_adadiag with torch, where an environment variable asks for it.

torch calls `load` at the end of ``import torch`` (entry point ``torch.backends``).
With ``SHARDED_ADADIAG_AUTOLOAD=1`` a DeepSpeed config file can name the optimizers
without any change to the script; without it nothing is done. A module of its own,
because the package itself imports torch. It must never break ``import torch``.
"""

import os
import sys


def load() -> None:
    """Register the optimizers if ``SHARDED_ADADIAG_AUTOLOAD`` is 1."""
    if os.environ.get("SHARDED_ADADIAG_AUTOLOAD") != "1":
        return
    try:
        import sharded_adadiag  # noqa: F401
    except BaseException as error:
        # Not a warning: filters may turn one into an exception.
        print(f"sharded_adadiag was not loaded: {error!r}", file=sys.stderr)
