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
    """Run the script that the arguments name, with the other arguments."""
    # Not always the first: `deepspeed --module` puts its --local_rank before it.
    place = next((i for i, a in enumerate(sys.argv) if i and a[:1] != "-"), None)
    if place is None:
        sys.exit("usage: python -m sharded_adadiag.run SCRIPT [ARGUMENTS]")
    script = sys.argv.pop(place)
    sys.argv[0] = script
    # As `python SCRIPT` does: its folder comes first on the path.
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
