"""Users edit param groups between steps, and others replace what is in them."""

from __future__ import annotations

import copy
import gc
import logging
import math
import random
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.stand_ins import as_if_of
from test_layouts import build, fsdp1, loss_of, mesh_of, wrapped
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag, param_groups
from sharded_adadiag.options import OPTION_NAMES, PLANNED
from sharded_adadiag.plan.refresh import PLANS_KEPT, refresh_plans
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_threads

SHAPES = {"wide": (5, 8), "tall": (8, 5), "router": (4, 6), "bias": (7,)}


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (name, nn.Parameter(torch.randn(shape, generator=generator)))
        for name, shape in SHAPES.items()
    ]


def step(opt: torch.optim.Optimizer, named: list[tuple[str, Any]], number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for name, param in named:
        grad = torch.randn(SHAPES[name], generator=generator)
        if isinstance(param, DTensor):
            grad = placed(grad, param.device_mesh, param.placements)
        param.grad = grad
    opt.step()


def placed(value: Tensor, mesh: DeviceMesh, places: Any) -> Tensor:
    return distribute_tensor(value, mesh, places, src_data_rank=None)


def values(named: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in named
    }


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


# ------------------------------------------------------ parameters are replaced


def replace(opt: torch.optim.Optimizer, new: Callable[[Tensor], Tensor]) -> None:
    """As accelerate does it: first by placeholders, then by what was made of them."""
    places = [(g, i) for g in opt.param_groups for i in range(len(g["params"]))]
    made = {(id(g), i): new(g["params"][i]) for g, i in places}
    for group, i in places:
        group["params"][i] = torch.empty(1)
    for group in opt.param_groups:
        group["params"] = [made[id(group), i] for i in range(len(group["params"]))]


def twin(param: Tensor) -> nn.Parameter:
    return nn.Parameter(param.detach().clone(), param.requires_grad)


@pytest.mark.parametrize("imported", [True, False])
@pytest.mark.parametrize("names", [True, False])
def test_parameters_that_are_replaced_are_let_go(names, imported, monkeypatch):
    """Where DeepSpeed was imported we look for its engine among our callers. A look at
    a frame's locals keeps them for as long as the frame lives (Python 3.12 and older).
    """
    for name in [name for name in sys.modules if name == "deepspeed.utils.debug"]:
        monkeypatch.delitem(sys.modules, name)
    if imported:
        debug = types.SimpleNamespace(param_names={})
        monkeypatch.setitem(sys.modules, "deepspeed.utils.debug", debug)
    named = parameters()
    opt = AdaDiag(named if names else [p for _, p in named])
    replaced = [weakref.ref(p) for _, p in named]
    replace(opt, twin)
    del named
    gc.collect()
    assert [ref() for ref in replaced] == [None] * len(SHAPES)
    assert len(opt.describe().matrices) == 3


def test_parameters_that_are_replaced_after_a_step_go_with_their_state():
    named = parameters()
    opt = AdaDiag(named)
    step(opt, named, 0)
    replaced = [weakref.ref(p) for _, p in named]
    replace(opt, twin)
    new = list(zip(SHAPES, opt.param_groups[0]["params"]))
    step(opt, new, 1)
    assert all(ref() is not None for ref in replaced)  # as in torch: by their state
    for _, param in named:
        del opt.state[param], param
    step(opt, new, 2)
    del named
    gc.collect()
    assert [ref() for ref in replaced] == [None] * len(SHAPES)


@pytest.mark.parametrize("frozen", [[], ["tall"], ["wide", "bias"]])
@pytest.mark.parametrize("held", [True, False])
def test_names_and_exclude_survive_replacement_also_with_frozen_ones(frozen, held):
    named = parameters()
    for name, param in named:
        param.requires_grad_(name not in frozen)
    opt = AdaDiag(named, exclude="rout*")
    replace(opt, twin)
    if not held:
        del named, param
    sides = {m.name for m in opt.describe().matrices}
    assert sides == {"wide", "tall"} - set(frozen)


def replaced_by_fsdp2(rank: int) -> set[str]:
    model = build()
    opt = AdaDiag(model.named_parameters(), exclude=["shared_expert.*"])
    names = {id(p): name for name, p in model.named_parameters()}
    old = [weakref.ref(p) for p in model.parameters()]
    wrapped(model)
    sharded = dict(model.named_parameters())
    replace(opt, lambda p: sharded[names[id(p)]])
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
    loss_of(model, rank, 0).backward()
    opt.step()
    return {m.name for m in opt.describe().matrices}


def test_names_and_exclude_survive_fully_shard_after_the_optimizer():
    for names in run_threads(2, replaced_by_fsdp2):
        assert "blocks.0.up.weight" in names and "head.weight" in names
        assert not any(name.startswith("shared_expert") for name in names)


def moved_to_another_dtype(rank: int) -> None:
    model = wrapped(build())
    opt = AdaDiag(param_groups(model))
    model.to(torch.float64)  # torch refuses that of a DTensor that is weakly held
    loss_of(model, rank, 0).backward()
    opt.step()


def test_sharded_models_may_still_be_moved():
    run_threads(2, moved_to_another_dtype)


# --------------------------------------------------------------- groups are edited


def plain(rank: int, **options: Any) -> tuple[AdaDiag, list[tuple[str, Any]]]:
    named = parameters()
    return make_groups(named, **options), named


def sharded(rank: int, **options: Any) -> tuple[AdaDiag, list[tuple[str, Any]]]:
    mesh = mesh_of(dist.get_world_size())
    named: list[tuple[str, Any]] = [
        (name, nn.Parameter(placed(p.detach(), mesh, [Shard(0)])))
        for name, p in parameters()
    ]
    return make_groups(named, **options), named


def columns(rank: int, **options: Any) -> tuple[AdaDiag, list[tuple[str, Any]]]:
    """Replicas of shards, as HSDP has them, by columns, as tensor parallel has them."""
    mesh = mesh_of(2, 2)
    named: list[tuple[str, Any]] = []
    for name, p in parameters():
        places = [Replicate(), Shard(p.dim() - 1)]
        named.append((name, nn.Parameter(placed(p.detach(), mesh, places))))
    return make_groups(named, **options), named


def replicas(rank: int, **options: Any) -> tuple[AdaDiag, list[tuple[str, Any]]]:
    """As under DDP."""
    return plain(rank, process_group=dist.group.WORLD, **options)


def make_groups(
    named: list[tuple[str, Any]], cls: type = AdaDiag, **options: Any
) -> AdaDiag:
    groups = [{"params": named[:1]}, {"params": named[1:], "lr": 1e-2}]
    return cls(groups, **{"lr": 1e-2, "refresh_every": 2, **options})


Make = Callable[..., tuple[AdaDiag, list[tuple[str, Any]]]]
OWNER, BROADCAST = {"distribution": "owner"}, {"distribution": "broadcast"}
LAYOUTS: dict[str, tuple[int, Make, dict[str, Any]]] = {
    "one process": (1, plain, {}),
    "fsdp2, owner": (2, sharded, OWNER),
    "fsdp2, broadcast": (2, sharded, BROADCAST),
    "hsdp, tp": (4, columns, OWNER),
    "ddp": (2, replicas, OWNER),
}


def on_ranks(layout: str, body: Callable[..., Any], *args: Any) -> list[Any]:
    ranks, make, options = LAYOUTS[layout]
    if ranks == 1:
        return [body(0, make, options, *args)]
    return run_threads(ranks, body, make, options, *args)


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
    "maximize": True,
}
SAME_NUMBERS = {"nonfinite"}  # it changes no step with finite gradients


def live(rank: int, make: Make, options: dict[str, Any]) -> set[str]:
    """Which edits acted as a new optimizer does that has the option from its start."""
    effective = set()
    for name, value in LIVE.items():
        cls = HfacDiag if name == "clip_threshold" else AdaDiag
        opt, named = make(rank, cls=cls, **options)
        step(opt, named, 0)
        saved = copy.deepcopy(opt.state_dict())
        other, other_named = make(rank, cls=cls, **options, **{name: value})
        for group in other.param_groups:
            group[name] = value
        saved["param_groups"] = other.state_dict()["param_groups"]
        other.load_state_dict(saved)
        unedited, unedited_named = make(rank, cls=cls, **options)
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
}


def planned(rank: int, make: Make, options: dict[str, Any], editors: int) -> list[str]:
    """The errors of one edit after the other, by the first ``editors`` ranks."""
    opt, named = make(rank, cls=AdafacDiag, **options)
    step(opt, named, 0)
    messages = []
    for name, value in PLAN.items():
        before = values(named)
        group = opt.param_groups[0]
        old = group[name]
        if rank < editors:
            group[name] = value
        with pytest.raises(ValueError) as caught:
            step(opt, named, 1)
        assert not differing(before, values(named))
        messages.append(str(caught.value))
        group[name] = old
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
        old = {**was, "max_rotated_dim": 8192}.get(name)
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
    for step in range(300):
        for _, param in named:
            there = step == 0 or chance.random() < 0.5
            param.grad = torch.ones(3, 4) if there else None
        opt.step()
        sizes.add(reachable(opt._binding))
    assert len(sizes) == 1


def varying_refreshes(rank: int) -> tuple[int, int]:
    mesh = mesh_of(2)
    named: list[tuple[str, Any]] = [
        (f"p{i}", nn.Parameter(placed(torch.zeros(4, 6), mesh, [Shard(0)])))
        for i in range(6)
    ]
    opt = AdaDiag(named, refresh_every=2, **BROADCAST)
    chance = random.Random(0)
    for _ in range(60):
        for _, param in named:
            there = chance.random() < 0.5
            param.grad = torch.ones_like(param) if there else None
        opt.step()
    plans = refresh_plans.cache_info()
    return plans.misses, plans.currsize


def test_what_is_kept_of_varying_refreshes_is_bounded():
    for misses, kept in run_threads(2, varying_refreshes):
        assert misses > PLANS_KEPT and kept == PLANS_KEPT


# ------------------------------------------------------------- keys and numbers


def test_unknown_group_keys_are_kept_and_told_once(caplog):
    """torchtitan, timm and SAM put keys of their own, or of torch's, into groups."""
    extra = {"fused": True, "foreach": False, "capturable": False, "lr_scale": 0.5}
    named = parameters()
    with caplog.at_level(logging.WARNING, logger="sharded_adadiag"):
        opt = AdaDiag([{"params": named[:2], **extra, "adaptive": True}])
        opt.add_param_group({"params": named[2:], **extra, "rotated": True})
    first, second = (r.getMessage() for r in caplog.records)
    assert "AdaDiag keeps but does not use: adaptive, lr_scale;" in first
    assert "does not use: rotated;" in second and "rotate, " in second
    step(opt, named, 0)
    saved = opt.state_dict()["param_groups"]
    assert saved[0]["adaptive"] is True and saved[1]["lr_scale"] == 0.5


def test_torchs_own_keys_are_kept_without_a_word(caplog):
    keys = dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), False)
    with caplog.at_level(logging.WARNING, logger="sharded_adadiag"):
        AdaDiag([{"params": parameters(), **keys, "initial_lr": 1.0}])
    assert not caplog.records


NUMBERS: dict[str, Any] = {
    "lr": np.float32(1e-2),
    "betas": (np.float32(0.9), np.float64(0.99)),
    "eps": np.float16(1e-3),
    "weight_decay": np.float32(0.1),
    "refresh_every": np.int64(2),
    "max_rotated_dim": np.int32(100),
    "noise_floor": np.float32(0.01),
    "clip_threshold": np.float64(1.0),
    "maximize": np.bool_(True),
    "momentum": np.bool_(True),
}


@pytest.mark.parametrize("late", [False, True])
def test_scalars_of_numpy_are_numbers_in_every_option(late, tmp_path):
    named, other_named = parameters(), parameters()
    plain = {
        name: tuple(v.item() for v in value) if name == "betas" else value.item()
        for name, value in NUMBERS.items()
    }
    want = AdafacDiag(other_named, **plain)
    if late:  # as a scheduler of the user's sets them
        opt = AdafacDiag(named, momentum=True, max_rotated_dim=100)
        opt.param_groups[0].update(NUMBERS)
    else:
        opt = AdafacDiag([{"params": named, **NUMBERS}], **NUMBERS)
        torch.save(opt.state_dict(), tmp_path / "saved")
        torch.load(tmp_path / "saved", weights_only=True)
        assert type(opt.param_groups[0]["lr"]) is float
    for number in range(3):
        step(opt, named, number)
        step(want, other_named, number)
    assert not differing(values(named), values(other_named))


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_a_tensor_learning_rate_must_be_a_number_too(value):
    named = parameters()
    with pytest.raises(ValueError, match="invalid lr: got .*must be"):
        AdaDiag(named, lr=torch.tensor(value))
    rate = torch.tensor(0.1)
    opt = AdaDiag(named, lr=rate)
    with pytest.raises(ValueError, match="invalid lr"):
        opt.add_param_group({"params": [("x", twin(rate))], "lr": torch.tensor(value)})
    step(opt, named, 0)
    before = values(named)
    rate.fill_(value)
    with pytest.raises(ValueError, match="the param group of wide: invalid lr: got"):
        step(opt, named, 1)
    assert not differing(before, values(named))
    assert opt.param_groups[0]["lr"] is rate


# ------------------------------------------- lists without names, warned of once

UNSORTED = r"every matrix is rotated, embeddings and the output head too; pass param_g"


def test_a_list_without_names_or_rotate_is_warned_of_with_the_remedy():
    tensors = [p for _, p in parameters()]
    with pytest.warns(UserWarning, match=UNSORTED) as caught:
        opt = AdaDiag([{"params": tensors[:1]}, {"params": tensors[1:]}])
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "model_factory(...)" in str(caught[0].message)
    opt.step()


@pytest.mark.parametrize(
    "groups,options",
    [
        (lambda named: named, {}),
        (lambda named: [{"params": [p for _, p in named], "rotate": True}], {}),
        (lambda named: [named[-1][1]], {}),
        (lambda named: [p for _, p in named], {"sides": "none"}),
        (lambda named: [p for _, p in named], {"max_rotated_dim": 3}),
    ],
)
def test_no_warning_where_the_user_has_sorted_or_nothing_is_rotated(
    groups, options, recwarn
):
    AdaDiag(groups(parameters()), **options)
    assert not recwarn.list


@pytest.mark.parametrize("forgotten", [False, True])
def test_parameters_that_deepspeed_has_named_are_not_warned_of(
    forgotten, monkeypatch, recwarn
):
    """It forgets all names when any engine is deleted; the engine itself does not."""
    named = parameters()
    known = {p: name for name, p in named}
    debug = types.SimpleNamespace(param_names={} if forgotten else known)
    monkeypatch.setitem(sys.modules, "deepspeed.utils.debug", debug)

    def configure_optimizer(self):
        return AdaDiag([p for _, p in named], exclude="rout*")

    class Engine:
        __module__ = "deepspeed.runtime.engine"
        param_names = known
        configure = as_if_of("deepspeed.runtime.engine", configure_optimizer)

    opt = Engine().configure()
    assert not recwarn.list
    assert [m.name for m in opt.describe().matrices] == ["wide", "tall"]
