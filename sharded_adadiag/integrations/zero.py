"""DeepSpeed ZeRO: which flat ranges of which matrix a flat tensor holds.

DeepSpeed replaces the parameters of an optimizer's groups by 1-D float32 tensors, this
rank's share of the parameters laid end to end, and calls ``step`` with some of them at
a time. The parameters themselves still tell where they are:

- stages 1 and 2, BF16_Optimizer: they are views of one buffer per group, of which rank
  r has the r-th part, so a parameter's storage offset is its place;
- stage 3: each is cut alone, and its optimizer has noted the place of every cut.

What is found is compared with the weights once, so a wrong map cannot train.

Private names read, tried with DeepSpeed 0.19.8: of parameters ``_dp_group``,
``ds_id``, ``ds_shape``, ``ds_numel``, ``ds_tensor``, ``ds_process_group``,
``partition_numel`` and ``_z3_optimizer``; of the latter ``grad_position``,
``get_param_id``, ``fp32_partitioned_groups_flat`` and ``swap_optimizer``; of the
stage 1 and 2 optimizer ``elastic_checkpoint``; ``deepspeed.utils.debug.param_names``.
"""

from __future__ import annotations

import dataclasses
import sys
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sharded_adadiag.integrations.parameters import Holding, Piece, view_shape
from sharded_adadiag.plan.geometry import FlatRange

STATE_KEY = "adadiag"
# Name, parameter, and whether DeepSpeed named it rather than the user.
Named = list[tuple[str, Tensor, bool]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """The part of one parameter that a flat tensor holds.

    Attributes:
        name: Of the parameter.
        param: The parameter of the model.
        shape: Its logical shape.
        region: The entries held here.
        start: Where they begin in the flat tensor.
        stored: This rank's copy of them in the model, for comparison.
    """

    name: str
    param: Tensor
    shape: tuple[int, ...]
    region: FlatRange
    start: int
    stored: Tensor

    def of(self, flat: Tensor) -> Tensor:
        """The view of these entries in a tensor laid out like the flat one."""
        return flat.detach()[self.start : self.start + self.region.numel]


class Originals:
    """The parameters that the groups were made of, before DeepSpeed replaced them."""

    def __init__(self) -> None:
        self._groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._names: dict[Tensor, str] = {}

    def note(self, group: dict[str, Any]) -> None:
        """Remember a new group's parameters."""
        params = list(group["params"])
        self._groups.append((group, params))
        self._learn_names(params)

    def follow(self, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        """Loading a state dict makes new groups in place of the old ones."""
        place = {id(group): i for i, group in enumerate(old)}
        self._groups = [
            (new[place[id(group)]], params) if id(group) in place else (group, params)
            for group, params in self._groups
        ]

    def of(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters that a group was made of."""
        return next((p for g, p in self._groups if g is group), list(group["params"]))

    def all(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [param for _, params in self._groups for param in params]

    def names(self) -> list[str]:
        """The names of the parameters of all groups."""
        return [name for group, _ in self._groups for name, _, _ in self.named(group)]

    def named(self, group: dict[str, Any]) -> Named:
        """Name, parameter, and whether DeepSpeed named it rather than the user."""
        params = self.of(group)
        given = group.get("param_names")
        if given is not None:
            return [(name, p, False) for name, p in zip(given, params)]
        self._learn_names(params)
        place = {p: i for i, p in enumerate(self.all())}
        return [
            (self._names[p], p, True)
            if p in self._names
            else (f"parameter {place.get(p, i)}", p, False)
            for i, p in enumerate(params)
        ]

    def current(self, group: dict[str, Any]) -> Named:
        """The same of what is in the group now; flat tensors have no name."""
        named = self.named(group)
        own = {param: (name, known) for name, param, known in named}
        trained = [(name, known) for name, param, known in named if param.requires_grad]
        # At stage 0 in low precision, float32 copies stand for the trained ones.
        copies = len(group["params"]) == len(trained)
        found = []
        for i, param in enumerate(group["params"]):
            name, known = "", False
            if not self.is_flat(param, group):
                other = trained[i] if copies else (f"parameter {i}", False)
                name, known = own.get(param, other)
            found.append((name, param, known))
        return found

    def _learn_names(self, params: list[Tensor]) -> None:
        """Ask DeepSpeed for names it may forget: it does when any engine is deleted."""
        debug = sys.modules.get("deepspeed.utils.debug")
        if debug is not None:
            known = debug.param_names
            self._names |= {p: known[p] for p in params if p in known}

    def is_flat(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether DeepSpeed put a tensor in the place of the group's parameters."""
        params = self.of(group)
        if param.dim() != 1 or any(param is p for p in params):
            return False
        return any(hasattr(p, "ds_id") or hasattr(p, "_dp_group") for p in params)

    def process_group(self, group: dict[str, Any]) -> Any:
        """The ranks among which DeepSpeed has divided a group's parameters."""
        for param in self.of(group):
            for name in ("ds_process_group", "_dp_group"):
                if hasattr(param, name):
                    return getattr(param, name)
        return None


def slices(originals: Originals, flat: Tensor, group: dict[str, Any]) -> list[Slice]:
    """What a flat tensor holds.

    Args:
        originals: The optimizer's.
        flat: One of the tensors in the group.
        group: The group.

    Returns:
        One slice for each parameter of which any rank has a part in this tensor, in
        the same order on every rank.

    Raises:
        NotImplementedError: For settings of DeepSpeed that cannot work.
    """
    _refuse_settings(flat)
    named = originals.named(group)
    if any(hasattr(param, "ds_id") for _, param, _ in named):
        found = _cut_alone(flat, named)
    else:
        found = _laid_end_to_end(flat, named)
    return found


def misplaced(found: list[Slice], flat: Tensor) -> str:
    """Compare what a flat tensor holds with the model's weights.

    Args:
        found: Its slices.
        flat: The tensor.

    Returns:
        What is wrong; empty if nothing is.
    """
    for part in found:
        if not torch.equal(part.of(flat).to(part.stored), part.stored):
            return (
                f"{part.name}: DeepSpeed's master weights are not where they are "
                "expected, or the model's weights were changed after "
                "deepspeed.initialize (change them before it)"
            )
    return ""


def _laid_end_to_end(
    flat: Tensor, named: list[tuple[str, Tensor, bool]]
) -> list[Slice]:
    """Stages 1 and 2: parameters are views of a buffer cut into equal parts."""
    found = []
    for name, param, _ in named:
        if not param.requires_grad or param.numel() == 0:
            continue
        own = dist.get_rank(param._dp_group) * flat.numel()  # type: ignore[attr-defined]
        offset = int(param.detach().storage_offset())
        start = max(offset, own)
        stop = max(min(offset + param.numel(), own + flat.numel()), start)
        region = FlatRange(start - offset, stop - offset)
        if region.numel == 0:
            region = FlatRange(0, 0)
        stored = param.detach().reshape(-1)[region.start : region.stop]
        place = start - own if region.numel else 0
        shape = tuple(param.shape)
        found.append(Slice(name, param, shape, region, place, stored))
    return found


def _cut_alone(flat: Tensor, named: Named) -> list[Slice]:
    """Stage 3: each parameter is cut into equal parts, the last ones padded."""
    found = []
    for name, original, _ in named:
        param: Any = original
        if not param.requires_grad or param.ds_numel == 0:
            continue
        zero = param._z3_optimizer
        sub_group, place, _ = zero.grad_position[zero.get_param_id(param)]
        if zero.fp32_partitioned_groups_flat[sub_group] is not flat:
            continue
        size = param.partition_numel()
        start = min(dist.get_rank(param.ds_process_group) * size, param.ds_numel)
        stop = min(start + size, param.ds_numel)
        region = FlatRange(start, stop)
        stored = param.ds_tensor.detach().reshape(-1)[: region.numel]
        shape = tuple(param.ds_shape)
        found.append(Slice(name, param, shape, region, place, stored))
    return found


def pieces(
    found: list[Slice],
    flat: Tensor,
    group: dict[str, Any],
    optimizer: Optimizer,
    rotates: dict[str, bool],
) -> list[Piece]:
    """The slices of a flat tensor as pieces of the parameters.

    Args:
        found: Its slices.
        flat: The tensor.
        group: Its group.
        optimizer: Which keeps its states.
        rotates: Whether each parameter may be rotated, by name.

    Returns:
        One piece for each slice.
    """

    def piece(part: Slice) -> Piece:
        held = Holding(part.shape, *view_shape(part.shape), part.region)

        def state() -> dict[str, Any]:
            own: dict[str, Any] = optimizer.state[flat].setdefault(STATE_KEY, {})
            return own.setdefault(part.name, {})

        return Piece(
            name=part.name,
            dtype=flat.dtype,
            holding=held,
            group=group,
            rotate=rotates[part.name],
            find_param=lambda: part.of(flat),
            grad=lambda: None if flat.grad is None else part.of(flat.grad),
            state=state,
            zeros_like=lambda dtype: torch.zeros_like(part.of(flat), dtype=dtype),
        )

    return [piece(part) for part in found]


def _refuse_settings(flat: Tensor) -> None:
    """What DeepSpeed can be set to and a matrix optimizer cannot do."""
    if flat.dtype not in (torch.float32, torch.float64):
        raise NotImplementedError(
            f"DeepSpeed's master weights are {flat.dtype}; AdaDiag needs float32 ones: "
            "remove bf16_master_weights_and_grads (fp16_master_weights_and_grads)"
        )
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if type(caller).__module__.startswith("deepspeed.runtime"):
            if getattr(caller, "swap_optimizer", False):
                raise NotImplementedError(
                    "offload_optimizer to NVMe swaps states as flat tensors; a rotated "
                    'matrix has none: set "offload_optimizer": {"device": "cpu"}'
                )
            if getattr(caller, "elastic_checkpoint", False):
                raise NotImplementedError(
                    '"elastic_checkpoint" cuts states as flat tensors; remove it: a '
                    "universal checkpoint or sharded_adadiag's portable one changes "
                    "the number of ranks"
                )
        frame = frame.f_back
