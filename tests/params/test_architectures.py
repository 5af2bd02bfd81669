"""What goes where in the models that people train, by module and by name."""

import logging
import re
import warnings

import pytest
import torch
from support.architecture_table import TABLE
from support.architectures import MODELS, built
from torch import nn

from sharded_adadiag import AdaDiag, param_groups
from sharded_adadiag.params.exclusion import LOPSIDED, Exclusion
from sharded_adadiag.params.not_rotated import NAMES, TYPES, USUAL_NAMES

# Left out of the table where they are nothing peculiar.
ORDINARY = {"matrix", "embedding", "norm", "a side of 1"}


def short(name):
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-2:]).removesuffix(".weight")


def sorted_by_module(model, caplog):
    """Short names by kind, as the report and the groups have it."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="sharded_adadiag"):
        groups = param_groups(model)
    kinds = {}
    for line in caplog.messages[-1].splitlines():
        if line.startswith("  ") and line.endswith(")"):
            name, _, rest = line.strip().removesuffix(")").partition(" (")
            shape, _, kind = rest.partition(", ")
            kind = kind.removesuffix(", not rotated")
            kinds[name.partition(" x")[0], shape] = kind
    found = {}
    for group in groups:
        for name, param in group["params"]:
            if param.dim() < 2 or not param.requires_grad:  # not in the report
                continue
            alike = ".".join("*" if p.isdigit() else p for p in name.split("."))
            shape = " x ".join(map(str, param.shape))
            kind = kinds.get((name, shape), kinds.get((alike, shape)))
            assert (kind in {"", "stacked experts"}) is group["rotate"], name
            assert group.get("batch_dims", 0) == (kind == "stacked experts"), name
            found.setdefault(kind or "matrix", set()).add(short(name))
    return found, groups


def differing_by_name(groups):
    """What names and shapes alone tell otherwise: short names by what is done then."""
    # Without a module a stack is not taken for one of experts, and stays as it is.
    every = [
        (n, p, g["rotate"] and "batch_dims" not in g)
        for g in groups
        for n, p in g["params"]
    ]
    names = [name for name, _, _ in every]
    found = {}
    for name, param, rotated in every:
        if param.dim() < 2 or min(param.shape[0], param[0].numel()) < 2:
            continue
        alone = Exclusion(()).rotates(name, param.shape, names, guess=True)
        if alone is not rotated:
            kind = f"by name {'rotated' if alone else 'plain'}"
            found.setdefault(kind, set()).add(short(name))
    return found


@pytest.mark.parametrize("name", TABLE)
def test_what_goes_where(name, caplog):
    found, groups = sorted_by_module(built(name), caplog)
    kinds, by_name = {}, {}
    for kind, names in TABLE[name].items():
        wanted = by_name if kind.startswith("by name") else kinds
        wanted.setdefault(kind.partition(":")[0], set()).update(names.split())
    if name not in MODELS:
        found = {k: v for k, v in found.items() if k not in ORDINARY}
    assert found == kinds
    assert differing_by_name(groups) == by_name


def test_every_entry_of_the_list_decides_something_in_the_table():
    names, modules = [], []
    for model in map(built, TABLE):
        modules.extend(model.modules())
        for name, param in model.named_parameters():
            if param.dim() > 1 and min(param.shape[0], param[0].numel()) > 1:
                names.append(name.replace(".modules_to_save.default", ""))
    for entry in TYPES:
        assert any(isinstance(module, entry.what) for module in modules), entry
    deciding = {
        next((e for e in NAMES + USUAL_NAMES if re.search(e.what, name)), None)
        for name in names
    }
    assert [e for e in NAMES + USUAL_NAMES if e not in deciding] == []


@pytest.mark.parametrize("experts", [False, True])
def test_a_gate_is_a_router_only_beside_experts(experts):
    model = nn.Module()
    model.mlp = nn.ModuleDict({"gate": nn.Linear(6, 8), "up": nn.Linear(6, 8)})
    if experts:
        model.mlp.experts = nn.ModuleList([nn.Linear(6, 8)])
    model.head = nn.Linear(8, 2)
    groups = param_groups(model)
    rotated = [name for name, _ in groups[0]["params"]]
    assert ("mlp.gate.weight" in rotated) is not experts
    assert "mlp.up.weight" in rotated
    assert differing_by_name(groups) == {}


def test_a_convolution_with_a_parametrization_is_still_one():
    normed = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
    (rotated, _) = param_groups(nn.Sequential(normed, nn.Flatten(), nn.Linear(8, 2)))
    names = [name for name, _ in rotated["params"]]
    assert names == ["0.parametrizations.weight.original"]


def test_the_directions_of_the_older_weight_norm_are_not_rotated():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = torch.nn.utils.weight_norm(nn.Linear(6, 8))
    model = nn.ModuleDict({"block": normed, "head": nn.Linear(8, 2)})
    assert [g["rotate"] for g in param_groups(model)] == [False]


def test_a_matrix_of_absurd_proportions_is_warned_of_by_name(caplog):
    """Experts in a rotated group by hand: the expert axis is the short one."""
    ordinary, experts = torch.zeros(8, 28672), torch.zeros(8, 64, 512)
    params = [("lora_a", ordinary), ("experts", experts)]
    assert 28672 / 8 < LOPSIDED < 64 * 512 / 8
    for _, param in params:
        param.grad = torch.zeros_like(param)
    opt = AdaDiag([{"params": params, "rotate": True}])
    with caplog.at_level(logging.WARNING, logger="sharded_adadiag"):
        opt.step()
        opt.step()
    (message,) = caplog.messages
    assert message.startswith("experts: ") and "8 x 32768" in message


def test_an_expert_without_tokens_moves_as_under_adam():
    """One basis for all experts would mix them: it moved six times as far."""
    model = nn.Module()
    model.experts = nn.Parameter(torch.ones(4, 6, 5))
    model.last = nn.Linear(6, 3)
    opt = AdaDiag(param_groups(model), lr=1e-2)
    twin = model.experts.detach().clone().requires_grad_()
    adam = torch.optim.Adam([twin], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(10):
        grad = torch.randn(4, 6, 5, generator=generator)
        grad[2] *= step == 0
        model.experts.grad, twin.grad = grad, grad.clone()
        opt.step()
        adam.step()
    torch.testing.assert_close(model.experts, twin, atol=1e-6, rtol=0.0)


def test_the_report_counts_frozen_parameters_on_one_line(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    with caplog.at_level(logging.INFO, logger="sharded_adadiag"):
        param_groups(model)
    (report,) = caplog.messages
    assert "0.weight" not in report
    assert "rotated: 1 parameters, 16 elements" in report
    assert "frozen: 2 parameters, 20 elements" in report
