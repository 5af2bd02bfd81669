"""Users edit param groups between steps."""

from __future__ import annotations

import copy
import gc
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.block_model import fsdp1, loss_of, mesh_of
from support.edited_groups import (
    BROADCAST,
    LAYOUTS,
    SHAPES,
    Make,
    differing,
    on_ranks,
    parameters,
    placed,
    plain,
    sharded,
    step,
    values,
)
from torch import nn
from torch.distributed.tensor import Shard

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag, param_groups
from sharded_adadiag.options import OPTION_NAMES, PLANNED
from sharded_adadiag.plan.refresh import PLANS_KEPT, refresh_plans
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_threads


def membership(rank: int, make: Make, options: dict[str, Any]) -> None:
    opt, named = make(rank, **options)
    wide, tall, router, bias = (p for _, p in named)
    first, second = opt.param_groups
    moves = {"wide", "tall", "router", "bias"}

    def step_moves(number: int) -> set[str]:
        before = values(named)
        step(opt, named, number)
        return differing(before, values(named))

    assert step_moves(0) == moves
    second["params"] = [router, bias]  # tall leaves
    assert step_moves(1) == moves - {"tall"}
    assert float(opt.state[tall]["step"]) == 1.0
    assert len(opt.state_dict()["state"]) == 3
    first["params"].append(tall)  # and comes back, into another group
    first["lr"] = 0.0
    assert step_moves(2) == {"router", "bias"}
    assert float(opt.state[tall]["step"]) == 2.0
    assert [g["param_names"] for g in opt.param_groups] == [
        ["wide", "tall"],
        ["router", "bias"],
    ]
    opt.param_groups[0] = {**first, "lr": 1e-2}  # a dict in place of another
    assert step_moves(3) == moves
    opt.param_groups = [dict(group) for group in opt.param_groups]
    opt.param_groups[1]["lr"] = 0.0
    assert step_moves(4) == {"wide", "tall"}
    opt.param_groups[0]["params"], opt.param_groups[1]["params"] = (
        opt.param_groups[1]["params"],
        opt.param_groups[0]["params"],
    )
    assert step_moves(5) == {"router", "bias"}
    del opt.param_groups[1]
    del opt.state[wide], opt.state[tall]
    assert step_moves(6) == {"router", "bias"}
    assert wide not in opt.state
    opt.add_param_group({"params": [("wide", wide)], "lr": 1e-2})
    assert step_moves(7) == {"router", "bias", "wide"}
    assert float(opt.state[wide]["step"]) == 1.0
    twin_of = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(twin_of)
    assert step_moves(8) == {"router", "bias", "wide"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_membership_and_replaced_dicts_act_at_the_next_step(layout):
    on_ranks(layout, membership)


LIVE: dict[str, Any] = {
    "lr": 0.3,
    "betas": (0.5, 0.7),
    "eps": 0.1,
    "weight_decay": 0.5,
    "refresh_every": 3,
    "on_refresh": "reproject",
    "basis": "eigh",
    "noise_floor": 0.2,
    "nonfinite": "ignore",
    "clip_threshold": 0.01,
    "gram_beta": 0.5,
    "maximize": True,
}
# Options without which one means nothing.
WITH: dict[str, dict[str, Any]] = {
    "gram_beta": {"basis_from": "gram", "refresh_every": 1}
}

SAME_NUMBERS = {"nonfinite"}  # it changes no step with finite gradients


def live(rank: int, make: Make, options: dict[str, Any]) -> set[str]:
    """Which edits acted as a new optimizer does that has the option from its start."""
    effective = set()
    for name, value in LIVE.items():
        cls = HfacDiag if name == "clip_threshold" else AdaDiag
        own = options | WITH.get(name, {})
        opt, named = make(rank, cls=cls, **own)
        step(opt, named, 0)
        saved = copy.deepcopy(opt.state_dict())
        # A load puts the summands of averages elsewhere, so all three make one.
        opt.load_state_dict(copy.deepcopy(saved))
        other, other_named = make(rank, cls=cls, **own, **{name: value})
        for group in other.param_groups:
            group[name] = value
        saved["param_groups"] = other.state_dict()["param_groups"]
        other.load_state_dict(saved)
        unedited, unedited_named = make(rank, cls=cls, **own)
        unedited.load_state_dict(opt.state_dict())
        with torch.no_grad():
            for (_, a), (_, b), (_, c) in zip(other_named, named, unedited_named):
                a.copy_(b)
                c.copy_(b)
        for group in opt.param_groups:
            group[name] = value
        for number in range(1, 4):
            for one, its in (
                (opt, named),
                (other, other_named),
                (unedited, unedited_named),
            ):
                step(one, its, number)
        for key, got in values(named).items():
            assert_equal(got, values(other_named)[key], f"{name}: {key}")
        if differing(values(named), values(unedited_named)):
            effective.add(name)
    return effective


@pytest.mark.parametrize("layout", LAYOUTS)
def test_live_options_act_at_the_next_step(layout):
    for effective in on_ranks(layout, live):
        assert effective == set(LIVE) - SAME_NUMBERS


def from_gram_blocks(rank: int) -> None:
    """A basis that was planned to come from the ranks' own blocks comes whole."""
    opt, named = sharded(rank, basis="eigh", **BROADCAST)
    one, its = plain(rank, basis="eigh")
    for number in range(4):
        step(opt, named, number)
        step(one, its, number)
        for group in [*opt.param_groups, *one.param_groups]:
            group["basis"] = "svd" if number == 1 else group["basis"]
    assert any(m.route.basis_from == "gram" for m in opt._binding._engine.plan.matrices)
    for name, value in values(its).items():
        torch.testing.assert_close(values(named)[name], value, atol=1e-5, rtol=0.0)


def test_a_basis_of_gram_blocks_may_become_one_of_the_gradient():
    run_threads(2, from_gram_blocks)


def test_every_option_is_either_planned_or_live():
    assert set(PLAN) == set(PLANNED)
    assert sorted(OPTION_NAMES) == sorted([*PLAN, *LIVE])


PLAN: dict[str, Any] = {
    "rotate": False,
    "sides": "two",
    "side": "right",
    "momentum": False,
    "state_dtype": torch.float64,
    "rotation_dtype": torch.float64,
    "max_rotated_dim": 4,
    "refresh_slots": 2,
    "refresh_lag": 1,
    "basis_from": "gram",
    "first_moment": "original",
    "batch_dims": 1,
    "split_rows": (2, 2),
}


def planned(rank: int, make: Make, options: dict[str, Any], editors: int) -> list[str]:
    """The errors of one edit after the other, by the first ``editors`` ranks."""
    opt, named = make(rank, cls=AdafacDiag, **options)
    step(opt, named, 0)
    messages = []
    for name, value in PLAN.items():
        before = values(named)
        group = opt.param_groups[0]
        old = dict(group)
        if rank < editors:
            group[name] = value
        with pytest.raises(ValueError) as caught:
            step(opt, named, 1)
        assert not differing(before, values(named))
        messages.append(str(caught.value))
        group.clear()
        group.update(old)
    step(opt, named, 1)
    assert float(opt.state[named[0][1]]["step"]) == 2.0
    return messages


@pytest.mark.parametrize("editors", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_planned_option_cannot_change_and_every_rank_says_so(layout, editors):
    results = on_ranks(layout, planned, editors)
    assert all(messages == results[0] for messages in results)
    for (name, value), message in zip(PLAN.items(), results[0]):
        was = {"rotate": True, "sides": "one", "side": "auto", "momentum": True}
        counts = {"max_rotated_dim": 8192, "batch_dims": 0}
        counts |= {"refresh_slots": 1, "refresh_lag": 0}
        made_of = {"basis_from": "gradient", "first_moment": "rotated"}
        old = {**was, **counts, **made_of}.get(name)
        assert f"wide: {name} of its param group changed from {old!r}" in message
        assert f"to {value!r}" in message and "nothing has changed" in message


def test_a_parameter_may_not_move_to_a_group_that_was_planned_otherwise():
    named = parameters()
    groups = [{"params": named[:2]}, {"params": named[2:], "rotate": False}]
    opt = AdaDiag(groups)
    step(opt, named, 0)
    (wide, tall), (_, bias) = (g["params"] for g in opt.param_groups)
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop())
    with pytest.raises(ValueError, match=r"tall: rotate .* from True to False"):
        opt.step()
    opt.param_groups[0]["params"] = [wide, tall, bias]  # means nothing to a vector
    opt.param_groups[1]["params"] = opt.param_groups[1]["params"][:1]
    opt.step()


def test_reprojection_on_two_sides_cannot_come_late_where_blocks_are_planned():
    def body(rank: int) -> str:
        opt, named = sharded(rank, sides="two", **BROADCAST)
        step(opt, named, 0)
        opt.param_groups[0]["on_refresh"] = "reproject"
        with pytest.raises(ValueError) as caught:
            step(opt, named, 1)
        return str(caught.value)

    for message in run_threads(2, body):
        assert "wide: on_refresh" in message and 'distribution="owner"' in message


# ------------------------------------------------------------- ranks do not agree


def set_option(name: str, value: Any) -> Callable[[AdaDiag], None]:
    def edit(opt: AdaDiag) -> None:
        opt.param_groups[1][name] = value

    return edit


def drop(opt: AdaDiag) -> None:
    opt.param_groups[1]["params"] = opt.param_groups[1]["params"][1:]


def move(opt: AdaDiag) -> None:
    opt.param_groups[0]["params"].append(opt.param_groups[1]["params"][-1])
    opt.param_groups[1]["params"] = opt.param_groups[1]["params"][:-1]


def add(opt: AdaDiag) -> None:
    opt.add_param_group({"params": [("late", nn.Parameter(torch.ones(3, 4)))]})


EDITS: dict[str, tuple[Callable[[AdaDiag], None], list[str]]] = {
    "refresh_every": (
        set_option("refresh_every", 3),
        ["tall: refresh_every is 2", "3"],
    ),
    "nonfinite": (set_option("nonfinite", "skip"), ["tall: nonfinite", "'skip'"]),
    "noise_floor": (set_option("noise_floor", 0.1), ["tall: noise_floor", "0.1"]),
    "basis": (set_option("basis", "eigh"), ["tall: basis", "'eigh'"]),
    "no check": (set_option("nonfinite", "ignore"), ["tall: nonfinite", "'ignore'"]),
    "invalid": (set_option("lr", math.nan), ["rank 1: ", "tall: invalid lr: got nan"]),
    "removed": (drop, ["tall: the param groups of rank 0 have it, those of rank 1"]),
    "moved": (move, ["bias: rank 1 has it in another param group"]),
    "added": (add, ["rank 0 has 0 trainable new parameters", "rank 1 has 1"]),
}


def disagreeing(rank: int, make: Make, options: dict[str, Any], what: str) -> str:
    opt, named = make(rank, **options)
    step(opt, named, 0)
    before = values(named)
    kept = [
        {**g, "params": [*g["params"]], "param_names": [*g["param_names"]]}
        for g in opt.param_groups
    ]
    if rank == 1:
        EDITS[what][0](opt)
        if what == "no check":  # then this rank would make no agreement at all
            opt.param_groups[0]["nonfinite"] = "ignore"
    with pytest.raises(ValueError) as caught:
        step(opt, named, 1)
    assert not differing(before, values(named))
    opt.param_groups = kept
    step(opt, named, 1)  # a refused step leaves the optimizer usable
    assert differing(before, values(named)) == set(SHAPES)
    return str(caught.value)


@pytest.mark.parametrize("what", EDITS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one process"])
def test_ranks_that_edit_differently_all_raise_the_same_error(layout, what):
    messages = on_ranks(layout, disagreeing, what)
    assert len(set(messages)) == 1
    for text in EDITS[what][1]:
        if what != "no check" or "tall" not in text:
            assert text in messages[0], messages[0]


def fsdp1_edits(rank: int) -> None:
    """Pieces of FSDP1 and their groups, edited alike and then on one rank only."""
    model = fsdp1()
    opt = AdaDiag(param_groups(model), lr=1e-2, refresh_every=2)
    loss_of(model, rank, 0).backward()
    opt.step()
    opt.param_groups[0]["lr"] = 0.0
    opt.param_groups[1]["params"] = opt.param_groups[1]["params"][1:]
    loss_of(model, rank, 1).backward()
    rotated = [p.detach().clone() for p in opt.param_groups[0]["params"]]
    opt.step()
    for param, before in zip(opt.param_groups[0]["params"], rotated):
        assert_equal(param.detach(), before)
    opt.param_groups[0]["refresh_every"] = 2 + rank
    with pytest.raises(
        ValueError, match="refresh_every is 2 on rank 0 and 3 on rank 1"
    ):
        opt.step()


def test_fsdp1_takes_the_same_edits():
    run_threads(2, fsdp1_edits)


# ---------------------------------------------------------------------- caches


def reachable(root: Any) -> int:
    """How many containers of ours hang on an object."""
    seen: dict[int, Any] = {}
    left = [root]
    while left:
        one = left.pop()
        if (
            id(one) not in seen
            and isinstance(one, (list, dict, tuple, set))
            or (
                id(one) not in seen
                and type(one).__module__.startswith("sharded_adadiag")
            )
        ):
            seen[id(one)] = one
            left.extend(gc.get_referents(one))
    return len(seen)


def test_nothing_is_kept_of_varying_gradients():
    named = [(f"p{i}", nn.Parameter(torch.zeros(3, 4))) for i in range(12)]
    opt = AdaDiag(named, refresh_every=3)
    chance = random.Random(0)
    sizes = set()
    for i in range(300):
        for _, param in named:
            there = i == 0 or chance.random() < 0.5
            param.grad = torch.ones(3, 4) if there else None
        opt.step()
        sizes.add(reachable(opt._binding))
    assert len(sizes) == 1


def varying_refreshes(rank: int) -> tuple[int, int]:
    mesh = mesh_of(2)
    named: list[tuple[str, Any]] = [
        (f"p{i}", nn.Parameter(placed(torch.zeros(4, 6), mesh, [Shard(0)])))
        for i in range(9)
    ]
    opt = AdaDiag(named, refresh_every=2, **BROADCAST)
    chance = random.Random(0)
    for _ in range(3 * PLANS_KEPT):
        for _, param in named:
            there = chance.random() < 0.5
            param.grad = torch.ones_like(param) if there else None
        opt.step()
    plans = refresh_plans.cache_info()
    return plans.misses, plans.currsize


def test_what_is_kept_of_varying_refreshes_is_bounded():
    for misses, kept in run_threads(2, varying_refreshes):
        assert misses > PLANS_KEPT and kept == PLANS_KEPT
