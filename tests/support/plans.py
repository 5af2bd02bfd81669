"""The hidden matrices of models as a plan sees them: shapes and layouts."""

import torch

from sharded_adadiag.algorithm.state import ADADIAG
from sharded_adadiag.options import Options
from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.plan.placing import plan_matrices
from sharded_adadiag.plan.regions import Box, FlatRange
from sharded_adadiag.plan.spec import ParamSpec

LLAMA = {  # hidden, feed-forward, layers, rows of keys and values
    "60M": (512, 1376, 8, 512),
    "130M": (768, 2048, 12, 768),
    "1.3B": (2048, 5461, 24, 2048),
    "7B": (4096, 11008, 32, 4096),
    "70B": (8192, 28672, 80, 1024),
}


def hidden_shapes(model):
    if model == "GPT":
        h = 768
        return [(3 * h, h), (h, h), (4 * h, h), (h, 4 * h)] * 12
    h, ffn, layers, kv = LLAMA[model]
    return [(h, h), (kv, h), (kv, h), (h, h), (ffn, h), (ffn, h), (h, ffn)] * layers


def row_shards(shapes, world_size, replicas=1):
    """FSDP2's: torch.chunk's rows; with replicas, the shards are adjacent ranks."""
    known = {}
    for rows, cols in set(shapes):
        shards = world_size // replicas
        size = -(-rows // shards)
        edges = [min(size * i, rows) for i in range(shards + 1)]
        boxes = [Box(a, b, 0, cols) for a, b in zip(edges, edges[1:])]
        known[rows, cols] = Layout.of(boxes * replicas)
    return [known[shape] for shape in shapes]


def flat_shards(shapes, world_size):
    """ZeRO's: an even share of all entries in a row."""
    sizes = [rows * cols for rows, cols in shapes]
    share = -(-sum(sizes) // world_size)
    layouts, start = [], 0
    for size in sizes:
        pieces = tuple(
            (
                FlatRange(
                    max(rank * share - start, 0),
                    min((rank + 1) * share - start, size),
                ),
                range(rank, rank + 1),
            )
            for rank in range(start // share, -(-(start + size) // share))
        )
        layouts.append(Layout(world_size, pieces))
        start += size
    return layouts


def planned(
    shapes,
    layouts,
    *,
    rule=ADADIAG,
    distribution="auto",
    ranks_per_node=None,
    earlier=(),
    **options,
):
    given = Options(refresh_every=200, **options)
    specs = [
        ParamSpec(f"w{i}", shape, torch.float32, torch.float32, given)
        for i, shape in enumerate(shapes)
    ]
    return plan_matrices(
        specs,
        layouts,
        rule=rule,
        world_size=len(layouts[0]),
        distribution=distribution,
        first_index=len(earlier),
        planned=earlier,
        ranks_per_node=ranks_per_node,
    )


def max_over_mean(loads):
    return max(loads) * len(loads) / sum(loads)


def rank_loads(matrices, world_size):
    """Work of a step and bytes of state, by rank."""
    work, state = [0] * world_size, [0] * world_size
    for matrix in matrices:
        for rank, share in matrix.shares():
            work[rank] += share.step
            state[rank] += share.state_bytes
    return work, state
