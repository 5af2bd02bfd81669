"""Runs a training script that names an optimizer of this package in a config file.

    deepspeed --module sharded_adadiag.run train.py --deepspeed_config ds_config.json
    torchrun --nproc-per-node=8 -m sharded_adadiag.run train.py ...

The script needs no change: importing the package has registered the optimizers.
"""

from __future__ import annotations

import os
import runpy
import sys

import sharded_adadiag  # noqa: F401 - registers the optimizers


def main() -> None:
    """Run the script that the first argument names, with the other arguments."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m sharded_adadiag.run SCRIPT [ARGUMENTS]")
    del sys.argv[0]
    # As `python SCRIPT` does: its folder comes first on the path.
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
