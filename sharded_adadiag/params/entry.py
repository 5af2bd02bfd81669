"""One parameter of an optimizer, as the engine sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sharded_adadiag.params.local import Piece
from sharded_adadiag.plan.geometry import Layout, Region
from sharded_adadiag.plan.spec import ParamSpec


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """One parameter of the optimizer, as the engine sees it.

    Attributes:
        spec: What is the same on every rank.
        layout: What each rank holds of its matrix view.
        piece: What this rank holds: region, tensor, gradient, states.
        group: The param group that it is in now, or was in last.
        member: Whether it is in any; if not it is left alone.
    """

    spec: ParamSpec
    layout: Layout
    piece: Piece
    group: dict[str, Any]
    member: bool = True

    @property
    def region(self) -> Region:
        """What this rank holds of the matrix view."""
        return self.piece.holding.region

    @property
    def param(self) -> Tensor:
        """The local tensor with the entries of ``region``."""
        return self.piece.find_param()

    def grad(self) -> Tensor | None:
        """The local gradient, or None."""
        return self.piece.grad() if self.member else None

    def state(self) -> dict[str, Any]:
        """Its states."""
        return self.piece.state()

    def release(self) -> None:
        """Let go of a parameter that has left the groups, as its state has."""
        self.piece = dataclasses.replace(
            self.piece, find_param=_gone, grad=_gone, state=_gone, zeros_like=_gone
        )


def _gone(*_: Any) -> Any:
    raise RuntimeError("the parameter has left the optimizer")


def device_of(entries: Iterable[Entry]) -> torch.device:
    """Where the parameters are; the CPU if there are none."""
    here = (entry.param.device for entry in entries if entry.member)
    return next(here, torch.device("cpu"))
