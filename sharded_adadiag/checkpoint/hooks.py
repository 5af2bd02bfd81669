"""The conversion of state dicts, as hooks of torch between those of the user.

A user's pre-hooks thus see the live state on saving and the given one on loading, and
post-hooks the saved form and the loaded optimizer: all see what they may change.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Generator, Iterable
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from sharded_adadiag.checkpoint.matching import match_groups
from sharded_adadiag.options import Options, name_dtypes

# Of the saved form. It is a key of the param groups, because that is all of a state
# dict that torch.distributed.checkpoint keeps besides the states. The number of skipped
# steps rides on it, times this: torch.distributed.checkpoint refuses a checkpoint that
# lacks a key of the live optimizer, so a key of its own would shut out the older ones.
FORMAT_VERSION = 1
_PER_SKIPPED_STEP = 1000


class Binding(Protocol):
    """What the hooks need of an optimizer's binding to its engine."""

    skipped_steps: int

    def states(self) -> list[dict[str, Any]]:
        """The states of all parameters, as they are held."""

    def save_state(self) -> dict[Tensor, dict[str, Any]]:
        """The saved form of the states; a collective."""

    def load_state(
        self, saved: dict[Tensor, dict[str, Any]], held: Iterable[Tensor] = ()
    ) -> None:
        """Put a saved state where it belongs; a collective."""


@contextlib.contextmanager
def saving(optimizer: Optimizer, binding: Binding) -> Generator[None]:
    """While torch packs a state dict: its states become logical.

    Args:
        optimizer: The optimizer that is saved.
        binding: Converts its states, a collective.
    """
    live = optimizer.state

    def convert(_: Optimizer) -> None:
        nonlocal live
        live = optimizer.state
        if binding.states():
            saved = binding.save_state()
            states = {p: saved[p] for p in _params(optimizer) if p in saved}
            others = {k: v for k, v in live.items() if not isinstance(k, Tensor)}
            optimizer.state = defaultdict(dict, {**states, **others})

    def finish(_: Optimizer, packed: dict[str, Any]) -> None:
        optimizer.state = live
        for group in packed["param_groups"]:
            stamp(group, binding)

    handles = [
        optimizer.register_state_dict_pre_hook(convert),
        optimizer.register_state_dict_post_hook(finish, prepend=True),
    ]
    try:
        yield
    finally:
        optimizer.state = live
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def loading(optimizer: Optimizer, binding: Binding) -> Generator[None]:
    """While torch loads a state dict: it gets the groups, the binding the states.

    Torch would cast every state to its parameter's dtype.

    Args:
        optimizer: The optimizer that loads; its states and groups are replaced.
        binding: Converts the given states, a collective.
    """
    params = _params(optimizer)
    held = [param for param in params if param in optimizer.state]
    taken: dict[Tensor, dict[str, Any]] = {}
    skipped: list[int] = []

    def take(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        saved = given["state"]
        groups = match_groups(given["param_groups"], optimizer.param_groups, saved)
        for group in groups:
            Options.from_group(group)  # refused before anything changes
        skipped.append(read_stamps(groups))
        keys = [key for group in groups for key in group["params"]]
        taken.update({p: saved[key] for p, key in zip(params, keys) if key in saved})
        others = {k: v for k, v in saved.items() if k not in set(keys)}
        return {**given, "state": others, "param_groups": groups}

    def load(_: Optimizer) -> None:
        binding.skipped_steps = skipped.pop()
        binding.load_state(taken, held)

    handles = [
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(load, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def stamp(group: dict[str, Any], binding: Binding) -> None:
    """Give a group of the saved form its version and plain values, in place."""
    name_dtypes(group)
    skipped = binding.skipped_steps
    group["format_version"] = FORMAT_VERSION + _PER_SKIPPED_STEP * skipped


def read_stamps(groups: list[dict[str, Any]]) -> int:
    """The skipped steps that `stamp` has noted.

    Args:
        groups: The ``param_groups`` of a state dict.

    Returns:
        Their number.

    Raises:
        ValueError: If a newer version wrote them.
    """
    most = 0
    for group in groups:
        written = group.get("format_version", FORMAT_VERSION)
        skipped, version = divmod(written, _PER_SKIPPED_STEP)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"the state has format {version}, this version reads up to "
                f"{FORMAT_VERSION}; load it with the newer sharded_adadiag"
            )
        most = max(most, skipped)
    return most
