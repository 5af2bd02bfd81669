"""Random small training runs: how they are drawn."""

import dataclasses
import functools
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag
from sharded_adadiag.plan.view import MatrixView

CLASSES = {"AdaDiag": AdaDiag, "AdafacDiag": AdafacDiag, "HfacDiag": HfacDiag}

PERIOD = 2

# Random, of full rank unless the name says otherwise, or what breaks a formula.
HARD = ("rank one", "rank three", "orthogonal", "identity", "one entry", "zero")

KINDS = ("full",) * 4 + HARD + ("nan",)

SCALES = (1.0, 1.0, 1e-3, 1e3, 1e-30, 1e30)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a case.

    Attributes:
        shape: Its shape.
        rotate: Whether its group is rotated.
        placements: How a mesh holds it, a letter for each mesh dimension: r(eplicated),
            0 or 1 for the sharded dimension. Empty: a plain tensor on every rank.
        grads: The kind of its gradient on each step, or None for no gradient.
    """

    shape: tuple[int, ...]
    rotate: bool
    placements: str
    grads: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class RandomCase:
    """One training run.

    Attributes:
        method: The optimizer.
        layout: How the parameters lie on the ranks.
        mesh: The sizes of the mesh; their product is the number of ranks.
        params: The parameters.
        dtype: Of the parameters.
        scale: Of the gradients.
        options: Of the optimizer.
    """

    method: str
    layout: str
    mesh: tuple[int, ...]
    params: tuple[Parameter, ...]
    dtype: torch.dtype
    scale: float
    options: dict[str, Any]

    @property
    def world_size(self) -> int:
        return math.prod(self.mesh)

    @property
    def steps(self) -> int:
        return len(self.params[0].grads)


# --- what is drawn ------------------------------------------------------------------


def meshes(layout: str) -> Any:
    if layout in ("mesh of two dimensions", "fsdp2 x tp"):
        return st.sampled_from([(2, 2), (1, 2), (2, 1), (2, 3), (3, 2), (1, 4)])
    return st.sampled_from([(2,), (3,), (1,), (4,), (5,), (6,)])


def shapes(smallest: int) -> Any:
    """Of a parameter; fully_shard takes no scalars and nothing empty (smallest=1)."""
    size, few = st.integers(smallest, 12), st.integers(1, 3)
    kinds = [
        st.tuples(size, size),
        st.tuples(size, size),
        st.tuples(size),
        st.tuples(size, few, few),
        st.tuples(size, few, few, few),
    ]
    return st.one_of(*kinds, st.just(())) if smallest == 0 else st.one_of(*kinds)


@st.composite
def parameters(draw: Any, layout: str, mesh: tuple[int, ...], meaning: Any) -> Any:
    """1 to 4 parameters; `meaning` has strategies for shapes and gradients."""
    steps = draw(st.integers(3, 6))
    count = draw(st.integers(1, 4))
    made = []
    for i in range(count):
        shape = draw(meaning["shapes"])
        if made and draw(st.booleans()):
            shape = made[0].shape  # alike: computed together
        letters = "r" + "01"[: len(shape)]
        placements = "".join(draw(st.sampled_from(letters)) for _ in mesh)
        if layout in ("fsdp2", "ddp", "fsdp2 x tp"):
            placements = "0" if layout == "fsdp2 x tp" and len(shape) else ""
            if placements and draw(st.booleans()) and len(shape) > 1:
                placements = "1"
        elif i and draw(st.integers(0, 4)) == 0:
            placements = ""  # as norms under tensor parallelism
        present = st.one_of(meaning["kinds"], meaning["kinds"], st.none())
        grads = tuple(draw(present) for _ in range(steps))
        rotate = draw(st.integers(0, 4)) > 0
        made.append(Parameter(shape, rotate, placements, grads))
    return tuple(made)


def options(method: str) -> dict[str, Any]:
    """A strategy for every option that may matter, by name."""
    dtypes = st.sampled_from([None, None, torch.float32, torch.float64, torch.bfloat16])
    drawn: dict[str, Any] = {
        "sides": st.sampled_from(["one", "two", "none"]),
        "side": st.sampled_from(["auto", "left", "right"]),
        "basis": st.sampled_from(["svd", "eigh"]),
        "basis_from": st.sampled_from(["gradient", "gradient", "gram"]),
        "gram_beta": st.sampled_from([0.95, 0.0, 0.5]),
        "first_moment": st.sampled_from(["rotated", "original"]),
        "on_refresh": st.sampled_from(["carry", "reproject"]),
        "refresh_every": st.sampled_from([PERIOD, 1, 3]),
        "state_dtype": dtypes,
        "rotation_dtype": dtypes,
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
        "noise_floor": st.sampled_from([0.0, 0.0, 1e-3]),
        "nonfinite": st.sampled_from(["raise", "skip", "ignore"]),
        "max_rotated_dim": st.sampled_from([8192, 6]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9)]),
    }
    if method == "AdaDiag":
        drawn["basis_from"] = st.sampled_from(["gradient", "momentum", "gram"])
    else:
        drawn["clip_threshold"] = st.sampled_from([1.0, 0.5, None])
    if method == "AdafacDiag":
        drawn["momentum"] = st.booleans()
    return drawn


@st.composite
def any_case(draw: Any, layout: str) -> RandomCase:
    """Anything that the library takes, computed by owners."""
    method = draw(st.sampled_from(sorted(CLASSES)))
    mesh = draw(meshes(layout))
    meaning = {"shapes": shapes(smallest=0), "kinds": st.sampled_from(KINDS)}
    if layout.startswith("fsdp2"):
        meaning["shapes"] = shapes(smallest=1)  # torch refuses to shard nothing
    chosen = draw(st.fixed_dictionaries(options(method)))
    chosen["distribution"] = "owner"
    return RandomCase(
        method,
        layout,
        mesh,
        draw(parameters(layout, mesh, meaning)),
        draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        draw(st.sampled_from(SCALES)),
        chosen,
    )


@st.composite
def tame_case(draw: Any, layout: str) -> RandomCase:
    """A case in which round-off of another order stays round-off.

    Blocks add up in another order than a whole matrix, so bits differ, and the method
    itself magnifies a difference without bound where a rotated direction has no
    gradient: its basis vectors are arbitrary there and Adam divides round-off by
    round-off. So the gradients are random and dense, everything is float64, and only
    the shorter side is rotated (both of a square matrix), on which they have full rank.
    """
    method = draw(st.sampled_from(sorted(CLASSES)))
    mesh = draw(meshes(layout))
    drawn = options(method)
    square = st.integers(1, 10).map(lambda n: (n, n))
    sides = draw(drawn.pop("sides"))
    both = square if sides == "two" else shapes(smallest=1)
    meaning = {"shapes": both, "kinds": st.just("full")}
    for name in ("side", "state_dtype", "rotation_dtype"):
        del drawn[name]
    chosen = draw(st.fixed_dictionaries(drawn))
    chosen["sides"] = sides
    chosen["distribution"] = draw(st.sampled_from(["broadcast", "broadcast", "auto"]))
    return RandomCase(
        method,
        layout,
        mesh,
        draw(parameters(layout, mesh, meaning)),
        torch.float64,
        draw(st.sampled_from([1.0, 1e-3])),
        chosen,
    )


# --- the numbers --------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def initial_weights(case: RandomCase) -> list[Tensor]:
    return [noise(i, p.shape).to(case.dtype) for i, p in enumerate(case.params)]


def gradient(case: RandomCase, i: int, step: int) -> Tensor | None:
    """The full gradient of one parameter on one step, the same on every rank."""
    param = case.params[i]
    kind, full = param.grads[step], noise(1000 + 10 * step + i, param.shape)
    if kind is None:
        return None
    matrix = full.reshape(MatrixView.of(param.shape).stored)
    rows, cols = matrix.shape
    if kind == "rank one":
        matrix = torch.outer(matrix.sum(1), matrix.sum(0))
    elif kind == "rank three":
        matrix = (
            matrix[:, :3] @ matrix[:3, :].flip(1) if min(rows, cols) > 2 else matrix
        )
    elif kind == "orthogonal":  # all singular values are one
        matrix = torch.linalg.qr(noise(step, (12, 12))).Q[:rows, :cols]
        matrix = torch.nn.functional.pad(matrix, (0, cols - matrix.shape[1]))
    elif kind == "identity":
        matrix = torch.eye(rows, cols, dtype=matrix.dtype)
    elif kind == "one entry":
        matrix = torch.zeros_like(matrix)
        matrix.view(-1)[-1:] = 1.0
    elif kind == "zero":
        matrix = torch.zeros_like(matrix)
    elif kind == "nan":
        matrix = matrix.clone()
        matrix.view(-1)[-1:] = math.nan
    return (case.scale * 0.1 * matrix).reshape(param.shape).to(case.dtype)
