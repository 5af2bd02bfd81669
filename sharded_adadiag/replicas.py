"""A check that what look like replicas are replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sharded_adadiag.plan.geometry import holders

if TYPE_CHECKING:
    from sharded_adadiag.engine import Engine

# Replicas that drifted by rounding are of no concern, other weights are.
TOLERANCE = 1e-3


def check_replicas(engine: Engine) -> None:
    """Compare the parameters of ranks that hold the same region; a collective.

    Equal regions are updated alike, so different values there mean that the ranks do
    not share these parameters at all: experts or pipeline stages of their own, or
    weights that nobody has synchronised.

    Args:
        engine: About to make its first real step.

    Raises:
        ValueError: On every rank, naming a parameter and two ranks.
    """
    if engine.comm.size == 1:
        return
    entries = [entry for entry in engine.entries if entry.member]
    params = [entry.param.detach() for entry in entries]
    if any(param.is_meta for param in params):
        return
    sums = [
        torch.stack((p.sum(dtype=torch.float64), p.norm(dtype=torch.float64)))
        for p in params
    ]
    mine = torch.stack(sums).tolist()  # one transfer to the host
    everyone = engine.comm.all_gather_object(mine)
    for i, entry in enumerate(entries):
        for first, *others in holders(entry.layout).values():
            total, norm = everyone[first][i]
            for other in others:
                if abs(everyone[other][i][0] - total) > TOLERANCE * norm:
                    raise ValueError(
                        f"{entry.facts.name}: ranks {first} and {other} hold the same "
                        "part of it with different values; synchronise the weights "
                        "before the first step, or, if these ranks have parameters of "
                        "their own (experts, pipeline stages), pass process_group=, "
                        "the ranks that share them"
                    )
