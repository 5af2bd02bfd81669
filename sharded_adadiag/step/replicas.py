"""A check that what look like replicas are replicas."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sharded_adadiag.comm.collectives import Communicator
from sharded_adadiag.params.local import LocalParam

# Replicas that drifted by rounding are of no concern, other weights are.
TOLERANCE = 1e-3


def check_presence(
    comm: Communicator,
    entries: Sequence[LocalParam],
    present: Sequence[int],
    torn: Sequence[bool],
) -> None:
    """Refuse gradients that only some of the replicas have; a collective.

    Replicas are updated without a word between them, so one that has no gradient
    would keep its weights while the others move on.

    Args:
        comm: The ranks.
        entries: The parameters.
        present: Whether this rank has a gradient of each parameter.
        torn: Which parameters have one on some ranks and lack one on others.

    Raises:
        RuntimeError: On every rank, naming a parameter and two ranks.
    """
    everyone = comm.all_gather_object(list(present))
    for i, entry in enumerate(entries):
        for _, ranks in entry.layout.pieces if torn[i] else ():
            has = [rank for rank in ranks if everyone[rank][i]]
            lacks = [rank for rank in ranks if not everyone[rank][i]]
            if has and lacks:
                raise RuntimeError(
                    f"{entry.spec.name}: rank {has[0]} has a gradient of it and rank "
                    f"{lacks[0]}, which holds the same part of it, has none; the step "
                    "was refused on every rank and nothing has changed; synchronise "
                    "the gradients of the ranks of process_group=, with zeros where a "
                    "rank made no use of a parameter"
                )


def check_replicas(comm: Communicator, entries: Sequence[LocalParam]) -> None:
    """Compare the parameters of ranks that hold the same region; a collective.

    Equal regions are updated alike, so different values there mean that the ranks do
    not share these parameters at all: experts or pipeline stages of their own, or
    weights that nobody has synchronised.

    Args:
        comm: The ranks.
        entries: The parameters that have not been compared.

    Raises:
        ValueError: On every rank, naming a parameter and two ranks.
    """
    if comm.size == 1:
        return
    entries = [entry for entry in entries if entry.member]
    params = [entry.param.detach() for entry in entries]
    if any(param.is_meta for param in params):
        return
    sums = [
        torch.stack((p.sum(dtype=torch.float64), p.norm(dtype=torch.float64)))
        for p in params
    ]
    mine = torch.stack(sums).tolist()  # one transfer to the host
    everyone = comm.all_gather_object(mine)
    for i, entry in enumerate(entries):
        for _, (one, *others) in entry.layout.pieces:
            total, norm = everyone[one][i]
            for other in others:
                if abs(everyone[other][i][0] - total) > TOLERANCE * norm:
                    raise ValueError(
                        f"{entry.spec.name}: ranks {one} and {other} hold the same "
                        "part of it with different values; synchronise the weights "
                        "before this step, or, if these ranks have parameters of "
                        "their own (experts, pipeline stages), pass process_group=, "
                        "the ranks that share them"
                    )
