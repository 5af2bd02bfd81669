"""The classes are good ``torch.optim`` citizens, and say what is wrong by name."""

import copy
import io
import pickle

import pytest
import torch
from support.plain_run import (
    CLASSES,
    give_gradients,
    parameters,
    run,
    warnings_of,
    weights,
)
from torch import nn

from sharded_adadiag import AdaDiag, AdafacDiag
from sharded_adadiag.algorithm.update import lacks_basis
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.reference import ReferenceOptimizer


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("named_groups", [False, True])
def test_a_reloaded_optimizer_continues_bit_for_bit(cls, named_groups):
    def build():
        named = parameters()
        given = named if named_groups else [p for _, p in named]
        return named, cls(given, lr=1e-2, refresh_every=4, weight_decay=0.1)

    named, opt = build()
    run(opt, named, 0, 10)
    other_named, other = build()
    run(other, other_named, 0, 6)
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    third_named, third = build()
    for (_, a), (_, b) in zip(third_named, other_named):
        a.data.copy_(b.data)
    third.load_state_dict(torch.load(buffer, weights_only=True))
    run(third, third_named, 6, 10)
    for a, b in zip(weights(third_named), weights(named)):
        assert_equal(a, b)


def test_loading_into_an_optimizer_that_has_run_replaces_its_state():
    named, opt = parameters(), None
    opt = AdaDiag(named, lr=1e-2, refresh_every=4)
    run(opt, named, 0, 3)
    saved, then = copy.deepcopy(opt.state_dict()), weights(named)
    run(opt, named, 3, 9)
    want = weights(named)
    for (_, param), weight in zip(named, then):
        param.data.copy_(weight)
    opt.load_state_dict(saved)
    run(opt, named, 3, 9)
    for a, b in zip(weights(named), want):
        assert_equal(a, b)


def test_states_keep_their_dtype_and_their_memory_when_loaded():
    named = parameters(dtype=torch.bfloat16)
    options = {"state_dtype": torch.float32, "rotation_dtype": torch.float64}
    opt = AdaDiag(named, **options)
    run(opt, named, 0, 2)
    saved = opt.state_dict()
    other = AdaDiag(parameters(dtype=torch.bfloat16), **options)
    other.load_state_dict(saved)
    for i, state in enumerate(other.state.values()):
        for key, value in state.items():
            want = saved["state"][i][key]
            assert value.dtype == want.dtype
            assert torch.equal(value, want.reshape(value.shape))
            assert value.data_ptr() != want.data_ptr()
    first = next(iter(opt.state.values()))
    assert first["exp_avg"].dtype == torch.float32
    assert first["rotation_left"].dtype == torch.float64


def test_states_take_the_parameters_dtype_by_default():
    named = parameters(dtype=torch.bfloat16)
    opt = AdaDiag(named)
    run(opt, named, 0, 1)
    for state in opt.state.values():
        kinds = {value.dtype for key, value in state.items() if key != "step"}
        assert kinds == {torch.bfloat16}


def test_a_loaded_state_of_the_wrong_shape_names_the_parameter_and_both_shapes():
    named = parameters()
    opt = AdaDiag(named)
    run(opt, named, 0, 1)
    saved = opt.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(5, 9)
    with pytest.raises(ValueError, match=r"wide: .*exp_avg.*\(5, 9\).*\(5, 8\)"):
        AdaDiag(parameters()).load_state_dict(saved)


def test_saved_moments_have_their_parameters_shape():
    named = parameters()
    opt = AdafacDiag(named)
    run(opt, named, 0, 1)
    state = dict(zip((name for name, _ in named), opt.state_dict()["state"].values()))
    assert state["conv"]["exp_avg"].shape == (4, 2, 3, 3)
    assert state["conv"]["exp_avg_sq_col"].shape == (18,)
    assert state["conv"]["rotation_left"].shape == (4, 4)


@pytest.mark.parametrize("on_refresh", ["carry", "reproject"])
def test_adamws_checkpoint_goes_into_adadiag_and_says_what_it_lacks(on_refresh):
    """Its moments are carried into the bases of the next gradient, or re-expressed."""
    named, twin = parameters(), parameters()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    adamw = torch.optim.AdamW([p for _, p in named], **options)
    run(adamw, named, 0, 3)
    options |= {"refresh_every": 100, "on_refresh": on_refresh}
    opt = AdaDiag([p for _, p in twin], **options)
    reference = ReferenceOptimizer("adadiag", [p for _, p in named], **options)
    for (_, a), (_, b) in zip(twin, named):
        a.data.copy_(b.data)
        moments = {k: v.clone() for k, v in adamw.state[b].items() if k != "step"}
        if b.dim() > 2:
            moments = {key: moment.flatten(1) for key, moment in moments.items()}
        reference.state[b] = {"step": 3, **moments}
    saved = adamw.state_dict()
    saved["param_groups"] = opt.state_dict()["param_groups"]
    messages = warnings_of(lambda: opt.load_state_dict(saved))
    assert sum("rotation" in m and "unrotated" in m for m in messages) == 3
    run(reference, named, 3, 8)
    run(opt, twin, 3, 8)
    for a, b in zip(weights(twin), weights(named)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not lacks_basis(opt.state[twin[0][1]])


def test_another_method_on_load_keeps_what_it_can_and_warns():
    named, twin = parameters(), parameters()
    opt = AdaDiag(named)
    run(opt, named, 0, 3)
    two = AdaDiag(twin, sides="two")
    messages = warnings_of(lambda: two.load_state_dict(with_groups(opt, two)))
    assert any("wide: " in m and "no rotation_right" in m for m in messages)
    kept = two.state[twin[0][1]]
    assert_equal(kept["rotation_left"], opt.state[named[0][1]]["rotation_left"])
    assert_equal(kept["rotation_right"], torch.eye(8))
    factored = AdafacDiag(twin)
    messages = warnings_of(lambda: factored.load_state_dict(with_groups(opt, factored)))
    assert any("exp_avg_sq_row" in m and "starts anew" in m for m in messages)
    assert any("exp_avg_sq of the loaded state was dropped" in m for m in messages)
    assert float(factored.state[twin[0][1]]["step"]) == 0.0


def with_groups(opt, other):
    return {**opt.state_dict(), "param_groups": other.state_dict()["param_groups"]}


@pytest.mark.parametrize("cls", CLASSES)
def test_schedulers_closures_hooks_and_zero_grad_work(cls):
    named = parameters()
    opt = cls(named, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        opt.zero_grad()
        loss = sum((param**2).sum() for _, param in named)
        loss.backward()
        return loss

    first = opt.step(closure)
    scheduler.step()
    assert opt.step(closure) < first
    assert calls == ["pre", "post"] * 2
    assert opt.param_groups[0]["lr"] == 0.05
    opt.zero_grad()
    assert all(param.grad is None for _, param in named)


def test_one_cycle_may_change_the_betas():
    named = parameters()
    opt = AdaDiag(named, lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=5)
    run(opt, named, 0, 1)
    scheduler.step()
    assert opt.param_groups[0]["betas"][0] != 0.9
    run(opt, named, 1, 2)


def test_a_tensor_learning_rate_gives_the_same_steps():
    one, two = parameters(), parameters()
    run(AdaDiag(one, lr=0.25), one, 0, 3)
    run(AdaDiag(two, lr=torch.tensor(0.25)), two, 0, 3)
    for a, b in zip(weights(one), weights(two)):
        assert_equal(a, b)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_continue_as_the_original_does(how):
    named = parameters()
    params = [p for _, p in named]
    opt = AdaDiag(params, lr=1e-2, refresh_every=3)
    run(opt, named, 0, 2)
    if how == "pickle":
        twin, twins = pickle.loads(pickle.dumps((opt, params)))
    else:
        twin, twins = copy.deepcopy((opt, params))
    twin_named = [(name, p) for (name, _), p in zip(named, twins)]
    run(opt, named, 2, 6)
    run(twin, twin_named, 2, 6)
    for a, b in zip(weights(named), weights(twin_named)):
        assert_equal(a, b)


def test_groups_have_options_of_their_own_and_later_groups_join():
    named = parameters()
    opt = AdaDiag([{"params": named[:2], "lr": 0.0, "sides": "two"}], lr=1e-2)
    before = weights(named)
    run(opt, named, 0, 2)
    assert_equal(weights(named)[0], before[0])
    opt.add_param_group({"params": named[2:], "rotate": False})
    run(opt, named, 2, 4)
    assert not torch.equal(weights(named)[2], before[2])
    assert "rotation_right" in opt.state[named[0][1]]
    assert sorted(opt.state[named[2][1]]) == ["exp_avg", "exp_avg_sq", "step"]
    assert float(opt.state[named[0][1]]["step"]) == 4.0
    assert float(opt.state[named[2][1]]["step"]) == 2.0


def test_a_parameter_without_gradient_is_left_alone():
    named = parameters()
    opt = AdaDiag(named, lr=1e-2, weight_decay=0.1)
    give_gradients(named, 0)
    named[0][1].grad = None
    before = weights(named)
    opt.step()
    assert_equal(weights(named)[0], before[0])
    assert float(opt.state[named[0][1]]["step"]) == 0.0
    assert not torch.equal(weights(named)[1], before[1])


def test_maximize_climbs():
    param = nn.Parameter(torch.ones(3, 4))
    opt = AdaDiag([param], lr=0.1, maximize=True)
    param.grad = torch.ones(3, 4)
    opt.step()
    assert bool((param.sum() > 12.0).item())


def test_a_first_step_of_zero_gradients_only_creates_the_states():
    named = parameters()
    opt = AdaDiag(named, lr=1e-2, weight_decay=0.1)
    before = weights(named)
    for _, param in named:
        param.grad = torch.zeros_like(param)
    opt.step()
    for a, b in zip(weights(named), before):
        assert_equal(a, b)
    assert sorted(opt.state[named[0][1]]) == [
        "exp_avg",
        "exp_avg_sq",
        "rotation_left",
        "step",
    ]
    run(opt, named, 0, 1)
    assert float(opt.state[named[0][1]]["step"]) == 1.0


def test_state_bytes_are_known_before_the_first_step_and_on_meta():
    named = parameters()
    opt = AdaDiag(named, sides="two")
    early = opt.state_bytes()
    run(opt, named, 0, 1)
    held = [v for s in opt.state.values() for v in s.values()]
    assert early == opt.state_bytes() == sum(v.nbytes for v in held)
    meta = [(name, nn.Parameter(p.detach().to("meta"))) for name, p in named]
    assert AdaDiag(meta, sides="two").state_bytes() == early


def test_describe_prints_owners_and_loads():
    report = AdaDiag(parameters(), max_rotated_dim=5).describe()
    assert [m.name for m in report.matrices] == ["wide", "tall", "conv"]
    text = str(report)
    assert "wide" in text
    assert "0 collectives per step" in text
    assert "rank" in text
