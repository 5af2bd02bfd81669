"""What a param group may hold besides its parameters, and what is said of it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from sharded_adadiag.algorithm.state import Rule, rotated_sides
from sharded_adadiag.options import (
    GROUP_OPTIONS,
    LATER_OPTIONS,
    OPTION_NAMES,
    Options,
    as_number,
)
from sharded_adadiag.params.holding import logical_shape
from sharded_adadiag.plan.view import MatrixView

_LOGGER = logging.getLogger("sharded_adadiag")

# Keys a group may have besides the options: torch's own, its schedulers', a label.
_OTHER_KEYS = frozenset({
    "params",
    "param_names",
    "name",
    "format_version",
    "initial_lr",
    "max_lr",
    "min_lr",
    "swa_lr",
    "base_momentum",
    "max_momentum",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
})


def admit(
    group: dict[str, Any], options: Iterable[str], told: set[str], rule: Rule
) -> None:
    """Make a new group's options plain numbers and say which keys are not ours.

    As in torch, keys that mean nothing to the optimizer are kept: they are for others
    (``lr_scale`` of timm, ``adaptive`` of SAM).

    Args:
        group: The group that the user passed; modified in place.
        options: Names of the options that the optimizer has.
        told: Keys that have been logged before; modified in place.
        rule: The optimizer.
    """
    for key in OPTION_NAMES:
        if key in group:
            group[key] = as_number(group[key])
    known = {*options, *GROUP_OPTIONS, *LATER_OPTIONS}
    new = set(group) - known - _OTHER_KEYS - told
    told |= new
    if new and os.environ.get("RANK", "0") == "0":
        _LOGGER.warning(
            "param group keys that %s keeps but does not use: %s; it knows %s",
            rule.name,
            ", ".join(sorted(new)),
            ", ".join(sorted(known)),
        )


def warn_of_unsorted(
    groups: Iterable[dict[str, Any]],
    rule: Rule,
    is_named: Callable[[Tensor], bool],
) -> None:
    """Warn if matrices cannot be told from embeddings and output heads.

    Args:
        groups: The groups that were passed without ``rotate``.
        rule: The optimizer.
        is_named: Whether DeepSpeed has named a parameter, which is enough to tell.
    """
    for group in groups:
        unnamed = [p for p in group["params"] if not is_named(p)]
        if "param_names" not in group and any(_is_rotated(p, group) for p in unnamed):
            warnings.warn(
                f"{rule.name}: its parameters have neither names nor a group with "
                "`rotate`, so every matrix is rotated, embeddings and the output head "
                "too; pass param_groups(model) instead of model.parameters(), or "
                "model_factory(...) where a trainer makes the optimizer, or set "
                '"rotate": True or False in each group',
                UserWarning,
                stacklevel=3,
            )
            return


def _is_rotated(param: Tensor, group: dict[str, Any]) -> bool:
    try:
        shape = logical_shape(param)
    except NotImplementedError:  # it is refused by the first step
        return False
    options = Options.from_group(group)
    view = MatrixView.with_options(shape, options)
    return any(
        min(height, view.cols) > 1 and any(rotated_sides((height, view.cols), options))
        for height in set(view.heights)
    )
