"""Checkpoints of a run: RUN_DIR/checkpoints/step-N, one file per rank.

A checkpoint is written to a temporary folder that gets its name when every rank has
finished, so that a folder named step-N is always whole.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

_SHARD_KEY = "__shard__"


def save(
    run_dir: Path, step: int, state: dict[str, Any], *, ranks: Ranks, keep_last: int
) -> Path:
    """Writes this rank's part of a checkpoint; every rank calls it.

    Args:
        run_dir: The folder of the run.
        step: Number of finished steps.
        state: Dicts, lists, plain values, tensors and DTensors.
        ranks: This process among the others.
        keep_last: Older checkpoints than so many are removed; 0 keeps all.

    Returns:
        The folder of the checkpoint.
    """
    final = _root(run_dir) / f"step-{step}"
    temporary = _root(run_dir) / f"step-{step}.writing"
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.wait()
    with (temporary / f"rank-{ranks.rank}.pt").open("wb") as file:
        torch.save(_without_mesh(state), file)
        file.flush()
        os.fsync(file.fileno())
    ranks.wait()
    if ranks.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in _all(run_dir)[:-keep_last] if keep_last else []:
            shutil.rmtree(old)
    ranks.wait()
    return final


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return next(reversed(_all(run_dir)), None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def load(checkpoint: Path, *, ranks: Ranks) -> dict[str, Any]:
    """This rank's state as it was given to `save`.

    Raises:
        ValueError: if the checkpoint was written by another number of ranks.
    """
    written_by = len(list(checkpoint.glob("rank-*.pt")))
    if written_by != ranks.world_size:
        raise ValueError(
            f"{checkpoint} was written by {written_by} ranks, this run has"
            f" {ranks.world_size}; continue with --nproc-per-node={written_by}"
            f" (RANKS={written_by} for launch/pretrain.sh)"
        )
    path = checkpoint / f"rank-{ranks.rank}.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return _with_mesh(state, ranks.mesh, ranks.device)


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Copies saved parameters and buffers into the model, shard by shard."""
    current = model.state_dict()
    if current.keys() != weights.keys():
        raise ValueError(
            f"the checkpoint has other weights: {sorted(current.keys() ^ weights)}"
        )
    for name, value in current.items():
        value.copy_(weights[name])


def _root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _all(run_dir: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    if not _root(run_dir).is_dir():
        return []
    found = [p for p in _root(run_dir).iterdir() if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=step_of)


def _without_mesh(value: Any) -> Any:
    """Replaces DTensors: a mesh holds process groups, which cannot be saved."""
    if isinstance(value, DTensor):
        return {
            _SHARD_KEY: value.to_local().detach(),
            "shape": tuple(value.shape),
            "stride": tuple(value.stride()),
            "dims": [_sharded_dim(p) for p in value.placements],
        }
    if isinstance(value, dict):
        return {key: _without_mesh(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_mesh(item) for item in value)
    return value


def _sharded_dim(placement: object) -> int | None:
    if type(placement) is Shard:
        return placement.dim
    assert isinstance(placement, Replicate), placement
    return None


def _with_mesh(value: Any, mesh: DeviceMesh, device: torch.device) -> Any:
    """Undoes `_without_mesh`."""
    if isinstance(value, dict) and _SHARD_KEY in value:
        dims = value["dims"]
        return DTensor.from_local(
            value[_SHARD_KEY].to(device),
            mesh,
            [Replicate() if dim is None else Shard(dim) for dim in dims],
            run_check=False,
            shape=torch.Size(value["shape"]),
            stride=value["stride"],
        )
    if isinstance(value, dict):
        return {key: _with_mesh(item, mesh, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_mesh(item, mesh, device) for item in value)
    return value
