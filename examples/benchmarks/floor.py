"""The least that a rotated Adam must do in a step, to measure ours by."""

from __future__ import annotations

import dataclasses
import functools

import torch
from peers import LR
from torch import Tensor
from torch.optim.adamw import adamw


class Matrices:
    """The weights of a benchmark, as one stack per shape."""

    def __init__(self, shapes: list[tuple[int, int]], device: torch.device) -> None:
        self.stacks = [
            torch.empty(shapes.count(shape), *shape, device=device)
            for shape in dict.fromkeys(shapes)
        ]

    def normal_(self, generator: torch.Generator, std: float) -> None:
        for stack in self.stacks:
            stack.normal_(std=std, generator=generator)

    def copy_(self, other: Matrices) -> None:
        for stack, source in zip(self.stacks, other.stacks, strict=True):
            stack.copy_(source)

    def views(self) -> list[Tensor]:
        return [view for stack in self.stacks for view in stack.unbind()]


@dataclasses.dataclass
class FloorStack:
    """The matrices of one shape, with what one step of the floor needs."""

    grad: Tensor  # [k, m, n]
    weight: Tensor  # [k, m, n]
    left: Tensor | None  # [k, m, m]
    right: Tensor | None  # [k, n, n]

    def __post_init__(self) -> None:
        zeros = functools.partial(torch.zeros_like, self.weight)
        self.scratch, self.rotated, self.update = zeros(), zeros(), zeros()
        self.exp_avg, self.exp_avg_sq = zeros(), zeros()
        self.step_count = torch.zeros((), device=self.weight.device)

    def rotate(self) -> None:
        if self.left is None:
            torch.bmm(self.grad, self.right, out=self.rotated)
        elif self.right is None:
            torch.bmm(self.left.mT, self.grad, out=self.rotated)
        else:
            torch.bmm(self.left.mT, self.grad, out=self.scratch)
            torch.bmm(self.scratch, self.right, out=self.rotated)

    def apply(self) -> None:
        if self.left is None:
            self.weight.baddbmm_(self.update, self.right.mT)
        elif self.right is None:
            self.weight.baddbmm_(self.left, self.update)
        else:
            torch.bmm(self.left, self.update, out=self.scratch)
            self.weight.baddbmm_(self.scratch, self.right.mT)

    def state_bytes(self) -> int:
        state = [self.exp_avg, self.exp_avg_sq, self.step_count, self.left, self.right]
        return sum(t.nbytes for t in state if t is not None)


class Floor:
    """What no rotated Adam can do without: the products and one fused AdamW pass.

    Weights and gradients lie ready in stacks; nothing is refreshed, checked or copied,
    and the product that rotates the update back adds it to the weights.
    """

    def __init__(self, weights: Matrices, grads: Matrices, *, two_sided: bool) -> None:
        self.stacks = []
        for weight, grad in zip(weights.stacks, grads.stacks, strict=True):
            rows, columns = weight.shape[1:]
            left = two_sided or rows <= columns
            right = two_sided or not left
            self.stacks.append(
                FloorStack(
                    grad,
                    weight,
                    _identities(weight, rows) if left else None,
                    _identities(weight, columns) if right else None,
                )
            )

    @torch.no_grad()
    def step(self) -> None:
        for stack in self.stacks:
            stack.rotate()
        adamw(
            [stack.update for stack in self.stacks],
            [stack.rotated for stack in self.stacks],
            [stack.exp_avg for stack in self.stacks],
            [stack.exp_avg_sq for stack in self.stacks],
            [],
            [stack.step_count for stack in self.stacks],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=LR,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        for stack in self.stacks:
            stack.apply()

    def state_bytes(self) -> int:
        return sum(stack.state_bytes() for stack in self.stacks)


def _identities(stack: Tensor, size: int) -> Tensor:
    # The time of a product does not depend on the values in it.
    eye = torch.eye(size, device=stack.device, dtype=stack.dtype)
    return eye.expand(len(stack), size, size).contiguous()
