"""States of stacks and fused projections: saved in one layout, loaded in another."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.stacks import (
    LAYOUTS,
    SHAPES,
    STACKS,
    Stacked,
    advance,
    by_matrix,
    optimizer,
    placed,
    weights,
)
from support.training import local_gradient, plain_names
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sharded_adadiag import AdaDiag, AdafacDiag, named_state_dict, param_groups
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_processes, run_threads

FIRST, ALL = 5, 9


def on_ranks(layout, body, *args):
    ranks = LAYOUTS[layout][0]
    if ranks == 1:
        return [body(0, layout, *args)]
    run = run_processes if layout == "fsdp1" else run_threads
    return run(ranks, body, layout, *args)


def first_part(rank, layout, method):
    model, own = placed(layout)
    opt = optimizer(model, method, sides="two", distribution="owner", **own)
    advance(model, opt, 0, FIRST)
    return weights(model), named_state_dict(opt, full_state_dict=True)


def second_part(rank, layout, method, before, saved):
    model, own = placed(layout)
    opt = optimizer(model, method, sides="two", distribution="owner", **own)
    put(model, before)
    opt.load_state_dict(saved)
    again = named_state_dict(opt, full_state_dict=True)["state"]
    for name, state in saved["state"].items():
        for key, value in state.items():
            assert_equal(torch.as_tensor(again[name][key]), torch.as_tensor(value), key)
    advance(model, opt, FIRST, ALL)
    return weights(model)


def put(model, values):
    with torch.no_grad():
        for name, param in plain_names(model).items():
            param.copy_(local_gradient(param, values[name]))


@pytest.mark.parametrize("method", ["AdaDiag", "AdafacDiag", "HfacDiag"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("one process", "rows of 3"),
        ("rows of 3", "dimension 1"),
        ("dimension 1", "rows, then dimension 2"),
        ("rows, then dimension 2", "hsdp"),
        ("hsdp", "ddp"),
        ("ddp", "dimension 2"),
        ("dimension 2", "one process"),
        ("rows of 2", "fsdp1"),
        ("fsdp1", "rows of 2"),
    ],
)
def test_a_run_goes_on_in_any_other_layout(source, target, method):
    before, saved = on_ranks(source, first_part, method)[0]
    expected = by_matrix(method, ALL, sides="two")
    for found in on_ranks(target, second_part, method, before, saved):
        for name in SHAPES:
            assert_equal(found[name], expected[name], name)


def test_what_has_a_row_for_each_row_is_saved_with_the_shape_of_the_parameter():
    _, saved = first_part(0, "one process", "AdafacDiag")
    shapes = {
        name: {key: tuple(value.shape) for key, value in state.items()}
        for name, state in saved["state"].items()
    }
    assert shapes["experts"] == {
        "step": (),
        "exp_avg": (5, 6, 9),
        "exp_avg_sq_row": (5, 6),
        "exp_avg_sq_col": (5, 9),
        "rotation_left": (5, 6, 6),
        "rotation_right": (5, 9, 9),
    }
    blocks = {key: shapes["fused"][key] for key in ("exp_avg", "exp_avg_sq_row")}
    assert blocks == {"exp_avg": (13, 8), "exp_avg_sq_row": (13,)}
    for i, height in enumerate([6, 3, 4]):
        assert shapes["fused"][f"rotation_left.{i}"] == (height, height)
        assert shapes["fused"][f"exp_avg_sq_col.{i}"] == (8,)


@pytest.mark.parametrize("layout", ["one process", "rows of 2"])
def test_experts_saved_unrotated_are_rotated_from_the_next_basis_on(layout):
    """A state from before stacks had a group of their own, or options of it."""
    model = Stacked()
    named = dict(model.named_parameters())
    old = AdafacDiag([
        {"params": [("fused", named["fused"])], "rotate": True},
        {
            "params": [(n, named[n]) for n in ("experts", "down", "bias")],
            "rotate": False,
        },
    ])
    for name, param in named.items():
        param.grad = torch.ones(SHAPES[name])
    old.step()
    saved = named_state_dict(old)
    saved["state"] = {"experts": saved["state"]["experts"]}

    def body(rank, layout):
        model, own = placed(layout)
        opt = optimizer(model, "AdaDiag", **own)
        opt.load_state_dict(saved)
        advance(model, opt, 0, 2)
        rotated = [group["rotate"] for group in opt.param_groups]
        state = named_state_dict(opt, full_state_dict=True)["state"]["experts"]
        return rotated, state

    missing = "experts: the loaded state has no rotation_left"
    with pytest.warns(UserWarning) as told:
        rotated, state = on_ranks(layout, body)[0]
    assert any(str(warning.message).startswith(missing) for warning in told)
    assert rotated == [True, True, False]
    assert float(state["step"]) == 3.0 and state["exp_avg"].abs().min() > 0.0
    assert not torch.equal(state["rotation_left"][0], torch.eye(6))


def unrotated(model):
    return AdaDiag(param_groups(model, exclude=STACKS), refresh_every=2)


def read(model, opt, folder):
    """As of one process, which torch remarks upon."""
    state = {"optimizer": get_optimizer_state_dict(model, opt)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, opt, state["optimizer"])


def test_dcp_refuses_experts_saved_unrotated_unless_they_stay_so(tmp_path):
    model = Stacked()
    opt = unrotated(model)
    advance(model, opt, 0, 3)
    saved = named_state_dict(opt)["state"]
    state = {"optimizer": get_optimizer_state_dict(model, opt)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(state, checkpoint_id=tmp_path)

    model = Stacked()
    opt = optimizer(model, "AdaDiag")
    with pytest.raises(CheckpointException, match="experts.rotation_left"):
        read(model, opt, tmp_path)

    model = Stacked()
    opt = unrotated(model)
    read(model, opt, tmp_path)
    again = named_state_dict(opt)["state"]
    for name in SHAPES:
        assert saved[name].keys() == again[name].keys()
        for key, value in saved[name].items():
            assert_equal(torch.as_tensor(again[name][key]), torch.as_tensor(value), key)
