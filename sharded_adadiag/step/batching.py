"""Parts of a round that are computed together."""

from __future__ import annotations

from typing import Any

from sharded_adadiag.plan.rounds import Part, Round

# Matrices of one shape are updated together up to this many elements: enough to
# keep a GPU busy, few enough to stay in a CPU's cache.
BATCH_NUMEL = {"cpu": 1 << 18, "cuda": 1 << 26}


def make_batches(round_: Round, rank: int, device_type: str) -> list[list[Part]]:
    """Parts alike in shape, layout and dtype, some at a time.

    Args:
        round_: The round.
        rank: This rank.
        device_type: Where the parameters are.

    Returns:
        The batches. Those of matrices whose blocks' sums are added up over ranks are
        equal on every rank.
    """
    limit = BATCH_NUMEL.get(device_type, BATCH_NUMEL["cuda"])
    growing: dict[Any, list[Part]] = {}
    size: dict[Any, int] = {}
    full = []
    for part in round_.parts:
        m = part.matrix
        here = None if part.whole else part.layouts[-1][rank]
        kind = (
            (*m.shape, m.left, m.right, m.work_dtype),
            m.route.stages if m.route.kind != "owner" else None,
            here.shape if here is not None else None,
        )
        growing.setdefault(kind, []).append(part)
        numel = m.view.numel if here is None else here.numel
        size[kind] = size.get(kind, 0) + numel
        if size[kind] + numel > limit:
            full.append(growing.pop(kind))
            del size[kind]
    return full + list(growing.values())
