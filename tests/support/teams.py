"""Teams of a size that a test wants, whatever the balance says."""

import contextlib
import threading
from collections.abc import Generator

from sharded_adadiag.plan import placing
from sharded_adadiag.plan.geometry import ranks_of
from sharded_adadiag.plan.teams import Team

# Ranks are threads, and each may want another size: so the functions are replaced once
# and for all, and do as ever where nobody has asked for a size.
_choose, _choose_teams = placing.choose, placing.choose_teams
_main = threading.main_thread()
_sizes: dict[threading.Thread, int] = {}


def _size() -> int | None:
    return _sizes.get(threading.current_thread(), _sizes.get(_main))


@contextlib.contextmanager
def teams_of(size: int) -> Generator[None]:
    """Every matrix gets this many ranks, or as many as it has lines to divide.

    The first team begins at rank 0, the next at rank 1, and so on; its head is the
    last of its ranks. In the main thread it holds for all.
    """
    thread = threading.current_thread()
    _sizes[thread] = size
    try:
        yield
    finally:
        del _sizes[thread]


def _choose_kinds(candidates, world_size):
    """Else "auto" gives some matrices to all ranks before teams are chosen."""
    if _size() is None:
        return _choose(candidates, world_size)
    return ["owner"] * len(candidates)


def _choose_sizes(demands, world_size, borne=(), **more):
    size = _size()
    if size is None:
        return _choose_teams(demands, world_size, borne, **more)
    chosen = []
    for i, one in enumerate(demands):
        count = min(size, world_size, one.lines)
        ranks = sorted((i + k) % world_size for k in range(count))
        chosen.append(Team(ranks_of(ranks), ranks[-1]))
    return chosen


placing.choose, placing.choose_teams = _choose_kinds, _choose_sizes
