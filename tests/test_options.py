"""Bad options and parameters are refused by name."""

import pytest
import torch
from support.plain_run import parameters
from torch import nn

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag

BAD_OPTIONS = {
    "lr": -1.0,
    "betas": (0.9, 1.0),
    "eps": -1e-8,
    "weight_decay": float("nan"),
    "sides": "three",
    "side": "up",
    "refresh_every": 0,
    "refresh_slots": "many",
    "refresh_lag": -1,
    "on_refresh": "drop",
    "basis": "qr",
    "basis_from": "weights",
    "gram_beta": 1.0,
    "first_moment": "twisted",
    "max_rotated_dim": 0,
    "noise_floor": -1.0,
    "nonfinite": "hide",
    "state_dtype": torch.int32,
    "rotation_dtype": "float12",
    "distribution": "everyone",
    "maximize": "yes",
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_invalid_option_is_refused_with_its_name_value_and_rule(name):
    value = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=f"invalid {name}: got .*must be") as caught:
        AdaDiag(parameters(), **{name: value})
    assert repr(value) in str(caught.value)


def test_there_are_no_more_slots_than_steps_of_a_period():
    AdaDiag(parameters(), refresh_every=4, refresh_slots=4)
    AdaDiag(parameters(), refresh_every=None, refresh_slots=5)
    with pytest.raises(ValueError, match="invalid refresh_slots: got 5, .* is 4"):
        AdaDiag(parameters(), refresh_every=4, refresh_slots=5)


def test_a_group_holds_a_younger_option_only_where_it_is_set():
    """So a checkpoint from before it has all the keys that a group asks for."""
    first, second = parameters()[:1], parameters()[1:]
    opt = AdaDiag([{"params": first}, {"params": second, "refresh_slots": 2}])
    assert ["refresh_slots" in group for group in opt.param_groups] == [False, True]
    opt = AdaDiag(parameters(), refresh_slots=3)
    assert opt.param_groups[0]["refresh_slots"] == 3


def test_a_basis_is_not_later_than_the_next_one():
    AdaDiag(parameters(), refresh_every=4, refresh_lag=3)
    AdaDiag(parameters(), refresh_every=None, refresh_lag=3)
    with pytest.raises(ValueError, match="invalid refresh_lag: got 4, .* is 4"):
        AdaDiag(parameters(), refresh_every=4, refresh_lag=4)


@pytest.mark.parametrize("name", ["lr", "sides", "nonfinite"])
def test_an_invalid_option_of_a_group_is_refused_and_the_group_is_not_added(name):
    opt = AdaDiag(parameters()[:1])
    with pytest.raises(ValueError, match=f"invalid {name}"):
        opt.add_param_group({"params": parameters()[1:], name: BAD_OPTIONS[name]})
    assert len(opt.param_groups) == 1


def test_clip_threshold_and_momentum_belong_to_the_methods_that_have_them():
    with pytest.raises(TypeError, match="AdaDiag has no option 'clip_threshold'"):
        AdaDiag(parameters(), clip_threshold=1.0)
    with pytest.raises(TypeError, match="HfacDiag has no option 'momentum'"):
        HfacDiag(parameters(), momentum=False)
    with pytest.raises(ValueError, match="invalid clip_threshold: got 0"):
        AdafacDiag(parameters(), clip_threshold=0)


@pytest.mark.parametrize(
    "tensor,error",
    [
        (torch.ones(3, 3, dtype=torch.int64), "integer dtype torch.int64"),
        (torch.ones(3, 3, dtype=torch.complex64), "complex dtype torch.complex64"),
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    ],
)
def test_parameters_of_another_kind_are_refused_by_name(tensor, error):
    with pytest.raises(TypeError, match=f"strange: .*{error}"):
        AdaDiag([("strange", tensor)])


def test_sparse_gradients_are_refused_by_name():
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = AdaDiag(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="weight: .*sparse gradients"):
        opt.step()


def test_a_process_group_must_be_one():
    with pytest.raises(TypeError, match="process_group must be"):
        AdaDiag(parameters(), process_group="world")
