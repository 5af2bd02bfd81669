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
stage 1 and 2 optimizer ``elastic_checkpoint``; ``param_names`` of the engine and of
``deepspeed.utils.debug``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from sharded_adadiag.params.holding import Holding, view_in
from sharded_adadiag.params.local import LocalParam, is_distributed, spec_in
from sharded_adadiag.plan.regions import FlatRange

STATE_KEY = "adadiag"
# Name, parameter, and whether DeepSpeed named it rather than the user.
Named = list[tuple[str, Tensor, bool]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Fragment:
    """The part of one parameter that a flat tensor holds.

    Attributes:
        name: The parameter's name.
        param: The parameter of the model.
        shape: Its logical shape.
        region: Which of its entries, in row-major order, the flat tensor holds.
        start: Position of the first of them in the flat tensor.
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


@dataclasses.dataclass(slots=True)
class _Noted:
    """A param group as it was made."""

    group: dict[str, Any]
    params: list[TensorWeakRef]
    names: list[str] | None


class OriginalParams:
    """The parameters that the groups were made of, before DeepSpeed replaced them.

    They are held weakly: under DeepSpeed the model lives on and they with it, while
    others (accelerate) replace parameters to be rid of them. DTensors, which DeepSpeed
    never gets, are not held at all: torch does not move one to another device while
    there is a weak reference to it.
    """

    def __init__(self) -> None:
        self._groups: list[_Noted] = []
        self._names: dict[Tensor, str] = {}

    def note(self, group: dict[str, Any]) -> None:
        """Remember a new group's parameters."""
        params = list(group["params"])
        given = group.get("param_names")
        plain = not any(is_distributed(p) for p in params)
        refs = [TensorWeakRef(p) for p in params] if plain else []
        self._groups.append(_Noted(group, refs, None if given is None else [*given]))
        self._learn_names(params, asked=True)

    def follow(self, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        """Loading a state dict, or the user, puts new groups in place of old ones."""
        place = {id(group): i for i, group in enumerate(old)}
        kept = {id(group) for group in new}
        for noted in self._groups:
            i = place.get(id(noted.group), len(new))
            if i < len(new) and id(noted.group) not in kept:
                noted.group = new[i]

    def of(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters that a group was made of; what is in it if they are gone."""
        return [param for _, param in self._of(group)]

    def all(self) -> list[Tensor]:
        """The parameters of all groups that are still there."""
        found = [ref() for noted in self._groups for ref in noted.params]
        return [param for param in found if param is not None]

    def names(self, groups: list[dict[str, Any]]) -> list[str]:
        """The names of the parameters of all groups."""
        return [name for group in groups for name, _, _ in self.named(group)]

    def named(self, group: dict[str, Any]) -> Named:
        """Name, parameter, and whether DeepSpeed named it rather than the user."""
        found = self._of(group)
        self._learn_names([param for _, param in found])
        place = {id(p): i for i, p in enumerate(self.all())}
        return [
            (name, p, False)
            if name is not None
            else (self._names[p], p, True)
            if p in self._names
            else (f"parameter {place.get(id(p), i)}", p, False)
            for i, (name, p) in enumerate(found)
        ]

    def current(self, group: dict[str, Any]) -> Named:
        """The same of what is in the group now; flat tensors have no name.

        Args:
            group: One of the optimizer's param groups.

        Returns:
            One for each tensor in the group.

        Raises:
            ValueError: If there is no telling which name is whose.
        """
        params, given = group["params"], group.get("param_names")
        flat = [self.is_flat(param, group) for param in params]
        if given is not None and len(given) == len(params) and not any(flat):
            return [(name, param, False) for name, param in zip(given, params)]
        named = self.named(group)
        own = {id(param): (name, known) for name, param, known in named}
        trained = [(name, known) for name, param, known in named if param.requires_grad]
        if len(params) == len(named):
            trained = [(name, known) for name, _, known in named]
        # At stage 0 in low precision, float32 copies stand for the trained ones.
        copies = len(params) == len(trained)
        found = []
        for i, param in enumerate(params):
            other = trained[i] if copies else (f"parameter {i}", False)
            if given is not None and not (copies or id(param) in own or flat[i]):
                raise ValueError(
                    f"a param group has {len(params)} params and {len(given)} "
                    "param_names, so a new one has no name; edit both lists alike"
                )
            name, known = ("", False) if flat[i] else own.get(id(param), other)
            found.append((name, param, known))
        return found

    def is_flat(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether DeepSpeed put a tensor in the place of the group's parameters."""
        if param.dim() != 1 or is_distributed(param):
            return False
        params = self.of(group)
        if any(param is p for p in params):
            return False
        return any(hasattr(p, "ds_id") or hasattr(p, "_dp_group") for p in params)

    def process_group(self, group: dict[str, Any]) -> Any:
        """The ranks among which DeepSpeed has divided a group's parameters."""
        for param in self.of(group):
            for name in ("ds_process_group", "_dp_group"):
                if hasattr(param, name):
                    return getattr(param, name)
        return None

    def is_named(self, param: Tensor) -> bool:
        """Whether DeepSpeed named a parameter."""
        return param in self._names

    def _of(self, group: dict[str, Any]) -> list[tuple[str | None, Tensor]]:
        """Name, if the user gave any, and parameter of what a group was made of."""
        given = group.get("param_names")
        present = group["params"]
        for noted in self._groups:
            params = [ref() for ref in noted.params]
            alive = [param for param in params if param is not None]
            if noted.group is group and params and len(alive) == len(params):
                present, given = alive, noted.names
        if given is None or len(given) != len(present):
            given = [None] * len(present)
        return list(zip(given, present))

    def _learn_names(self, params: list[Tensor], *, asked: bool = False) -> None:
        """Ask DeepSpeed for names it may forget: it does when any engine is deleted."""
        debug = sys.modules.get("deepspeed.utils.debug")
        if debug is None:
            return
        known: list[Any] = [debug.param_names]
        if asked:
            known += [getattr(c, "param_names", {}) for c in _deepspeed_callers()]
        for names in known:
            self._names |= {p: names[p] for p in params if p in names}


def fragments(
    originals: OriginalParams, flat: Tensor, group: dict[str, Any]
) -> list[Fragment]:
    """What a flat tensor holds.

    Args:
        originals: The parameters that the groups were made of.
        flat: One of the flat tensors in the group.
        group: The param group.

    Returns:
        One fragment for each parameter of which any rank has a part in this tensor, in
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


def misplaced(found: list[Fragment], flat: Tensor) -> str:
    """Compare what a flat tensor holds with the model's weights.

    Args:
        found: The fragments of the flat tensor.
        flat: A 1-D tensor with DeepSpeed's master weights of this rank.

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
) -> list[Fragment]:
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
        found.append(Fragment(name, param, shape, region, place, stored))
    return found


def _cut_alone(flat: Tensor, named: Named) -> list[Fragment]:
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
        found.append(Fragment(name, param, shape, region, place, stored))
    return found


def local_params(
    found: list[Fragment],
    flat: Tensor,
    group: dict[str, Any],
    optimizer: Optimizer,
    rotates: dict[str, bool],
) -> list[LocalParam]:
    """The fragments of a flat tensor as this rank's parts of the parameters.

    Args:
        found: The fragments of the flat tensor.
        flat: A 1-D tensor with DeepSpeed's master weights of this rank.
        group: The param group that it is in.
        optimizer: The optimizer, in whose ``state`` the parameters' states are kept.
        rotates: Whether each parameter may be rotated, by name.

    Returns:
        One for each fragment.
    """

    def local_param(part: Fragment) -> LocalParam:
        _, cols = view_in(group, part.shape, part.name).stored
        held = Holding(part.shape, cols, part.region)
        dtypes, rotate = (flat.dtype, flat.dtype), rotates[part.name]

        def state() -> dict[str, Any]:
            own: dict[str, Any] = optimizer.state[flat].setdefault(STATE_KEY, {})
            return own.setdefault(part.name, {})

        return LocalParam(
            spec=spec_in(group, part.name, held, dtypes, may_rotate=rotate),
            region=part.region,
            group=group,
            may_rotate=rotate,
            find_param=lambda: part.of(flat),
            find_grad=lambda: None if flat.grad is None else part.of(flat.grad),
            state=state,
            zeros_like=lambda dtype: torch.zeros_like(part.of(flat), dtype=dtype),
        )

    return [local_param(part) for part in found]


def _refuse_settings(flat: Tensor) -> None:
    """What DeepSpeed can be set to and a matrix optimizer cannot do."""
    if flat.dtype not in (torch.float32, torch.float64):
        raise NotImplementedError(
            f"DeepSpeed's master weights are {flat.dtype}; AdaDiag needs float32 ones: "
            "remove bf16_master_weights_and_grads (fp16_master_weights_and_grads)"
        )
    for caller in _deepspeed_callers():
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


def _deepspeed_callers() -> Iterator[Any]:
    """The objects of DeepSpeed whose methods called us, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Of no other frame: a look at its locals may keep the user's parameters alive.
        if frame.f_globals.get("__name__", "").startswith("deepspeed.runtime"):
            caller = frame.f_locals.get("self")
            if type(caller).__module__.startswith("deepspeed.runtime"):
                yield caller
        frame = frame.f_back
