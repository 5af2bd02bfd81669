"""What the ranks of tests/zero/test_deepspeed_checkpoints.py do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_adadiag import (
    AdaDiag,
    load_portable_state_dict,
    param_groups,
    portable_state_dict,
)
from support.zero_cells import (
    BATCH,
    OPTIONS,
    Cell,
    Model,
    advance,
    build,
    full_weights,
    loss_of,
    start_deepspeed,
    weights,
)

HALF, END = 4, 8  # bases at steps 1, 4 and 7


def rigid(rank: int, world_size: int, cells: list[Cell], folder: str) -> dict[str, Any]:
    """Save, load into a new engine, go on; and the run that nothing interrupted."""
    deepspeed = start_deepspeed(rank, world_size)
    results = {}
    for i, cell in enumerate(cells):
        place = str(Path(folder) / f"{i}")
        model, engine = build(cell, deepspeed)
        advance(engine, cell, range(HALF))
        engine.basic_optimizer._binding.skipped_steps = 2
        engine.save_checkpoint(place)
        advance(engine, cell, range(HALF, END))
        whole = full_weights(model, deepspeed)
        model, engine = build(cell, deepspeed)
        engine.load_checkpoint(place)
        assert engine.basic_optimizer.skipped_steps == 2, cell.name
        advance(engine, cell, range(HALF, END))
        results[cell.name] = whole, full_weights(model, deepspeed)
    return results


def save_deepspeed(rank: int, world_size: int, cell: Cell, folder: str) -> None:
    """DeepSpeed's own checkpoint, which is then converted."""
    deepspeed = start_deepspeed(rank, world_size)
    _, engine = build(cell, deepspeed)
    advance(engine, cell, range(HALF))
    engine.save_checkpoint(folder, tag="half")


def load_universal(
    rank: int, world_size: int, cell: Cell, folder: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Weights at the load, weights after a step more, and what was said."""
    deepspeed = start_deepspeed(rank, world_size)
    model, engine = build(cell, deepspeed)
    engine.load_checkpoint(folder, tag="half_universal")
    loaded = full_weights(model, deepspeed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        advance(engine, cell, range(HALF, END))
    said = [str(w.message) for w in caught if "universal" in str(w.message)]
    return loaded, full_weights(model, deepspeed), said


def save_portable(rank: int, world_size: int, cell: Cell, folder: str) -> None:
    deepspeed = start_deepspeed(rank, world_size)
    _, engine = build(cell, deepspeed)
    advance(engine, cell, range(HALF))
    engine.basic_optimizer._binding.skipped_steps = 2
    dcp.save(portable_state_dict(engine), checkpoint_id=folder)


def load_portable(
    rank: int, world_size: int, cell: Cell, folder: str
) -> dict[str, Tensor]:
    deepspeed = start_deepspeed(rank, world_size)
    model, engine = build(cell, deepspeed)
    for param in model.parameters():
        if not param.requires_grad:  # must come from the checkpoint
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                param.data.zero_()
    state = portable_state_dict(engine)
    dcp.load(state, checkpoint_id=folder)
    state["optimizer"]["state"]["frozen"] = {"step": torch.tensor(1.0)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_portable_state_dict(engine, state)
    said = [str(w.message) for w in caught if "state was dropped" in str(w.message)]
    assert said == ["frozen: the engine does not train it; its state was dropped"]
    assert engine.basic_optimizer.skipped_steps == 2
    advance(engine, cell, range(HALF, END))
    return full_weights(model, deepspeed)


def fsdp2(rank: int, world_size: int, folder: str, *, load: bool) -> dict[str, Tensor]:
    """The same run under FSDP2, with torch's own functions; it saves or loads."""
    model = Model(frozen=True)
    start = weights(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(start[name])
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    opt = AdaDiag(param_groups(model), **OPTIONS)
    if load:
        state = _state(model, opt)
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            model,
            opt,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        assert opt.skipped_steps == 2
    opt._binding.skipped_steps = 2
    share = BATCH // world_size
    rows = slice(rank * share, (rank + 1) * share)
    for step in range(HALF, END) if load else range(HALF):
        opt.zero_grad()
        loss_of(model, step, rows).backward()
        opt.step()
    if not load:
        dcp.save(_state(model, opt), checkpoint_id=folder)
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def _state(model: Model, opt: AdaDiag) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, opt)
    return {"model": model_state, "optimizer": optimizer_state}
