"""What a state dict says is what an optimizer has after loading it."""

import itertools
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from support.saving import (
    CASES,
    EVERYWHERE,
    F32,
    FSDP1_WARNINGS,
    PLACES,
    assert_same_states,
    build,
    ranked,
    said,
    states,
    trained,
)
from support.training import advance, groups, plain_names
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sharded_adadiag import AdaDiag, named_state_dict, param_groups
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_processes

pytestmark = FSDP1_WARNINGS

FULL = {"full_state_dict": True}

BROADCAST = {**FULL, "broadcast_from_rank0": True}

# How torch's helpers give a state dict, and how they take it.
WAYS = {
    "nested": ({}, {}),
    "flattened": ({"flatten_optimizer_state_dict": True},) * 2,
    "on the CPU": ({"cpu_offload": True}, {}),
    "flattened on the CPU": (
        {"flatten_optimizer_state_dict": True, "cpu_offload": True},
        {"flatten_optimizer_state_dict": True},
    ),
    "full": (FULL, FULL),
}

# Ranks that are threads cannot broadcast as torch does here.
BROADCASTS = {
    "full on rank 0": ({**FULL, "cpu_offload": True}, BROADCAST),
    "full on every rank, from rank 0": (FULL, BROADCAST),
}


# ------------------------------------------------------------------ names and orders


def pass_on(model, opt, other_model, other, get, put):
    """From one optimizer to another by torch's helpers."""
    saved = get_optimizer_state_dict(model, opt, options=StateDictOptions(**get))
    if "broadcast_from_rank0" in put and dist.get_rank():
        saved = {}
    options = StateDictOptions(**put)
    set_optimizer_state_dict(other_model, other, saved, options=options)


def into_another_order(rank, layout, ways):
    model, opt = trained(layout)
    want = states(opt)
    for get, put in ways:
        other_model, other = build(layout, backwards=True)
        pass_on(model, opt, other_model, other, get, put)
        assert_same_states(states(other), want)
        by_name = {n: g["rotate"] for g in other.param_groups for n in g["param_names"]}
        assert by_name == {case.name: case.rotate for case in CASES}
    for saved in (opt.state_dict(), named_state_dict(opt)):
        _, other = build(layout, backwards=True)
        other.load_state_dict(saved)
        assert_same_states(states(other), want)
        # A second save is as true as the first.
        _, third = build(layout)
        third.load_state_dict(other.state_dict())
        assert_same_states(states(third), want)


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_states_and_options_follow_the_names_into_another_order(layout):
    # torch's helpers take no states of FSDP1 but flat ones.
    ways = () if layout == "fsdp1" else tuple(WAYS.values())
    ranked(layout, into_another_order, ways)


def test_without_common_names_positions_decide_as_in_torch():
    _, opt = trained("plain")
    want = list(states(opt).values())
    for wrap in (lambda name: f"module.{name}", None):
        _, other = build("plain")
        for group in other.param_groups:
            if wrap is None:
                del group["param_names"]
            else:
                group["param_names"] = [wrap(n) for n in group["param_names"]]
        names = [group.get("param_names") for group in other.param_groups]
        # As torch's helpers leave it: keys in the live order, saved names in another.
        saved = named_state_dict(opt)
        for group in saved["param_groups"]:
            group["param_names"] = group["param_names"][::-1]
        other.load_state_dict(saved)
        for state, expected in zip(other.state_dict()["state"].values(), want):
            for key, value in expected.items():
                assert_equal(state[key], value, key)
        expected = names if wrap else [g["params"] for g in saved["param_groups"]]
        assert [g["param_names"] for g in other.param_groups] == expected


def test_two_optimizers_states_of_equal_names_are_told_apart_by_position():
    """Of two models, say, in one optimizer: a name must be one parameter's."""

    def build_two():
        pairs = [("weight", nn.Parameter(torch.ones(4, 3))) for _ in range(2)]
        return pairs, AdaDiag([{"params": [pair]} for pair in pairs], lr=0.1)

    pairs, opt = build_two()
    for i, (_, param) in enumerate(pairs):
        param.grad = torch.full((4, 3), 1.0 + i)
    opt.step()
    _, other = build_two()
    other.load_state_dict(opt.state_dict())
    for old, new in zip(opt.state.values(), other.state.values(), strict=True):
        assert_equal(new["exp_avg"], old["exp_avg"])


# ------------------------------------------------------------------------------ dtypes

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

CHOICES = [*itertools.product((None, *DTYPES), (None, *DTYPES))]


def carry_dtypes(rank, layout, choices, ways):
    for state_dtype, rotation_dtype in choices:
        chosen = {"state_dtype": state_dtype, "rotation_dtype": rotation_dtype}
        model, opt = trained(layout, steps=1, **chosen)
        want = states(opt)
        assert want["first"]["exp_avg"].dtype == (state_dtype or F32)
        kept = rotation_dtype or state_dtype or F32
        assert want["first"]["rotation_right"].dtype == kept
        for get, put in ways:
            other_model, other = build(layout, **chosen)
            pass_on(model, opt, other_model, other, get, put)
            assert_same_states(states(other), want)
            names = [d and str(d).removeprefix("torch.") for d in chosen.values()]
            for group in other.param_groups:
                assert [group[key] for key in chosen] == names


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_every_dtype_goes_through_torchs_helpers_in_every_way(layout):
    choices = CHOICES if layout == "plain" else CHOICES[1::6]
    ranked(layout, carry_dtypes, choices, tuple(WAYS.values()))


def from_rank_0(rank):
    ways = tuple(BROADCASTS.values())
    for layout in ("fsdp2", "ddp"):
        into_another_order(rank, layout, ways)
    carry_dtypes(rank, "fsdp2", CHOICES[1::6], ways)
    fsdp1_from_adamw(rank, "fsdp1")


@pytest.mark.multiprocess
def test_names_and_dtypes_hold_when_rank_0_alone_has_the_state_dict():
    """And AdamW's state under FSDP1; one start of processes for all."""
    run_processes(2, from_rank_0)


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_may_be_given_as_such_or_by_its_name(given):
    param = nn.Parameter(torch.ones(4, 3))
    by_option = AdaDiag([param], state_dtype=given)
    by_group = AdaDiag([{"params": [param], "state_dtype": given}])
    late = AdaDiag([param])
    late.param_groups[0]["state_dtype"] = given
    late.load_state_dict({  # as an older version saved it
        "state": {},
        "param_groups": [{"params": [0], "state_dtype": torch.bfloat16}],
    })
    param.grad = torch.ones(4, 3)
    for opt in (by_option, by_group, late):
        opt.step()
        assert opt.state[param]["exp_avg"].dtype == torch.bfloat16
        assert opt.param_groups[0]["state_dtype"] == "bfloat16"
        assert opt.state_dict()["param_groups"][0]["state_dtype"] == "bfloat16"


# -------------------------------------------------------- other optimizers, and groups


def adamw_of(model, *, named=False):
    """One group, in the model's order, as most are."""
    pairs = [*plain_names(model).items()]
    return torch.optim.AdamW(pairs if named else [p for _, p in pairs], lr=3e-3)


def ours(model, layout):
    made = groups(model, CASES)
    made[0] |= {"sides": "two", "refresh_every": 7}
    extra = {"process_group": dist.group.WORLD} if layout == "ddp" else {}
    return AdaDiag(made, weight_decay=0.3, basis="eigh", **extra)


def from_adamw(rank, layout):
    """By torch's helpers, whole and in parts, and by name; the recipe of the docs."""
    model, _ = build(layout)
    adamw = adamw_of(model)
    advance(model, adamw, CASES, F32, 0, 3)
    for helper in (False, True):
        opt = ours(model, layout)
        state = get_optimizer_state_dict(model, adamw)
        if helper:
            set_optimizer_state_dict(model, opt, state)
        else:
            opt.load_state_dict(state)
        for key, values in {
            "rotate": [True, False],
            "sides": ["two", "one"],
            "refresh_every": [7, 200],
            "basis": ["eigh"] * 2,
            "lr": [3e-3] * 2,
            "weight_decay": [0.01] * 2,
        }.items():
            assert [g[key] for g in opt.param_groups] == values, key
        saved = states(opt)
        reference = get_optimizer_state_dict(
            model, adamw, options=StateDictOptions(full_state_dict=True)
        )["state"]
        for name, values in reference.items():
            for key, value in values.items():
                assert_equal(saved[name][key], value, f"{name}: {key}")
        advance(model, opt, CASES, F32, 3, 4)
        assert states(opt)["first"]["step"] == 4


@pytest.mark.parametrize("layout", PLACES)
def test_adamws_one_group_goes_into_our_two_with_their_own_options(layout):
    messages = said(lambda: ranked(layout, from_adamw))
    # What is missing is said by name, and nothing else.
    names = [
        message.split(": the loaded state has no rotation_")[0] for message in messages
    ]
    assert set(names) == {"first", "second", "convolution"}


def fsdp1_from_adamw(rank, layout):
    model, _ = build(layout)
    adamw = adamw_of(model, named=True)
    advance(model, adamw, CASES, F32, 0, 3)
    opt = ours(model, layout)
    # torch gathers states of FSDP1 by code that threads cannot share.
    saved = get_optimizer_state_dict(model, adamw, options=StateDictOptions(**FULL))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no rotation_", UserWarning)
        opt.load_state_dict(saved)
    got = states(opt)
    assert [g["sides"] for g in opt.param_groups] == ["two", "one"]
    for name, values in saved["state"].items():
        assert_equal(got[name]["exp_avg"], values["exp_avg"], name)


def test_a_plain_adamw_file_goes_in_by_name_once_it_has_names():
    """As the docs have it, for a file of torch.save(adamw.state_dict(), ...)."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for param in model.parameters():
        param.grad = torch.randn(
            param.shape, generator=torch.manual_seed(param.numel())
        )
    adamw.step()
    state = pickle.loads(pickle.dumps(adamw.state_dict()))

    opt = AdaDiag(param_groups(model), refresh_every=7)
    state["param_groups"][0]["param_names"] = [n for n, _ in model.named_parameters()]
    said(lambda: opt.load_state_dict(state))

    for param in model.parameters():
        assert_equal(opt.state[param]["exp_avg"], adamw.state[param]["exp_avg"])
        assert float(opt.state[param]["step"]) == 1
    assert [g["rotate"] for g in opt.param_groups] == [True, False]
    assert [g["refresh_every"] for g in opt.param_groups] == [7, 7]
    assert [g["lr"] for g in opt.param_groups] == [3e-3, 3e-3]
    opt.step()


def test_options_stay_where_the_saved_groups_of_a_group_differ():
    model, _ = build("plain")
    pairs = [*plain_names(model).items()]
    halves = [{"params": pairs[::2]}, {"params": pairs[1::2], "weight_decay": 0.5}]
    adamw = torch.optim.AdamW(halves, lr=3e-3, betas=(0.8, 0.9))
    opt = ours(model, "plain")
    messages = said(lambda: opt.load_state_dict(adamw.state_dict()))
    assert [m.split(":")[0] for m in messages] == ["param group 0", "param group 1"]
    assert all("differ in weight_decay; of these its own" in m for m in messages)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.3, 0.3]
    assert [g["betas"] for g in opt.param_groups] == [(0.8, 0.9)] * 2


def test_an_option_that_no_optimizer_of_ours_takes_is_refused_before_a_change():
    model, opt = trained("plain")
    before, lr = states(opt), opt.param_groups[0]["lr"]
    saved = opt.state_dict()
    saved["param_groups"][1] |= {"eps": (None, 1e-3)}  # as torch's Adafactor has it
    saved["param_groups"][0] |= {"lr": 0.5}
    with pytest.raises(ValueError, match="invalid eps: got .*must be a number >= 0"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == lr
    assert_same_states(states(opt), before)


def test_groups_that_fit_neither_by_name_nor_by_number_are_refused_as_in_torch():
    _, opt = trained("plain")
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["param_names"]
    saved["param_groups"].append({"params": []})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(saved)


def into_two_sides(rank, layout):
    model, opt = trained(layout)
    for get, put in (WAYS["nested"], WAYS["flattened"]):
        other_model, other = build(layout)
        for group in other.param_groups:
            group["sides"] = "two"
        saved = get_optimizer_state_dict(model, opt, options=StateDictOptions(**get))
        for key in [key for key in saved if key.endswith(".sides")]:
            saved[key] = "two"
        for group in saved.get("param_groups", ()):
            group["sides"] = "two"
        options = StateDictOptions(**put)
        set_optimizer_state_dict(other_model, other, saved, options=options)
        got, want = states(other), states(opt)
        assert_equal(got["first"]["rotation_right"], want["first"]["rotation_right"])
        assert_equal(got["first"]["rotation_left"], torch.eye(6))


def test_a_rotation_that_a_flattened_state_dict_lacks_is_said_to_be_missing():
    """torch fills it in as an empty dict."""
    for layout in ("plain", "fsdp2"):
        messages = said(lambda: ranked(layout, into_two_sides))  # noqa: B023
        assert any(
            "first: the loaded state has no rotation_left" in m for m in messages
        )
