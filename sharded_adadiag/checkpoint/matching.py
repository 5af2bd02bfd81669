"""Which saved group and which saved state belong to which live parameter."""

from __future__ import annotations

import warnings
from collections.abc import Container
from itertools import chain
from typing import Any

import torch

Group = dict[str, Any]
_MEMBERS = ("params", "param_names")


def match_groups(
    saved: list[Group], live: list[Group], states: Container[Any]
) -> list[Group]:
    """The groups of a state dict, divided and completed as the live ones are.

    Names decide if both sides have the same ones, each once. String keys are the names:
    torch's state-dict helpers put ``params`` in the live order, while ``param_names``
    keep the saved one. Otherwise positions decide, as in torch. An option that a saved
    group lacks, because another optimizer wrote it, is that of the live group.

    Args:
        saved: The groups of a state dict: ``params`` are the keys of its states
            (positions, or names).
        live: The groups of the optimizer.
        states: The keys of which there is a state.

    Returns:
        A group for each live one, with the keys of its parameters in its order; the
        saved groups if neither names nor numbers of groups fit (torch refuses them).
    """
    saved = _spread(saved, states)
    old, new = _names(saved), _names(live)
    if old and new and set(chain(*old)) == set(chain(*new)):
        home = {
            name: (key, group)
            for names, group in zip(old, saved)
            for name, key in zip(names, group["params"])
        }
        matched = []
        for place, (names, group) in enumerate(zip(new, live)):
            found = [home[name] for name in names]
            sources = list({id(source): source for _, source in found}.values())
            if not found:
                sources = [g for g in saved[place : place + 1] if not g["params"]]
            keys = [key for key, _ in found]
            agreed = _without_old_rotate(_agreed(place, sources), group)
            own = {**agreed, "params": keys, "param_names": names}
            matched.append({**_options(group), **own})
        return matched
    if len(saved) != len(live):
        return saved
    return [_by_position(theirs, group) for theirs, group in zip(saved, live)]


def _by_position(saved: Group, live: Group) -> Group:
    matched = {**_options(live), **_without_old_rotate(saved, live)}
    if "param_names" in saved and _are_text(saved["params"]):
        # Those that were saved may be in another order.
        matched["param_names"] = live.get("param_names", list(saved["params"]))
    return matched


def _without_old_rotate(saved: Group, live: Group) -> Group:
    """The options of a saved group that count for a live one.

    Who could not rotate the matrices of a stack one by one did not rotate it at all:
    that it was not says nothing of a group that does.

    Args:
        saved: A saved group, or what saved ones agree in.
        live: The live group.

    Returns:
        The options, perhaps without ``rotate``.
    """
    if live.get("batch_dims") and "batch_dims" not in saved:
        return {key: value for key, value in saved.items() if key != "rotate"}
    return saved


def _spread(saved: list[Group], states: Container[Any]) -> list[Group]:
    """Give all parts of one saved group its options."""
    # torch's helpers give them to one of the live groups that have its parameters.
    given = [group for group in saved if _options(group)]
    spread = []
    for place, group in enumerate(saved):
        bare = not _options(group) and any(key in states for key in group["params"])
        if bare and len(given) == 1:
            group = {**_options(given[0]), **group}
        elif bare:
            _warn(
                f"param group {place}: the loaded state dict has no options of it; its "
                "own stay (torch's helpers give those of a saved group to one group "
                "only: pass the state dict to load_state_dict itself)"
            )
        spread.append(group)
    return spread


def _agreed(place: int, sources: list[Group]) -> Group:
    """The options that the saved groups of a live group's parameters share."""
    keys = list(dict.fromkeys(chain(*map(_options, sources))))
    agreed = {
        key: sources[0][key]
        for key in keys
        if all(key in s and _same(s[key], sources[0].get(key)) for s in sources)
    }
    if differing := [key for key in keys if key not in agreed]:
        _warn(
            f"param group {place}: its parameters were saved in groups that differ in "
            f"{', '.join(sorted(differing))}; of these its own stay"
        )
    return agreed


def _names(groups: list[Group]) -> list[list[str]] | None:
    """The names by group; None unless every parameter has one of its own."""
    keys = list(chain(*(group["params"] for group in groups)))
    source = "params" if _are_text(keys) else "param_names"
    names = [list(group.get(source, ())) for group in groups]
    each = all(len(n) == len(group["params"]) for n, group in zip(names, groups))
    return names if keys and each and len(set(chain(*names))) == len(keys) else None


def _are_text(keys: list[Any]) -> bool:
    return all(isinstance(key, str) for key in keys)


def _options(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in _MEMBERS}


def _same(a: Any, b: Any) -> bool:
    return bool(torch.as_tensor(a == b).all())


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
