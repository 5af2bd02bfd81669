"""Keys of groups, numbers of other libraries, and lists without names."""

from __future__ import annotations

import logging
import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from support.edited_groups import differing, parameters, step, twin, values
from support.stand_ins import as_if_of

from sharded_adadiag import AdaDiag, AdafacDiag

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
