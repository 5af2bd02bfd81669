"""From a question (this model, on these ranks, with these options) to its plan."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from typing import Any

import torch

from sharded_adadiag.algorithm.state import ADADIAG, ADAFACDIAG, HFACDIAG, Rule
from sharded_adadiag.options import Options
from sharded_adadiag.plan.plan import Plan
from sharded_adadiag.plan.quiet import no_collections
from sharded_adadiag.plan.spec import ParamSpec
from sharded_adadiag.planner.mesh import Mesh, layouts_of
from sharded_adadiag.planner.models import Model

RULES: dict[str, Rule] = {rule.name: rule for rule in (ADADIAG, ADAFACDIAG, HFACDIAG)}


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        model: The model.
        mesh: The ranks.
        rule: The optimizer.
        options: The options of its param groups that are not their defaults.
        distribution: ``"auto"``, ``"owner"`` or ``"broadcast"``.
        buffer_bytes: What the exchanges of a step may take on a rank, or None.
        ranks_per_node: Ranks that are near each other; None if all are.
        param_dtype: Dtype of the parameters that the optimizer updates.
        grad_dtype: Dtype of their gradients.
    """

    model: Model
    mesh: Mesh
    rule: Rule = ADADIAG
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    distribution: str = "auto"
    buffer_bytes: int | None = None
    ranks_per_node: int | None = None
    param_dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        foreign = set(self.options) & {"momentum", "clip_threshold"}
        foreign -= set(self.rule.options)
        if foreign:
            raise ValueError(f"{self.rule.name} has no option {min(foreign)!r}")
        if self.buffer_bytes is not None and self.buffer_bytes < 1:
            raise ValueError(f"--buffer-bytes must be >= 1, got {self.buffer_bytes}")
        node = self.ranks_per_node
        if node is not None and (node < 1 or self.mesh.ranks % node):
            raise ValueError(
                f"{self.mesh.ranks} ranks do not divide into nodes of {node}"
            )

    def group_options(self, *, rotate: bool, batch_dims: int = 0) -> Options:
        """The options of one of the param groups.

        Args:
            rotate: The options of a group whose matrices are rotated, not of the other.
            batch_dims: Leading dimensions that count matrices, of the group of stacks.

        Returns:
            The options.
        """
        own = {"rotate": rotate, "batch_dims": batch_dims}
        return Options(**{**self.rule.options, **self.options, **own})


@dataclasses.dataclass(frozen=True)
class Answer:
    """A plan, and what making it took.

    Attributes:
        plan: The plan.
        seconds: To lay out the parameters, to plan, and to list what one rank sends
            and receives.
        peak_rss_mb: The most memory that this process had until then, in MB (10^6
            bytes), Python and torch included.
    """

    plan: Plan
    seconds: float
    peak_rss_mb: float


@no_collections()
def answer(request: Request) -> Answer:
    """Make the plan that the ranks of such a run would make.

    Args:
        request: What is to be planned.

    Returns:
        The plan, with the parameters in the order of the optimizer's groups: those
        that are rotated, then the others.
    """
    start = time.perf_counter()
    weights = sorted(request.model.weights, key=lambda w: (not w.rotate, w.batch_dims))
    place = {weight.name: i for i, weight in enumerate(request.model.weights)}
    layouts = layouts_of(
        request.model.weights, request.mesh, itemsize=request.param_dtype.itemsize
    )
    options = {
        (rotate, stack): request.group_options(rotate=rotate, batch_dims=stack)
        for rotate, stack in {weight.group for weight in weights}
    }
    specs = [
        ParamSpec(
            weight.name,
            weight.shape,
            request.param_dtype,
            request.grad_dtype,
            options[weight.group],
        )
        for weight in weights
    ]
    plan = Plan.of(
        specs,
        [layouts[place[weight.name]] for weight in weights],
        rule=request.rule,
        world_size=request.mesh.ranks,
        distribution=request.distribution,
        buffer_bytes=request.buffer_bytes,
        ranks_per_node=request.ranks_per_node,
    )
    for some in plan.rounds:
        for pair in some.moves:
            for exchange in pair:
                exchange.prepare(0)
    return Answer(plan, time.perf_counter() - start, peak_rss_mb())


def peak_rss_mb() -> float:
    """The most memory that this process has had so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
