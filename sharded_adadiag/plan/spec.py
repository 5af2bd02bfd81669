"""What is the same on every rank about one parameter."""

from __future__ import annotations

import dataclasses

import torch

from sharded_adadiag.options import Options
from sharded_adadiag.plan.view import MatrixView


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
    """What is the same on every rank about one parameter.

    Attributes:
        name: The parameter's name, or its position as text.
        shape: The shape of the full parameter.
        dtype: The parameter's dtype.
        grad_dtype: Dtype of its gradient, also on the way between ranks.
        options: The options of its param group.
        width: Columns of the view in which its layout is given; None: as usual.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    options: Options
    width: int | None = None

    @property
    def view(self) -> MatrixView:
        """How it is seen as matrices."""
        return MatrixView.with_options(self.shape, self.options)

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns of the view in which its layout is given."""
        rows, cols = self.view.stored
        if self.width is None:
            return rows, cols
        return rows * cols // self.width if self.width else 0, self.width

    @property
    def work_dtype(self) -> torch.dtype:
        """Dtype of the computation: at least float32, no narrower than the gradient."""
        widest = torch.promote_types(self.dtype, self.grad_dtype)
        return torch.promote_types(widest, torch.float32)
