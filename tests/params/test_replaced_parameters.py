"""Others replace the parameters that are in the groups."""

from __future__ import annotations

import gc
import sys
import types
import weakref

import pytest
import torch
from support.block_model import build, loss_of, wrapped
from support.edited_groups import SHAPES, parameters, replace, step, twin

from sharded_adadiag import AdaDiag, param_groups
from sharded_adadiag.testing.ranks import run_threads


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
