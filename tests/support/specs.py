"""Parameters for plans: what an optimizer would tell of them, without tensors."""

from __future__ import annotations

import torch

from sharded_adadiag.options import Options
from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.plan.regions import Box
from sharded_adadiag.plan.spec import ParamSpec


def spec(name: str, *shape: int, **options) -> ParamSpec:
    return ParamSpec(name, shape, torch.float32, torch.float32, Options(**options))


def row_shards(*shape: int, ranks: int) -> Layout:
    """Shard(0) as FSDP2 cuts it: equal blocks, the last ones smaller or empty."""
    rows, cols = shape if len(shape) > 1 else (1, shape[0])
    length = shape[0]
    size = -(-length // ranks)
    cuts = [min(size * i, length) for i in range(ranks + 1)]
    if len(shape) > 1:
        return Layout.of(Box(a, b, 0, cols) for a, b in zip(cuts, cuts[1:]))
    return Layout.of(Box(0, rows, a, b) for a, b in zip(cuts, cuts[1:]))
