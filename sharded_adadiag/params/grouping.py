"""Which parameters are rotated: the two param groups of a model.

The decision is by module type wherever that tells. Names, which differ between model
families, are asked where no type tells; `not_rotated` has the list.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # of all convolutions
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList

from sharded_adadiag.params.fsdp1 import remember
from sharded_adadiag.params.fsdp2 import refuse_unsharded
from sharded_adadiag.params.holding import logical_shape
from sharded_adadiag.params.not_rotated import (
    EXPERTS,
    HEAD,
    MATRIX,
    TYPES,
    is_stack_of_experts,
    kind_by_module,
    kind_by_name,
)

_LOGGER = logging.getLogger("sharded_adadiag")

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Child names under which FSDP1, torch.compile and checkpoint_wrapper keep the
# wrapped module; they are no part of a parameter's name.
_WRAPPED = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")

# The options of the groups.
_GROUPS: tuple[dict[str, Any], ...] = (
    {"rotate": True},
    {"rotate": True, "batch_dims": 1},
    {"rotate": False},
)

Ancestors = tuple[nn.Module, ...]


@dataclasses.dataclass(slots=True)
class _Entry:
    """One parameter: its names (several if tied), its module and its kind."""

    names: list[str]
    param: nn.Parameter
    owner: nn.Module
    kind: str = MATRIX  # or why it is not rotated


def param_groups(
    model: nn.Module, *, exclude: str | Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Split a model's parameters into a rotated and a plain param group.

    Rotated are the matrices of the hidden layers: 2-D parameters and the weights of
    convolutions (as ``out x rest``) whose both sides are larger than one. Not rotated
    are 1-D parameters, those of embeddings and norms, the output head, and what only
    looks like a matrix: biases of experts, routers, position tables, decays,
    depthwise convolutions, directions of a weight norm (`not_rotated.py` has the
    list). A parameter tied to an embedding is an embedding. Stacked experts
    ``(E, out, in)`` are rotated matrix by matrix, in a group of their own with
    ``batch_dims=1``. Of other parameters of three and more dimensions none is rotated:
    one rotation of all would mix them.

    The head is what Hugging Face's ``get_output_embeddings()`` returns. A model
    without it has its last ``nn.Linear`` for a head, unless that lies in a
    repeated block (one of several alike in an ``nn.ModuleList``,
    ``nn.Sequential`` or ``nn.ModuleDict``): such a model has no head.

    A bare 2-D ``nn.Parameter`` cannot be told from a weight: name tables of shape
    (length, width) whose name does not tell either in `exclude`.

    Call it on the whole model, before or after ``fully_shard``, ``torch.compile``
    or DistributedDataParallel; tensors on the meta device will do, and so will a
    model built under ``deepspeed.zero.Init``. Every
    parameter is in one group, frozen ones too. What went where is logged at INFO
    to the logger ``sharded_adadiag`` by the process whose ``RANK`` is 0 or unset.

    Args:
        model: The model to be trained.
        exclude: Name patterns (``fnmatch`` style, such as ``"*.router.*"``) of
            parameters that shall not be rotated. Names are those of
            ``model.named_parameters()`` without the prefixes of wrappers; of a
            tied parameter each name counts.

    Returns:
        ``[{"params": [(name, param), ...], "rotate": True},
        {"params": [(name, param), ...], "rotate": False}]``, each in the order of
        ``model.named_parameters()``; between them, if there are stacked experts,
        ``{"params": [...], "rotate": True, "batch_dims": 1}``. A group without
        parameters is left out, because ``torch.optim`` refuses it beside named ones.

    Raises:
        TypeError: If `model` is not an ``nn.Module``.
        ValueError: If a pattern of `exclude` matches no parameter.
        NotImplementedError: For FSDP1 with ``use_orig_params=False``.
        RuntimeError: For a module of FSDP2 that is gathered at the moment.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected an nn.Module, got {type(model).__name__}; "
            "pass the model itself, not its parameters"
        )
    remember(model)
    refuse_unsharded(model)
    heads = _heads(model)
    entries = _entries(model)
    _mark_by_module(entries, model, heads.values())
    _mark_by_name_and_shape(entries.values())
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    for pattern in patterns:
        if not _mark_excluded(entries, pattern):
            example = next((e.names[0] for e in entries.values()), None)
            raise ValueError(
                f"exclude: the pattern {pattern!r} matches none of the model's "
                f"{len(entries)} parameters (the first is {example!r}); write it "
                "for the names in model.named_parameters(), or remove it"
            )
    if os.environ.get("RANK", "0") == "0":
        _LOGGER.info("%s", _report(list(entries.values()), list(heads)))
    groups = []
    for options in _GROUPS:
        params = [
            (entry.names[0], entry.param)
            for entry in entries.values()
            if _group_of(entry.kind) is options
        ]
        if params:
            groups.append({"params": params, **options})
    return groups


def _group_of(kind: str) -> dict[str, Any]:
    matrices, experts, others = _GROUPS
    return {MATRIX: matrices, EXPERTS: experts}.get(kind, others)


def _matrix_shape(param: Tensor) -> tuple[int, int]:
    """Rows and columns of the full parameter's matrix view; (numel, 1) if 1-D."""
    shape = logical_shape(param)
    if len(shape) < 2:
        return math.prod(shape), 1
    return shape[0], math.prod(shape[1:])


def _unwrap(module: nn.Module) -> nn.Module:
    """The module inside wrappers that have neither a name nor parameters."""
    while True:
        children = dict(module.named_children())
        inner = [name for name in _WRAPPED if name in children]
        if not inner and isinstance(module, DistributedDataParallel):
            inner = ["module"]
        if not inner or any(True for _ in module.parameters(recurse=False)):
            return module
        module = children[inner[0]]


def _walk(
    module: nn.Module, prefix: str = "", ancestors: Ancestors = ()
) -> Iterator[tuple[str, nn.Module, Ancestors]]:
    """All modules but wrappers, parents first; one used twice comes twice."""
    module = _unwrap(module)
    yield prefix, module, ancestors
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        yield from _walk(child, path, (*ancestors, module))


def _entries(model: nn.Module) -> dict[int, _Entry]:
    """Every parameter once, by id, in the order of named_parameters()."""
    entries: dict[int, _Entry] = {}
    for prefix, module, ancestors in _walk(model):
        # The owner of a parametrized weight is beyond the dict of parametrizations.
        inside = isinstance(module, ParametrizationList) and len(ancestors) > 1
        owner = ancestors[-2] if inside else module
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, param in own:
            entry = entries.setdefault(id(param), _Entry([], param, owner))
            entry.names.append(f"{prefix}.{name}" if prefix else name)
    return entries


def _heads(model: nn.Module) -> dict[str, nn.Module]:
    """The output head by its name; several if the model holds several models."""
    declared: list[object] = []
    linears: list[tuple[str, nn.Module, Ancestors]] = []
    modules = list(_walk(model))
    for name, module, ancestors in modules:
        get_head = getattr(module, "get_output_embeddings", None)
        if callable(get_head):
            declared.append(get_head())
        if isinstance(module, nn.Linear):
            linears.append((name, module, ancestors))
    found = [head for head in declared if isinstance(head, nn.Module)]
    if found:
        return {
            name: m for name, m, _ in modules if any(m is _unwrap(h) for h in found)
        }
    if not linears:
        return {}
    name, last, ancestors = linears[-1]
    return {} if _in_repeated_block(last, ancestors) else {name: last}


def _in_repeated_block(module: nn.Module, ancestors: Ancestors) -> bool:
    for parent, child in zip(ancestors, ancestors[1:], strict=False):
        if not isinstance(parent, _CONTAINERS):
            continue
        siblings = (_unwrap(sibling) for sibling in parent.children())
        if any(_alike(child, s) for s in siblings if s is not child):
            return True
    return False


def _alike(a: nn.Module, b: nn.Module) -> bool:
    # Not `type(a) is type(b)`: fully_shard makes a subclass of a block's class.
    if not (isinstance(a, type(b)) or isinstance(b, type(a))):
        return False
    if not isinstance(a, _CONTAINERS):
        return True
    # The type of a container says nothing: Sequential(features, classifier).
    return [n for n, _ in a.named_parameters()] == [n for n, _ in b.named_parameters()]


def _mark_by_module(
    entries: dict[int, _Entry], model: nn.Module, heads: Iterable[nn.Module]
) -> None:
    """Set the kind of what lies in (or is tied to) embeddings, norms and heads."""
    modules = [module for _, module, _ in _walk(model)]
    marked = [(HEAD, heads)] + [
        (kind, [m for m in modules if isinstance(m, what)]) for what, kind, _ in TYPES
    ]
    for kind, owners in marked:
        for owner in owners:
            for param in owner.parameters():
                entries[id(param)].kind = kind


def _mark_by_name_and_shape(entries: Collection[_Entry]) -> None:
    """Set the kind of what its module does not tell."""
    names = [name for entry in entries for name in entry.names]
    for entry in entries:
        if entry.kind != MATRIX:
            continue
        shape = logical_shape(entry.param)
        if min(_matrix_shape(entry.param)) <= 1:
            entry.kind = "1-D" if len(shape) < 2 else "a side of 1"
            continue
        usual = not isinstance(entry.owner, (nn.Linear, _ConvNd))
        kinds = [kind_by_name(name, names, usual=usual) for name in entry.names]
        by_module = kind_by_module(entry.owner, shape)
        if all(is_stack_of_experts(n, entry.owner, shape) for n in entry.names):
            by_module = EXPERTS
        kinds.append(by_module)
        entry.kind = next((kind for kind in kinds if kind != MATRIX), MATRIX)


def _mark_excluded(entries: dict[int, _Entry], pattern: str) -> bool:
    """Take what the pattern matches out of the matrices; False if it matches none."""
    matched = [
        entry
        for entry in entries.values()
        if any(fnmatch.fnmatchcase(name, pattern) for name in entry.names)
    ]
    for entry in matched:
        if entry.kind in {MATRIX, EXPERTS}:
            entry.kind = "excluded"
    return bool(matched)


def _numel(entries: Iterable[_Entry]) -> int:
    """Elements of the full parameters."""
    return sum(math.prod(logical_shape(entry.param)) for entry in entries)


def _report(entries: list[_Entry], heads: list[str]) -> str:
    """A table of what is trained, parameters alike in all layers on one line."""
    frozen = [entry for entry in entries if not entry.param.requires_grad]
    entries = [entry for entry in entries if entry.param.requires_grad]
    rows: dict[tuple[str, str, str], list[_Entry]] = {}
    for entry in entries:
        parts = entry.names[0].split(".")
        name = ".".join("*" if part.isdigit() else part for part in parts)
        sizes = logical_shape(entry.param)
        shape = " x ".join(map(str, sizes)) or "scalar"
        rows.setdefault((entry.kind, name, shape), []).append(entry)
    lines = []
    for rotate in (True, False):
        group = [e for e in entries if _group_of(e.kind)["rotate"] is rotate]
        numel = _numel(group)
        title = "rotated" if rotate else "not rotated"
        lines.append(f"{title}: {len(group)} parameters, {numel:,} elements")
        for (kind, name, shape), alike in rows.items():
            if _group_of(kind)["rotate"] is not rotate:
                continue
            name = alike[0].names[0] if len(alike) == 1 else f"{name} x{len(alike)}"
            reason = "" if kind == MATRIX else f", {kind}"
            if kind.startswith("stack"):
                reason += ", not rotated"
            lines.append(f"  {name} ({shape}{reason})")
    if frozen:
        numel = _numel(frozen)
        lines.append(f"frozen: {len(frozen)} parameters, {numel:,} elements")
    lines.append(f"output head: {', '.join(heads) or 'none found'}")
    return "\n".join(lines)
