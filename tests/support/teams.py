"""Teams of a size that a test wants, whatever the balance says."""

import contextlib
from collections.abc import Generator
from unittest import mock

from sharded_adadiag.plan import matrices
from sharded_adadiag.plan.geometry import ranks_of
from sharded_adadiag.plan.teams import Team


@contextlib.contextmanager
def teams_of(size: int) -> Generator[None]:
    """Every matrix gets this many ranks, or as many as it has lines to divide.

    The first team begins at rank 0, the next at rank 1, and so on; its head is the
    last of its ranks.
    """

    def choose(divisibles, world_size, borne=(), **_):
        chosen = []
        for i, one in enumerate(divisibles):
            count = min(size, world_size, one.lines)
            ranks = sorted((i + k) % world_size for k in range(count))
            chosen.append(Team(ranks_of(ranks), ranks[-1]))
        return chosen

    # "auto" would give some matrices to all ranks before teams are chosen.
    none = mock.patch.object(matrices, "choose", lambda some, _: ["owner"] * len(some))
    with mock.patch.object(matrices, "choose_teams", choose), none:
        yield
