"""The saved form by parameter name, where torch's own helper cannot make it."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor


def named_state_dict(
    optimizer: Any, *, full_state_dict: bool = False
) -> dict[str, Any]:
    """What ``get_optimizer_state_dict`` of torch gives, also for FSDP1.

    For FSDP1 torch's helper refuses every state that is not shaped like the flat
    pieces; for other layouts the two give the same keys and values. Save it with
    ``torch.distributed.checkpoint``. To load, make one, ``dcp.load`` into it and pass
    it to ``optimizer.load_state_dict``. Creates missing states. A collective.

    Args:
        optimizer: Made of named parameters, as ``param_groups`` gives them.
        full_state_dict: Give every rank plain full tensors, for ``torch.save``, instead
            of DTensors sharded by rows.

    Returns:
        ``state`` by parameter name and ``param_groups``.

    Raises:
        ValueError: If the parameters have no names.
    """
    if any("param_names" not in group for group in optimizer.param_groups):
        raise ValueError(
            "named_state_dict: the optimizer's parameters have no names; make it of "
            "param_groups(model) or model.named_parameters()"
        )
    optimizer.state_bytes()  # creates missing states
    saved = optimizer.state_dict()
    names: dict[int, str] = {}
    groups = []
    for group in saved["param_groups"]:
        names |= dict(zip(group["params"], group["param_names"]))
        groups.append({**group, "params": group["param_names"]})
    states = {names[i]: state for i, state in saved["state"].items()}
    if full_state_dict:
        states = {n: {k: _full(v) for k, v in s.items()} for n, s in states.items()}
    return {"state": states, "param_groups": groups}


def _full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
