"""Small decoders as real modules, with the parameters that the planner names."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sharded_adadiag import param_groups
from sharded_adadiag.planner.mesh import Mesh
from sharded_adadiag.planner.models import Decoder, Model, Weight

# Row shards are uneven on 2 and on 4 ranks, and key heads fewer than query heads.
TINY = Decoder(hidden=18, ffn=46, layers=2, queries=18, keys=6, vocab=61)
TINY_MODEL = Model("tiny", TINY.weights())
# What divides evenly among 2 tensor-parallel ranks.
EVEN = Decoder(hidden=16, ffn=44, layers=2, queries=16, keys=8, vocab=62)
EVEN_MODEL = Model("even", EVEN.weights())


class Decoders(nn.Module):
    """Modules, none of which can be run, with the parameters of a model."""

    def __init__(self, weights: tuple[Weight, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for weight in weights:
            *path, last = weight.name.split(".")
            module: nn.Module = self
            for name in path:
                if not hasattr(module, name):
                    module.add_module(name, nn.Module())
                module = getattr(module, name)
            value = torch.randn(weight.shape, generator=generator)
            module.register_parameter(last, nn.Parameter(value))

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.get_submodule("model.layers").children())


def shared(model: Model, mesh: Mesh) -> tuple[nn.Module, dict[str, Any]]:
    """The model as a framework shares it, and further options of the optimizer."""
    module = Decoders(model.weights)
    if mesh.layout == "ddp":
        return module, {"process_group": dist.group.WORLD}
    if mesh.layout == "fsdp1":
        how = {"device_id": torch.device("cpu"), "use_orig_params": True}
        layers = module.get_submodule("model.layers")
        for name, layer in list(layers.named_children()):
            setattr(layers, name, FullyShardedDataParallel(layer, **how))
        return FullyShardedDataParallel(module, **how), {}
    sizes = {
        "replicate": mesh.replicas if mesh.replicas > 1 else 0,
        "shard": mesh.shards,
        "tp": mesh.tensor_parallel if mesh.tensor_parallel > 1 else 0,
    }
    sizes = {name: size for name, size in sizes.items() if size}
    devices = init_device_mesh(
        "cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes)
    )
    if mesh.tensor_parallel > 1:
        megatron(module, devices["tp"])
    inner = tuple(name for name in sizes if name != "tp")
    for layer in module.layers:
        fully_shard(layer, mesh=devices[inner])
    return fully_shard(module, mesh=devices[inner]), {}


def megatron(module: nn.Module, mesh: Any) -> None:
    """Divide each layer's weights: by columns where it leads back to the stream."""
    for name, param in list(module.named_parameters()):
        place, _, last = name.rpartition(".")
        by_cols = place.endswith(("o_proj", "down_proj"))
        if param.dim() < 2:
            continue
        placement = [Shard(1 if by_cols else 0)]
        part = distribute_tensor(param.detach(), mesh, placement, src_data_rank=None)
        setattr(module.get_submodule(place), last, nn.Parameter(part))


def groups(module: nn.Module, model: Model) -> list[dict[str, Any]]:
    """The param groups, sorted as the model says; FSDP1 tells of its parameters."""
    param_groups(module)
    named = {clean(name): param for name, param in module.named_parameters()}
    return [
        {
            "params": [
                (w.name, named[w.name]) for w in model.weights if w.group == group
            ],
            "rotate": group[0],
            "batch_dims": group[1],
        }
        for group in sorted({w.group for w in model.weights}, reverse=True)
    ]


def clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def set_gradients(module: nn.Module, step: int) -> None:
    """Gradients of the same kind on every rank, of the shape that each holds."""
    generator = torch.Generator().manual_seed(step)
    for param in module.parameters():
        local: Tensor = param.to_local() if isinstance(param, DTensor) else param
        grad = torch.randn(local.shape, generator=generator)
        if isinstance(param, DTensor):
            mesh, placements = param.device_mesh, param.placements
            grad = DTensor.from_local(
                grad,
                mesh,
                placements,
                run_check=False,
                shape=param.shape,
                stride=param.stride(),
            )
        param.grad = grad
