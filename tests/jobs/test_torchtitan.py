"""torchtitan's container of optimizers.

Its packages rule out the newest of the other examples' (datasets 4.8 and later), so it
is not installed with them. What its container gives an optimizer and asks of it is
repeated here, as torchtitan 0.3.0 does it; where it is installed, its example runs too.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import ROOT
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_adadiag import AdaDiag
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_threads

EXAMPLES = ROOT / "examples" / "clients"
IMPLEMENTATION = {"fused": True, "foreach": False}  # the container's, in every group


class Part(nn.Module):
    """A stage of a pipeline."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.normal_(generator=generator)
        if dist.is_initialized():
            fully_shard(self)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.embedding(tokens))))


def made(part: nn.Module, prefix: str) -> AdaDiag:
    """An optimizer from the groups that the container builds of patterns."""
    named = dict(part.named_parameters())
    options: dict[str, dict[str, Any]] = {
        "embedding": {"lr": 0.02, "rotate": False},
        "": {"lr": 0.01, "refresh_every": 2},
    }
    groups = []
    for pattern, own in options.items():
        params = {n: named.pop(n) for n in list(named) if pattern in n}
        names = [f"{prefix}.{name}" for name in params]
        group = {"params": [*params.values()], "param_names": names}
        groups.append(group | IMPLEMENTATION | own)
    return AdaDiag(groups)


def materialize(optimizer: AdaDiag) -> None:
    """A step with zero gradients and learning rates makes the states."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    optimizer.zero_grad()


def flat(optimizers: list[AdaDiag]) -> dict[str, Any]:
    """The states and the options of all, by the names of the parameters."""
    found = {}
    for saved in (optimizer.state_dict() for optimizer in optimizers):
        for group in saved["param_groups"]:
            options = {k: v for k, v in group.items() if "param" not in k}
            for place, name in zip(group["params"], group["param_names"]):
                for kind, values in (
                    ("state", saved["state"][place]),
                    ("group", options),
                ):
                    found |= {f"{kind}.{name}.{k}": v for k, v in values.items()}
    return found


def load(optimizer: AdaDiag, saved: dict[str, Any]) -> None:
    """What the live states and groups have keys for, by positions again."""
    states: dict[int, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        places = []
        for name, param in zip(group["param_names"], group["params"]):
            places.append(len(states))
            keys = optimizer.state[param]
            states[places[-1]] = {k: saved[f"state.{name}.{k}"] for k in keys}
        first = group["param_names"][0]
        options = {k: saved[f"group.{first}.{k}"] for k in group if "param" not in k}
        groups.append({"params": places, **options})
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def start() -> tuple[list[Part], list[AdaDiag]]:
    parts = [Part(seed) for seed in range(2)]
    return parts, [made(part, f"stage{i}") for i, part in enumerate(parts)]


def train(parts: list[Part], optimizers: list[AdaDiag], steps: range) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + rank)
        for part in parts:
            part(
                torch.randint(16, (12,), generator=generator)
            ).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def weights(parts: list[Part]) -> list[Tensor]:
    params = [param for part in parts for param in part.parameters()]
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]


def resumed(rank: int = 0) -> None:
    parts, optimizers = start()
    train(parts, optimizers, range(3))
    others, fresh = start()
    saved = flat(optimizers)
    for part, other, optimizer in zip(parts, others, fresh):
        other.load_state_dict(part.state_dict())
        materialize(optimizer)
        load(optimizer, saved)
        for group in optimizer.param_groups:
            assert {key: group[key] for key in IMPLEMENTATION} == IMPLEMENTATION
    train(parts, optimizers, range(3, 6))
    train(others, fresh, range(3, 6))
    for ours, whole in zip(weights(others), weights(parts)):
        assert_equal(ours, whole, "a weight")
    rotated = [row.name for row in fresh[0].describe().matrices]
    assert rotated == ["stage0.up.weight", "stage0.down.weight"]


def test_what_its_container_does_goes_on_as_if_uninterrupted():
    resumed()


def test_what_its_container_does_goes_on_under_fsdp2():
    run_threads(2, resumed)


def test_a_step_without_gradients_and_rates_moves_no_weight():
    parts, optimizers = start()
    before = [weight.clone() for weight in weights(parts)]
    for optimizer in optimizers:
        materialize(optimizer)
    for weight, old in zip(weights(parts), before):
        assert_equal(weight, old, "a weight")


def test_its_example_goes_on_as_if_uninterrupted(tmp_path, monkeypatch):
    reason = "torchtitan is not installed; the tests above repeat what it does"
    pytest.importorskip("torchtitan.components.optimizer", reason=reason)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train_example = importlib.import_module("with_torchtitan").train
    whole, _ = train_example(3, str(tmp_path / "whole.pt"))
    train_example(2, str(tmp_path / "half.pt"))
    again, _ = train_example(1, str(tmp_path / "end.pt"), str(tmp_path / "half.pt"))
    for ours, other in zip(again.parameters(), whole.parameters()):
        assert_equal(ours, other, "a weight")
