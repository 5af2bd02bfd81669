"""Gram averages, of which each rank of a team has a summand, in saved states."""

import pytest
import torch
from support.teams import teams_of
from support.training import (
    CLASSES,
    Parameters,
    advance,
    alone,
    groups,
    local_gradient,
    plain_names,
    sharded_model,
    whole_weights,
)
from torch import nn

from sharded_adadiag import AdaDiag, named_state_dict
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import HARD_CASES
from sharded_adadiag.testing.ranks import run_processes, run_threads

CASES = tuple(c for c in HARD_CASES if not c.frozen)
GRAM = {"basis_from": "gram", "first_moment": "original"}
HOW = {"lr": 1e-2, "weight_decay": 0.1, "refresh_every": 12}
FIRST, ALL = 20, 30  # a refresh at step 25
ONE = ("plain", 1, {})
OWNERS = ("fsdp2", 3, {"distribution": "owner"})
TEAMS = ("fsdp2", 3, {"size": 2})
EVERYONE = ("tp", 2, {"distribution": "broadcast"})
REPLICAS = ("hsdp", 4, {"distribution": "broadcast"})
FLAT = ("fsdp1", 2, {})


def on_ranks(place, body, *args):
    layout, ranks, _ = place
    run = run_processes if layout == "fsdp1" else run_threads
    return run(ranks, body, place, *args)


def made(place):
    layout, _, options = place
    own = {key: value for key, value in options.items() if key != "size"}
    model, extra = Parameters(CASES, torch.float64), {}
    if layout != "plain":
        model, extra = sharded_model(layout, CASES, torch.float64)
    opt = CLASSES["AdaDiag"](groups(model, CASES), **HOW, **GRAM, **own, **extra)
    return model, opt


def first_part(rank, place):
    model, opt = made(place)
    with teams_of(place[2].get("size", 1)):
        advance(model, opt, CASES, torch.float64, 0, FIRST)
    return whole_weights(model, CASES), named_state_dict(opt, full_state_dict=True)


def second_part(rank, place, before, saved):
    model, opt = made(place)
    with torch.no_grad():
        for case, value in zip(CASES, before):
            param = plain_names(model)[case.name]
            param.copy_(local_gradient(param, value))
    with teams_of(place[2].get("size", 1)):
        opt.load_state_dict(saved)
        again = named_state_dict(opt, full_state_dict=True)["state"]
        for name, state in saved["state"].items():
            for key, value in state.items():
                got = torch.as_tensor(again[name][key])
                assert_equal(got, torch.as_tensor(value), f"{name}: {key}")
        advance(model, opt, CASES, torch.float64, FIRST, ALL)
    return whole_weights(model, CASES)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (ONE, TEAMS),
        (TEAMS, ONE),
        (TEAMS, EVERYONE),
        (EVERYONE, OWNERS),
        (OWNERS, REPLICAS),
        (REPLICAS, TEAMS),
        pytest.param(FLAT, TEAMS, marks=pytest.mark.multiprocess),
        pytest.param(TEAMS, FLAT, marks=pytest.mark.multiprocess),
    ],
    ids=lambda place: f"{place[0]} {place[2]}",
)
def test_a_run_goes_on_in_any_other_layout(source, target):
    before, saved = on_ranks(source, first_part)[0]
    assert saved["state"]["tall"]["gram_right"].shape == (7, 7)
    want = alone(CASES, torch.float64, "AdaDiag", GRAM)
    for weights in on_ranks(target, second_part, before, saved):
        for case, a, b in zip(CASES, weights, want):
            torch.testing.assert_close(
                a, b, atol=1e-6, rtol=1e-6, msg=lambda m, c=case: f"{c.name}: {m}"
            )


def trained(**options):
    weight = nn.Parameter(torch.ones(4, 6))
    opt = AdaDiag([{"params": [weight], "rotate": True}], **options)
    weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    opt.step()
    return opt, weight


def test_options_that_nobody_set_are_in_no_group_so_older_checkpoints_can_be_read():
    opt, _ = trained()
    later = {"basis_from", "gram_beta", "first_moment"}
    assert later.isdisjoint(opt.state_dict()["param_groups"][0])
    opt, _ = trained(basis_from="gram", gram_beta=0.9)
    group = opt.state_dict()["param_groups"][0]
    assert later & group.keys() == {"basis_from", "gram_beta"}


def test_averages_that_a_state_lacks_start_anew_and_its_basis_stays():
    old, _ = trained()
    opt, weight = trained(basis_from="gram")
    with pytest.warns(UserWarning, match="no gram_left; its averages start anew"):
        opt.load_state_dict(old.state_dict())
    state = opt.state[weight]
    assert_equal(state["gram_left"], torch.zeros(4, 4))
    assert not torch.equal(state["rotation_left"], torch.eye(4))
    opt.step()
    assert state["gram_left"].any()
