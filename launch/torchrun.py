"""torchrun whose failures are told in one line, with the exit code of the rank.

torchrun itself prints 30 lines of its own traceback after those of the rank, and ends
with exit code 1 whatever happened. Arguments are torchrun's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
)

USAGE = 2  # exit code of a program whose flags were wrong; it has said so itself


def describe(rank: int, failure: ProcessFailure) -> str:
    ended = f"exit code {failure.exitcode}"
    if failure.exitcode < 0:
        ended = failure.signal_name()
    return f"launch: rank {rank} ended first, with {ended}; its message is above"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ranks; returns the exit code, 128 + N after signal N as in a shell."""
    # It would say what `describe` does.
    api = "torch.distributed.elastic.multiprocessing.api"
    logging.getLogger(api).setLevel(logging.CRITICAL)
    try:
        run.main(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != USAGE:
            print(describe(rank, failure), file=sys.stderr)
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        print(f"launch: ended by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
