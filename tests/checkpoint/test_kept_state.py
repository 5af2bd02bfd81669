"""What a state dict has is kept: through hooks, frozen layers and skipped steps."""

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.saving import (
    CASES,
    EVERYWHERE,
    F32,
    FSDP1_WARNINGS,
    assert_same_states,
    build,
    ranked,
    said,
    states,
    trained,
)
from support.training import advance, plain_names
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sharded_adadiag import AdafacDiag, named_state_dict

pytestmark = FSDP1_WARNINGS

# ------------------------------------------------------------------------------- hooks


def test_the_hooks_of_saving_see_the_live_state_and_the_saved_form():
    model, opt = trained("plain")
    convolution = plain_names(model)["convolution"]
    seen = []

    def before(optimizer):
        seen.append(optimizer.state[convolution]["exp_avg"])
        optimizer.state[convolution]["exp_avg"].fill_(2.0)
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.state["note"] = 1

    def after(optimizer, state_dict):
        assert state_dict["state"].pop("note") == 1
        seen.append(state_dict["state"][2]["exp_avg"])
        return {**state_dict, "after": True}

    opt.register_state_dict_pre_hook(before)
    opt.register_state_dict_post_hook(after, prepend=True)
    saved = opt.state_dict()
    assert saved["after"] and saved["param_groups"][0]["lr"] == 0.5
    assert seen[0] is opt.state[convolution]["exp_avg"]
    assert seen[1].shape == (4, 2, 3, 3) and bool((seen[1] == 2.0).all())
    assert bool((opt.state[convolution]["exp_avg"] == 2.0).all())
    assert opt.state_bytes() > 0


def hooks_of_loading(rank, layout):
    model, opt = trained(layout)
    saved, want = opt.state_dict(), states(opt)
    other_model, other = build(layout)
    seen = []

    def change(optimizer, state_dict):
        assert state_dict["state"].keys() == saved["state"].keys()
        first = dict(state_dict["state"][0])
        seen.append(first.pop("step"))
        first["step"] = torch.tensor(40.0)
        state_dict["state"] = {**state_dict["state"], 0: first}

    def replace(optimizer, state_dict):
        assert float(state_dict["state"][0]["step"]) == 40
        groups = [{**g, "lr": 0.003} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def look(optimizer):
        name = plain_names(other_model)
        seen.append(float(optimizer.state[name["first"]]["step"]))
        seen.append(float(optimizer.state[name["second"]]["step"]))
        seen.append(optimizer.param_groups[1]["lr"])

    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_pre_hook(change, prepend=True)
    other.register_load_state_dict_post_hook(look, prepend=True)
    other.load_state_dict(saved)
    assert [float(s) for s in seen] == [3, 40, 3, 0.003]
    assert float(saved["state"][0]["step"]) == 3
    got = states(other)
    want["first"]["step"] = torch.tensor(40.0)
    assert_same_states(got, want)


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_the_hooks_of_loading_see_and_change_the_states(layout):
    ranked(layout, hooks_of_loading)


def renamed(rank, layout):
    """torch's recipe: the hook looks up the old name of every parameter."""
    _, old = trained(layout)
    for group in old.param_groups:
        group["param_names"] = [f"old.{name}" for name in group["param_names"]]
    _, opt = build(layout, backwards=True)

    def adapt(optimizer, state_dict):
        own = optimizer.state_dict()
        adapted = copy.deepcopy(own)
        ids = {
            name: key
            for group in state_dict["param_groups"]
            for name, key in zip(group["param_names"], group["params"], strict=True)
        }
        for group in own["param_groups"]:
            for key, name in zip(group["params"], group["param_names"], strict=True):
                state = state_dict["state"][ids[f"old.{name}"]]
                adapted["state"][key] = copy.deepcopy(state)
        return adapted

    opt.register_load_state_dict_pre_hook(adapt)
    opt.load_state_dict(old.state_dict())
    want = {n.removeprefix("old."): state for n, state in states(old).items()}
    assert_same_states(states(opt), want)


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_torchs_recipe_for_renamed_parameters_works(layout):
    ranked(layout, renamed)


# ---------------------------------------------------------------------- frozen layers

FROZEN = ("second", "vector", "convolution")


def thaw(rank, layout, whole):
    """Frozen at a load, saved and loaded again, thawed; and the run that was not."""
    model, opt = trained(layout)
    saved = copy.deepcopy(named_state_dict(opt, full_state_dict=whole))
    want = states(opt)
    frozen_model, frozen = build(layout, frozen=FROZEN)
    with torch.no_grad():
        for a, b in zip(frozen_model.parameters(), model.parameters(), strict=True):
            a.copy_(b)
    frozen.load_state_dict(saved)
    for state in saved["state"].values():  # the caller's tensors are the caller's
        for value in state.values():
            value.zero_()
    assert_same_states(states(frozen), want)
    if layout != "fsdp1":
        again = get_optimizer_state_dict(frozen_model, frozen)
        assert again["state"].keys() == want.keys()
    frozen.load_state_dict(copy.deepcopy(frozen.state_dict()))
    assert_same_states(states(frozen), want)
    bytes_kept = frozen.state_bytes()
    if layout == "plain":
        frozen = pickle.loads(pickle.dumps((frozen_model, frozen)))
        frozen_model, frozen = frozen
    for param in frozen_model.parameters():
        param.requires_grad_(True)
    advance(model, opt, CASES, F32, 3, 6)
    advance(frozen_model, frozen, CASES, F32, 3, 6)
    assert_same_states(states(frozen), states(opt))
    for a, b in zip(frozen_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    return bytes_kept, frozen.state_bytes()


@pytest.mark.parametrize("whole", [False, True], ids=["DTensors", "full tensors"])
@pytest.mark.parametrize("layout", EVERYWHERE)
def test_the_state_of_a_layer_frozen_at_a_load_is_kept_saved_and_used(layout, whole):
    results = ranked(layout, thaw, whole)
    kept, used = (sum(each) for each in zip(*results, strict=True))
    # No rank holds what it need not: between them they have each state once.
    assert kept <= used * 1.2


def drop(rank, layout):
    model, opt = trained(layout)
    saved = get_optimizer_state_dict(model, opt)
    plain_names(model)["second"].requires_grad_(False)
    opt.zero_grad()  # what still has a gradient is trained
    set_optimizer_state_dict(model, opt, saved)
    return sorted(states(opt))


def test_a_state_that_torchs_helper_leaves_out_of_a_frozen_layer_is_named():
    for layout in ("plain", "fsdp2"):
        kept = []
        messages = said(lambda: kept.extend(ranked(layout, drop)))  # noqa: B023
        assert all("second" not in names for names in kept)
        assert set(messages) == {
            "second: it is frozen and the loaded state has nothing of it (torch's "
            "set_optimizer_state_dict leaves frozen parameters out); its state was "
            "dropped"
        }


# ---------------------------------------------------------------------- skipped steps


def skip(rank, layout, folder):
    model, opt = build(layout, nonfinite="skip")
    advance(model, opt, CASES, F32, 0, 2)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.full_like(param, float("nan"))
        opt.step()
    assert opt.skipped_steps == 3
    counts = []
    for flat in (False,) if layout == "fsdp1" else (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)

        def saved_of(model, opt, options=options):
            if layout == "fsdp1":
                return named_state_dict(opt)
            return get_optimizer_state_dict(model, opt, options=options)

        place = f"{folder}/{flat}"
        dcp.save({"optimizer": saved_of(model, opt)}, checkpoint_id=place)
        other_model, other = build(layout)
        state = {"optimizer": saved_of(other_model, other)}
        dcp.load(state, checkpoint_id=place)
        if layout == "fsdp1":
            other.load_state_dict(state["optimizer"])
        else:
            set_optimizer_state_dict(
                other_model, other, state["optimizer"], options=options
            )
        assert [g["format_version"] for g in other.param_groups] == [1, 1]
        counts.append(other.skipped_steps)
    _, third = build(layout)
    third.load_state_dict(other.state_dict())
    counts.append(third.skipped_steps)
    advance(other_model, other, CASES, F32, 2, 3)
    counts.append(other.skipped_steps)
    return counts


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")
@pytest.mark.parametrize("layout", EVERYWHERE)
def test_the_number_of_skipped_steps_is_part_of_a_checkpoint(layout, tmp_path):
    for counts in ranked(layout, skip, str(tmp_path)):
        assert set(counts) == {3} and len(counts) >= 3


def test_a_copied_and_an_unpickled_optimizer_have_skipped_the_same_steps():
    param = nn.Parameter(torch.ones(4, 3))
    opt = AdafacDiag([param], nonfinite="skip")
    param.grad = torch.full((4, 3), float("inf"))
    opt.step()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert other.skipped_steps == 1
    opt.load_state_dict(AdafacDiag([nn.Parameter(torch.ones(4, 3))]).state_dict())
    assert opt.skipped_steps == 0
