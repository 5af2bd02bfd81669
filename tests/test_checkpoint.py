"""A checkpoint written under any layout goes on under any other, bit for bit."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_parity import (
    Parameters,
    advance,
    groups,
    sharded_model,
    whole_weights,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from sharded_adadiag import AdaDiag
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import HARD_CASES
from sharded_adadiag.testing.ranks import run_processes

CASES = tuple(c for c in HARD_CASES if not (c.frozen or c.without_gradient))
F32 = torch.float32
BEFORE, AFTER = 6, 12  # bases at steps 1, 5 and 9: before and after the checkpoint
# Layout and ranks; the last letter tells the distribution of the work.
PLACES = {
    "plain 1": ("plain", 1, "auto"),
    "ddp 2": ("ddp", 2, "owner"),
    "fsdp2 2": ("fsdp2", 2, "owner"),
    "fsdp2 3": ("fsdp2", 3, "owner"),
    "hsdp 4": ("hsdp", 4, "owner"),
    "tp 2": ("tp", 2, "owner"),
}


def build(layout, distribution):
    if layout == "plain":
        model, extra = Parameters(CASES, F32), {}
    else:
        model, extra = sharded_model(layout, CASES, F32)
    opt = AdaDiag(
        groups(model, CASES),
        lr=1e-2,
        weight_decay=0.1,
        refresh_every=4,
        distribution=distribution,
        **extra,
    )
    return model, opt


def uninterrupted():
    model, opt = build("plain", "auto")
    advance(model, opt, CASES, F32, 0, AFTER)
    return whole_weights(model, CASES)


def states(model, opt, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model_state, optimizer_state = get_state_dict(model, opt, options=options)
    return {"model": model_state, "optimizer": optimizer_state}


def write(rank, layout, distribution, folder, flatten):
    model, opt = build(layout, distribution)
    advance(model, opt, CASES, F32, 0, BEFORE)
    dcp.save(states(model, opt, flatten), checkpoint_id=folder)


def read_all(rank, layout, distribution, folders, flatten):
    """The final weights after going on from each of the checkpoints."""
    finals = {}
    for name, folder in folders.items():
        model, opt = build(layout, distribution)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        state = states(model, opt, flatten)
        dcp.load(state, checkpoint_id=folder)
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        set_state_dict(
            model,
            opt,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        advance(model, opt, CASES, F32, BEFORE, AFTER)
        finals[name] = whole_weights(model, CASES)
    return finals


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One checkpoint per place, written by its own ranks."""
    folders = {}
    for name, (layout, world_size, distribution) in PLACES.items():
        folders[name] = str(tmp_path_factory.mktemp(name.replace(" ", "-")))
        run_processes(world_size, write, layout, distribution, folders[name], False)
    return folders


@pytest.mark.multiprocess
@pytest.mark.xdist_group("checkpoints")
@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_from_anywhere_goes_on_here(place, checkpoints):
    layout, world_size, distribution = PLACES[place]
    want = uninterrupted()
    for finals in run_processes(
        world_size, read_all, layout, distribution, checkpoints, False
    ):
        assert set(finals) == set(PLACES)
        for source, weights in finals.items():
            for case, a, b in zip(CASES, weights, want):
                assert_equal(a, b, f"{source} -> {place}: {case.name}")


@pytest.mark.multiprocess
def test_flattened_checkpoints_move_from_blocks_to_owners(tmp_path):
    """From the broadcast distribution, which rounds elsewhere, hence the tolerance."""
    folder = str(tmp_path / "flat")
    run_processes(2, write, "fsdp2", "broadcast", folder, True)
    want = uninterrupted()
    got = run_processes(3, read_all, "fsdp2", "owner", {"flat": folder}, True)
    # Matrices whose bases have no arbitrary null-space direction.
    for case, a, b in zip(CASES, got[0]["flat"], want):
        torch.testing.assert_close(
            a, b, atol=2e-3, rtol=2e-3, msg=lambda m, c=case: f"{c.name}: {m}"
        )


def full_state(rank, folder):
    """A full state dict on rank 0, saved with torch.save."""
    model, opt = build("fsdp2", "owner")
    advance(model, opt, CASES, F32, 0, BEFORE)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(model, opt, options=options)
    if rank == 0:
        torch.save({"model": model_state, "optimizer": optimizer_state}, folder)


def from_full_state(rank, path):
    """Rank 0 reads the file and the others get theirs from it."""
    model, opt = build("fsdp2", "owner")
    state = {"model": {}, "optimizer": {}}
    if rank == 0:
        state = torch.load(path, weights_only=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    # One by one: set_state_dict takes an empty model state to mean "optimizer only".
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, opt, state["optimizer"], options=options)
    advance(model, opt, CASES, F32, BEFORE, AFTER)
    return whole_weights(model, CASES)


@pytest.mark.multiprocess
def test_a_full_state_dict_survives_torch_save_and_goes_on_elsewhere(tmp_path):
    path = str(tmp_path / "full.pt")
    run_processes(2, full_state, path)
    want = uninterrupted()
    for weights in run_processes(3, from_full_state, path):
        for case, a, b in zip(CASES, weights, want):
            assert_equal(a, b, case.name)


def shards(rank):
    model, opt = build("fsdp2", "owner")
    advance(model, opt, CASES, F32, 0, 1)
    held = whole = 0
    for state in opt.state_dict()["state"].values():
        for key, value in state.items():
            if key != "step":
                assert isinstance(value, DTensor), key
                held += value.to_local().numel()
                whole += value.numel()
    return held, whole


@pytest.mark.multiprocess
def test_no_rank_holds_all_of_the_saved_form():
    results = run_processes(3, shards)
    assert sum(held for held, _ in results) == results[0][1]
    assert all(held < 0.6 * whole for held, whole in results)


def fsdp1_write(rank, folder):
    model, opt = build("fsdp1", "owner")
    advance(model, opt, CASES, F32, 0, BEFORE)
    dcp.save({"optimizer": opt.state_dict()}, checkpoint_id=folder)
    return whole_weights(model, CASES)


def fsdp1_read(rank, folder, weights):
    model, opt = build("fsdp1", "owner")
    advance(model, opt, CASES, F32, 0, 1)  # creates the states
    state = {"optimizer": opt.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    opt.load_state_dict(state["optimizer"])
    from test_parity import plain_names

    from sharded_adadiag.integrations.fsdp1 import remembered

    named = plain_names(model)
    with torch.no_grad():
        for case, weight in zip(CASES, weights):
            _, flat = remembered(named[case.name], case.name)
            named[case.name].copy_(weight.reshape(-1)[flat.start : flat.stop])
    advance(model, opt, CASES, F32, BEFORE, AFTER)
    return whole_weights(model, CASES)


@pytest.mark.multiprocess
def test_fsdp1_states_move_to_another_number_of_ranks(tmp_path):
    folder = str(tmp_path / "fsdp1")
    weights = run_processes(2, fsdp1_write, folder)[0]
    want = uninterrupted()
    for got in run_processes(3, fsdp1_read, folder, weights):
        for case, a, b in zip(CASES, got, want):
            assert_equal(a, b, case.name)
