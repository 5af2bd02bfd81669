"""The saved form stays readable: a checkpoint in the tree, and the version in it.

``python tests/checkpoint/test_saved_form.py`` writes the checkpoint anew; do so only
together with a new format version, and keep the old one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_adadiag import AdaDiag, param_groups
from sharded_adadiag.checkpoint.hooks import FORMAT_VERSION
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_processes
from sharded_adadiag.testing.reference import ReferenceOptimizer

FIXTURES = Path(__file__).parent / "fixtures"
OPTIONS: dict[str, Any] = {"lr": 1e-2, "refresh_every": 4}
BEFORE, AFTER = 5, 11  # bases at steps 1, 5 and 9


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.tall, self.wide = nn.Linear(5, 7), nn.Linear(7, 5)
        self.head = nn.Linear(5, 6)

    @torch.no_grad()
    def fill(self) -> Model:
        for i, param in enumerate(self.parameters()):
            param.copy_(values(param.shape, seed=i))
        return self


def values(shape: torch.Size, seed: int) -> torch.Tensor:
    # By arithmetic, not by a generator whose numbers a later torch may change.
    count = torch.arange(shape.numel(), dtype=torch.float64)
    return torch.sin(count * count * 0.7 + count + seed).float().view(shape)


def advance(model: nn.Module, opt: Any, steps: range) -> None:
    for step in steps:
        for i, param in enumerate(model.parameters()):
            grad = values(param.shape, seed=100 * step + i)
            if isinstance(param, DTensor):
                grad = torch.distributed.tensor.distribute_tensor(
                    grad, param.device_mesh, param.placements, src_data_rank=None
                )
            param.grad = grad
        opt.step()


def build(world_size: int) -> tuple[nn.Module, AdaDiag]:
    model = Model().fill()
    if world_size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    return model, AdaDiag(param_groups(model), **OPTIONS)


def state_of(model: nn.Module, opt: AdaDiag) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, opt)
    return {"model": model_state, "optimizer": optimizer_state}


def write(rank: int, folder: str) -> None:
    model, opt = build(2)
    advance(model, opt, range(BEFORE))
    dcp.save(state_of(model, opt), checkpoint_id=folder)


def go_on(rank: int, world_size: int, folder: str) -> list[torch.Tensor]:
    model, opt = build(world_size)
    state = state_of(model, opt)
    with warnings.catch_warnings():
        # One process reads without a process group; torch remarks upon it.
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        opt,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    assert all(group["refresh_every"] == 4 for group in opt.param_groups)
    advance(model, opt, range(BEFORE, AFTER))
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in model.parameters()
    ]


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_checkpoint_of_every_version_goes_on(version, world_size):
    """It was written by two ranks; the reference never stopped."""
    folder = str(FIXTURES / f"checkpoint-{version}")
    if world_size == 1:
        finals = [go_on(0, 1, folder)]
    else:
        finals = run_processes(world_size, go_on, world_size, folder)
    model = Model().fill()
    groups = [
        {**group, "params": [param for _, param in group["params"]]}
        for group in param_groups(model)
    ]
    reference = ReferenceOptimizer("adadiag", groups, **OPTIONS)
    advance(model, reference, range(AFTER))
    for final in finals:
        for a, b in zip(final, model.parameters(), strict=True):
            # The file may have been written on another kind of processor.
            torch.testing.assert_close(a, b.detach(), atol=1e-5, rtol=1e-5)


def test_the_version_is_in_the_saved_form_and_a_newer_one_is_refused():
    model, opt = build(1)
    advance(model, opt, range(2))
    state = opt.state_dict()
    assert [g["format_version"] for g in state["param_groups"]] == [FORMAT_VERSION] * 2
    state["param_groups"][1]["format_version"] = FORMAT_VERSION + 1
    other_model, other = build(1)
    with pytest.raises(ValueError, match=f"format {FORMAT_VERSION + 1}.*newer"):
        other.load_state_dict(state)
    # Nothing was taken over, and the optimizer still works.
    advance(other_model, other, range(2))
    for a, b in zip(other_model.parameters(), model.parameters(), strict=True):
        assert_equal(a.detach(), b.detach())


def test_a_load_adds_no_key_to_the_saved_form():
    model, opt = build(1)
    before = [set(group) for group in opt.state_dict()["param_groups"]]
    opt.load_state_dict(opt.state_dict())
    assert [set(group) for group in opt.state_dict()["param_groups"]] == before


if __name__ == "__main__":
    target = FIXTURES / f"checkpoint-{FORMAT_VERSION}"
    run_processes(2, write, str(target))
    print(f"wrote {target}")
