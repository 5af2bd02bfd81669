"""How ranks share a model: the layout of every parameter, from a description."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

from sharded_adadiag.plan.geometry import EMPTY, Layout, everywhere
from sharded_adadiag.plan.regions import Box, FlatRange, Region
from sharded_adadiag.plan.view import MatrixView
from sharded_adadiag.planner.models import Weight

LAYOUTS = ("fsdp2", "fsdp1", "ddp", "zero")
# FSDP1 lays parameters end to end at multiples of 16 bytes.
FSDP1_ALIGNMENT = 16
# What Megatron cuts by columns of the weight; what has rows to cut is cut by rows.
_BY_COLS = re.compile(r"\b(?:o_proj|down_proj|w2)\.weight$")
_BY_ROWS = re.compile(
    r"\b(?:[qkv]_proj|gate_proj|up_proj|w1|w3|embed_tokens|lm_head)\.(?:weight|bias)$"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks, and how they share a model.

    A rank's place is (replica, shard, tensor-parallel position), the last one
    counted fastest, as in ``init_device_mesh`` of these three dimensions.

    Attributes:
        ranks: Number of ranks.
        layout: ``"fsdp2"`` (row shards), ``"fsdp1"`` (flat ranges of each decoder
            layer), ``"ddp"`` (copies) or ``"zero"`` (flat ranges of each param group,
            as DeepSpeed's stages 1 and 2 make them).
        replicas: Copies of the sharded model (HSDP).
        tensor_parallel: Ranks that divide each layer's weights before they are
            sharded.
    """

    ranks: int
    layout: str = "fsdp2"
    replicas: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("ranks", "replicas", "tensor_parallel"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be >= 1, got {getattr(self, name)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}")
        if self.replicas > 1 and self.layout not in {"fsdp1", "fsdp2"}:
            raise ValueError(f"--replicas is for fsdp2 and fsdp1, not {self.layout}")
        if self.tensor_parallel > 1 and self.layout != "fsdp2":
            raise ValueError(f"--tensor-parallel is for fsdp2, not {self.layout}")
        if self.ranks % (self.replicas * self.tensor_parallel):
            raise ValueError(
                f"--ranks {self.ranks} is no multiple of --replicas {self.replicas} x "
                f"--tensor-parallel {self.tensor_parallel}"
            )

    @property
    def shards(self) -> int:
        """Ranks that one copy of a parameter, or of a tensor-parallel part, is on."""
        return self.ranks // (self.replicas * self.tensor_parallel)


def layouts_of(
    weights: Sequence[Weight], mesh: Mesh, *, itemsize: int = 4
) -> list[Layout]:
    """Where the entries of each parameter are.

    Args:
        weights: The parameters in the order of the model.
        mesh: How they are shared.
        itemsize: Bytes of an entry of a parameter, for FSDP1's alignment.

    Returns:
        The layout of each parameter.

    Raises:
        ValueError: If tensor parallelism is asked for, and it is not known how a
            parameter is divided.
    """
    if mesh.layout == "ddp":
        return [everywhere(*MatrixView.of(w.shape).stored, mesh.ranks) for w in weights]
    if mesh.layout == "fsdp2":
        return [_sharded(w.shape, mesh, _divided(w, mesh)) for w in weights]
    by_unit: dict[object, list[int]] = {}
    for i, weight in enumerate(weights):
        unit = weight.unit if mesh.layout == "fsdp1" else weight.group
        by_unit.setdefault(unit, []).append(i)
    # ZeRO rounds a group up to a multiple of two entries per rank.
    multiple = mesh.shards * (2 if mesh.layout == "zero" else 1)
    align = max(FSDP1_ALIGNMENT // itemsize, 1) if mesh.layout == "fsdp1" else 1
    found: dict[int, Layout] = {}
    for members in by_unit.values():
        starts, end = [], 0
        for i in members:
            starts.append(-(-end // align) * align)
            end = starts[-1] + weights[i].numel
        size = -(-end // multiple) * multiple // mesh.shards
        for i, start in zip(members, starts):
            found[i] = _flat(weights[i].numel, start, size, mesh)
    return [found[i] for i in range(len(weights))]


def _flat(numel: int, start: int, size: int, mesh: Mesh) -> Layout:
    """A parameter that lies at a place of a flat buffer cut into equal parts."""
    pieces: list[tuple[Region, range]] = []
    for shard in range(start // size, -(-(start + numel) // size)):
        low, high = max(shard * size, start), min((shard + 1) * size, start + numel)
        ranks = range(shard, mesh.ranks, mesh.shards)  # its replicas
        pieces.append((FlatRange(low - start, high - start), ranks))
    held = sum(len(ranks) for _, ranks in pieces)
    rest = EMPTY if held == mesh.ranks else FlatRange(0, 0)
    return Layout(mesh.ranks, tuple(pieces), rest)


def _divided(weight: Weight, mesh: Mesh) -> str:
    """How tensor parallelism divides a parameter: by "rows", "cols" or not at all.

    Norms and routers are on every rank.

    Args:
        weight: The parameter.
        mesh: How it is shared.

    Returns:
        ``"rows"``, ``"cols"`` or ``""``.

    Raises:
        ValueError: If it is a matrix of an unknown name.
    """
    if mesh.tensor_parallel == 1:
        return ""
    if weight.batch_dims or _BY_ROWS.search(weight.name):  # whole experts
        return "rows"
    if _BY_COLS.search(weight.name):
        return "cols"
    if weight.rotate:
        raise ValueError(
            f"--tensor-parallel: it is not known how {weight.name} is divided"
        )
    return ""


@functools.lru_cache(maxsize=256)
def _sharded(shape: tuple[int, ...], mesh: Mesh, divided: str) -> Layout:
    """Row shards of a parameter, or of its tensor-parallel parts."""
    rows, cols = shape[0] if shape else 1, shape[1] if len(shape) > 1 else 1
    inner = math.prod(shape[2:])
    regions = []
    for shard in range(mesh.shards):
        for part in range(mesh.tensor_parallel):
            (top, bottom), (left, right) = (0, rows), (0, cols)
            if divided == "rows":
                top, bottom = _chunk(0, rows, mesh.tensor_parallel, part)
            elif divided == "cols":
                left, right = _chunk(0, cols, mesh.tensor_parallel, part)
            top, bottom = _chunk(top, bottom, mesh.shards, shard)
            if len(shape) < 2:
                regions.append(Box(0, 1, top, bottom))
            else:
                regions.append(Box(top, bottom, left * inner, right * inner))
    return Layout.of(regions * mesh.replicas)


def _chunk(start: int, stop: int, parts: int, which: int) -> tuple[int, int]:
    """A part of a stretch as ``torch.chunk`` cuts it; the last ones may be empty."""
    size = -(-(stop - start) // parts)
    return min(start + which * size, stop), min(start + (which + 1) * size, stop)
