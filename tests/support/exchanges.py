"""Random layouts and moves between them, and the entries of a region."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from sharded_adadiag.plan.exchange_plan import ExchangePlan, Move
from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.plan.regions import Box, FlatRange, Region


def entries(matrix: np.ndarray, region: Region) -> np.ndarray:
    """The entries of a region, in its shape."""
    if isinstance(region, FlatRange):
        return matrix.reshape(-1)[region.start : region.stop]
    rows = slice(region.row_start, region.row_stop)
    return matrix[rows, region.col_start : region.col_stop]


def mask(region: Region, shape: tuple[int, int]) -> np.ndarray:
    """Which entries of a matrix are in a region."""
    inside = np.zeros(shape, dtype=bool)
    entries(inside, region)[...] = True
    return inside


@st.composite
def cuts(draw, length, parts):
    """Edges of uneven parts, some of them perhaps empty."""
    edge = st.integers(0, length)
    inner = draw(st.lists(edge, min_size=parts - 1, max_size=parts - 1))
    return [0, *sorted(inner), length]


@st.composite
def layouts(draw, rows, cols, world_size):
    """A layout that tiles a matrix: some parts, each held by one rank or by several."""
    parts = draw(st.integers(1, world_size))
    replicas = draw(st.integers(1, world_size // parts))
    ranks = draw(st.permutations(range(world_size)))[: parts * replicas]
    kind = draw(st.sampled_from(["rows", "cols", "flat"]))
    length = {"rows": rows, "cols": cols, "flat": rows * cols}[kind]
    edges = draw(cuts(length, parts))
    held: dict[Region, list[int]] = {}
    for i, (a, b) in enumerate(zip(edges, edges[1:])):
        region = {
            "rows": Box(a, b, 0, cols),
            "cols": Box(0, rows, a, b),
            "flat": FlatRange(a, b),
        }[kind]
        held[region] = sorted(ranks[i * replicas : (i + 1) * replicas])
    return place(held, world_size)


def place(held: dict[Region, list[int]], world_size: int) -> Layout:
    """The layout in which each region is held by its ranks."""
    regions: list[Region] = [Box(0, 0, 0, 0)] * world_size
    for region, ranks in held.items():
        for rank in ranks:
            regions[rank] = region
    return Layout.of(regions)


@st.composite
def sub_blocks(draw, layout):
    """A part of every block of a layout, or none of some."""
    held = {}
    for region, ranks in layout.pieces:
        if isinstance(region, FlatRange):
            a, b = sorted(draw(st.tuples(*[st.integers(0, region.numel)] * 2)))
            part = FlatRange(region.start + a, region.start + b)
        else:
            a, b = sorted(draw(st.tuples(*[st.integers(0, region.shape[1])] * 2)))
            left = region.col_start
            part = Box(region.row_start, region.row_stop, left + a, left + b)
        if part.numel:
            held[part] = list(ranks)
    return place(held, layout.world_size)


@st.composite
def exchanges(draw, world_size=None, *, back_of_a_cut=False):
    """A plan with some moves, and the shape of each matrix."""
    world_size = world_size or draw(st.integers(1, 8))
    moves, shapes = [], []
    for _ in range(draw(st.integers(1, 3))):
        rows, cols = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        source = draw(layouts(rows, cols, world_size))
        target = draw(layouts(rows, cols, world_size))
        if back_of_a_cut:
            source = draw(sub_blocks(source))
        elif draw(st.booleans()):
            target = draw(sub_blocks(target))
        moves.append(Move(cols, source, target, draw(st.sampled_from([2, 4, 8]))))
        shapes.append((rows, cols))
    return ExchangePlan(world_size, tuple(moves)), shapes
