"""FSDP1 (``FullyShardedDataParallel`` with ``use_orig_params=True``).

A rank's share of a parameter is a flat range of it, kept as a 1-D parameter that
knows neither the logical shape nor the range. The model's wrappers know both, so
they are read when `param_groups` sees the model, and remembered by parameter.

Private names read, tried with torch 2.13: ``FSDP._handle``, its ``flat_param`` with
``_params``, ``_shapes`` and ``_shard_param_infos``, and ``_use_orig_params``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.utils.weak import WeakIdKeyDictionary

from sharded_adadiag.plan.regions import FlatRange

_remembered: Any = WeakIdKeyDictionary()


def remember(model: nn.Module) -> None:
    """Note shape and range of every parameter of the FSDP1 modules of a model.

    Args:
        model: Any model; one without FSDP1 modules changes nothing.

    Raises:
        NotImplementedError: For ``use_orig_params=False``.
    """
    for name, module in model.named_modules():
        if not isinstance(module, FullyShardedDataParallel) or module._handle is None:
            continue
        if not module._handle._use_orig_params:
            raise NotImplementedError(
                f"{name or 'the model'} is wrapped by FullyShardedDataParallel with "
                "use_orig_params=False, which hides its matrices in one flat "
                "parameter; wrap it with use_orig_params=True"
            )
        flat: Any = module._handle.flat_param
        infos = zip(flat._params, flat._shapes, flat._shard_param_infos)
        for param, shape, info in infos:
            start = info.intra_param_start_idx if info.in_shard else 0
            stop = info.intra_param_end_idx + 1 if info.in_shard else 0
            _remembered[param] = tuple(shape), FlatRange(start, stop)


def remembered(param: Tensor, name: str) -> tuple[tuple[int, ...], FlatRange] | None:
    """Shape and range of an FSDP1 parameter.

    Args:
        param: Any parameter.
        name: The parameter's name, for messages.

    Returns:
        The logical shape and this rank's flat range, or None if FSDP1 does not
        shard it.

    Raises:
        NotImplementedError: For a flat parameter, or one whose model was not seen.
    """
    if isinstance(param, FlatParameter):
        raise NotImplementedError(
            f"{name}: a flat parameter of FullyShardedDataParallel hides its matrices; "
            "wrap the model with use_orig_params=True"
        )
    known = _remembered.get(param)
    if known is not None:
        # NO_SHARD keeps a matrix as it is, whole on every rank.
        shape = known[0]
        return None if len(shape) > 1 and tuple(param.shape) == shape else known
    if getattr(param, "_fsdp_flattened", False):
        raise NotImplementedError(
            f"{name}: FullyShardedDataParallel keeps a flat piece of it whose place "
            "only the model knows; pass param_groups(model) of the wrapped model"
        )
    return None
