"""How ranks train random cases, and what then differs from one process."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from sharded_adadiag.params.local import local
from support.random_cases import CLASSES, RandomCase, gradient, initial_weights


def train(
    case: RandomCase, params: list[Tensor], shard: Any, **extra: Any
) -> list[list[Tensor]]:
    """Train what a rank holds; its local weights after each step.

    `shard(i, full)` is a rank's part of a full gradient of parameter i.
    """
    groups = [
        {
            "params": [
                (f"p{i}", p) for i, p in enumerate(params) if case.params[i].rotate == r
            ],
            "rotate": r,
        }
        for r in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    opt = CLASSES[case.method](groups, lr=1e-2, **case.options, **extra)
    weights = []
    for step in range(case.steps):
        for i, param in enumerate(params):
            full = gradient(case, i, step)
            param.grad = None if full is None else shard(i, full)
        try:
            opt.step()
        except RuntimeError as error:
            if "NaN or Inf entries" not in str(error):
                raise
        weights.append([local(p).detach().clone() for p in params])
    return weights


def train_alone(case: RandomCase) -> list[list[Tensor]]:
    params = [nn.Parameter(w.clone()) for w in initial_weights(case)]
    return train(case, params, lambda i, full: full)


def differing(
    rank: int, case: RandomCase, want: list[list[Tensor]], differ: Any
) -> list[str]:
    """On one rank: what differs from the full weights wanted after each step."""
    params, shard, extra = RANK_PARAMETERS[case.layout](case)
    got = train(case, params, shard, **extra)
    return [
        f"rank {rank}, step {step}, p{i}: {message}"
        for step, (ours, theirs) in enumerate(zip(got, want))
        for i, (a, b) in enumerate(zip(ours, theirs))
        if (message := differ(a, local(shard(i, b))))
    ]


# --- layouts ------------------------------------------------------------------------


def on_a_mesh(case: RandomCase) -> tuple[list[Tensor], Any, dict[str, Any]]:
    """DTensors of whatever placements were drawn, beside plain tensors."""
    mesh = init_device_mesh("cpu", case.mesh)
    place = mesh.get_coordinate()

    def shard(i: int, full: Tensor) -> Tensor:
        letters = case.params[i].placements
        if not letters:
            return full
        piece = full
        for letter, parts, mine in zip(letters, case.mesh, place):
            if letter != "r":
                piece = part(piece, int(letter), parts, mine)
        placements: list[Placement] = [
            Replicate() if letter == "r" else Shard(int(letter)) for letter in letters
        ]
        return DTensor.from_local(
            piece.clone(),
            mesh,
            placements,
            run_check=False,
            shape=full.shape,
            stride=full.stride(),
        )

    full = initial_weights(case)
    params = [nn.Parameter(shard(i, w.clone())) for i, w in enumerate(full)]
    return params, shard, {"process_group": dist.group.WORLD}


def part(tensor: Tensor, dim: int, parts: int, index: int) -> Tensor:
    """As DTensor divides: chunks of the rounded-up size, the last ones less or none."""
    length = tensor.shape[dim]
    size = -(-length // parts)
    start = min(index * size, length)
    return tensor.narrow(dim, start, min(size, length - start))


def replicated(case: RandomCase) -> tuple[list[Tensor], Any, dict[str, Any]]:
    params: list[Tensor] = [nn.Parameter(w.clone()) for w in initial_weights(case)]
    return params, lambda i, full: full, {"process_group": dist.group.WORLD}


def fully_sharded(case: RandomCase) -> tuple[list[Tensor], Any, dict[str, Any]]:
    """What fully_shard makes of plain parameters, or of tensor-parallel ones."""
    two = len(case.mesh) == 2
    names = ("dp", "tp") if two else ("dp",)
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=names)
    model = nn.ParameterDict()
    for i, weight in enumerate(initial_weights(case)):
        letters = case.params[i].placements
        if two and letters and weight.shape[int(letters)] % case.mesh[1] == 0:
            weight = distributed(weight, mesh["tp"], [Shard(int(letters))])
        model[f"p{i}"] = nn.Parameter(weight.clone())
    fully_shard(model, mesh=mesh["dp"])
    params: list[Tensor] = [model[f"p{i}"] for i in range(len(case.params))]

    def shard(i: int, full: Tensor) -> Tensor:
        param = params[i]
        assert isinstance(param, DTensor)
        return distributed(full, param.device_mesh, param.placements)

    return params, shard, {}


def distributed(full: Tensor, mesh: DeviceMesh, placements: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, mesh, placements, src_data_rank=None)


RANK_PARAMETERS = {
    "mesh": on_a_mesh,
    "mesh of two dimensions": on_a_mesh,
    "ddp": replicated,
    "fsdp2": fully_sharded,
    "fsdp2 x tp": fully_sharded,
}
