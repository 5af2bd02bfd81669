"""A checkpoint written under any layout goes on under any other, bit for bit."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.pairs import FULL_PRODUCTS
from support.saving import FSDP1_WARNINGS
from support.training import (
    Parameters,
    advance,
    groups,
    plain_names,
    sharded_model,
    whole_weights,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from sharded_adadiag import AdaDiag, named_state_dict
from sharded_adadiag.params.fsdp1 import remembered
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import HARD_CASES
from sharded_adadiag.testing.ranks import run_processes, run_threads

pytestmark = FSDP1_WARNINGS
CASES = tuple(c for c in HARD_CASES if not (c.frozen or c.without_gradient))
F32 = torch.float32
BEFORE, AFTER = 6, 10  # bases at steps 1, 5 and 9: before and after the checkpoint
# Layout and ranks. "replicas" is DDP in which every rank keeps everything.
PLACES = {
    f"{layout} {ranks}": (layout, ranks, "owner")
    for layout, counts in {
        "plain": (1,),
        "replicas": (2,),
        "ddp": (2, 3, 4),
        "fsdp1": (1, 2, 3, 4),
        "fsdp2": (1, 2, 3, 4),
        "hsdp": (2, 4),
        "tp": (2, 3, 4),
    }.items()
    for ranks in counts
}


def build(layout, distribution):
    if layout in ("plain", "replicas"):
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


@functools.cache
def uninterrupted():
    model, opt = build("plain", "auto")
    advance(model, opt, CASES, F32, 0, AFTER)
    return whole_weights(model, CASES)


def states(model, opt, flatten=False):
    """As users write it; only FSDP1 needs our helper."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    if isinstance(model, FullyShardedDataParallel):
        optimizer_state = named_state_dict(opt)
        # torch gathers weights of FSDP1 by code that threads cannot share.
        names = [case.name for case in CASES]
        weights = dict(zip(names, whole_weights(model, CASES), strict=True))
        return {"model": weights, "optimizer": optimizer_state}
    model_state, optimizer_state = get_state_dict(model, opt, options=options)
    return {"model": model_state, "optimizer": optimizer_state}


@torch.no_grad()
def take_over(model, opt, state, flatten=False):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    if isinstance(model, FullyShardedDataParallel):
        for name, param in plain_names(model).items():
            flat, weight = remembered(param, name), state["model"][name]
            if flat is not None:
                weight = weight.reshape(-1)[flat[1].start : flat[1].stop]
            param.copy_(weight)
        opt.load_state_dict(state["optimizer"])
        return
    set_state_dict(
        model,
        opt,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


def write(rank, layout, distribution, folder, flatten=False):
    model, opt = build(layout, distribution)
    advance(model, opt, CASES, F32, 0, BEFORE)
    dcp.save(states(model, opt, flatten), checkpoint_id=folder)


def read_all(rank, layout, distribution, folders, flatten=False):
    """The final weights after going on from each of the checkpoints."""
    finals = {}
    for name, folder in folders.items():
        model, opt = build(layout, distribution)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        state = states(model, opt, flatten)
        dcp.load(state, checkpoint_id=folder)
        take_over(model, opt, state, flatten)
        advance(model, opt, CASES, F32, BEFORE, AFTER)
        finals[name] = whole_weights(model, CASES)
    return finals


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One checkpoint per place, written by its own ranks."""
    folders = {}
    for name, (layout, world_size, distribution) in PLACES.items():
        folders[name] = str(tmp_path_factory.mktemp(name.replace(" ", "-")))
        run_threads(world_size, write, layout, distribution, folders[name])
    return folders


def sources(place):
    """The place itself and one of each layout, in turn on each number of its ranks."""
    if FULL_PRODUCTS:
        return set(PLACES)
    by_layout = {}
    for name, (layout, _, _) in PLACES.items():
        by_layout.setdefault(layout, []).append(name)
    turn = list(PLACES).index(place)
    return {place, *(names[turn % len(names)] for names in by_layout.values())}


def test_every_layout_is_read_everywhere_and_every_place_elsewhere():
    layouts = {layout for layout, _, _ in PLACES.values()}
    for place in PLACES:
        assert {PLACES[source][0] for source in sources(place)} == layouts
    for source in PLACES:
        assert any(source in sources(place) for place in PLACES if place != source)


@pytest.mark.xdist_group("checkpoints")
@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_from_anywhere_goes_on_here(place, checkpoints):
    layout, world_size, distribution = PLACES[place]
    folders = {name: checkpoints[name] for name in sorted(sources(place))}
    want = uninterrupted()
    for finals in run_threads(world_size, read_all, layout, distribution, folders):
        assert set(finals) == set(folders)
        for source, weights in finals.items():
            for case, a, b in zip(CASES, weights, want):
                assert_equal(a, b, f"{source} -> {place}: {case.name}")


def fsdp1_as_users_write_it(rank, folder, start, stop):
    model, opt = build("fsdp1", "owner")
    state = {"model": get_model_state_dict(model), "optimizer": named_state_dict(opt)}
    if start:
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        opt.load_state_dict(state["optimizer"])
    advance(model, opt, CASES, F32, start, stop)
    if not start:
        state = {
            "model": get_model_state_dict(model),
            "optimizer": named_state_dict(opt),
        }
        dcp.save(state, checkpoint_id=folder)
    return whole_weights(model, CASES)


@pytest.mark.multiprocess
def test_fsdp1_on_gloo_writes_and_reads_what_fsdp2_reads_and_writes(tmp_path):
    want, folder = uninterrupted(), str(tmp_path / "fsdp1")
    run_processes(2, fsdp1_as_users_write_it, folder, 0, BEFORE)
    fsdp2 = run_threads(3, read_all, "fsdp2", "owner", {"it": folder})[0]["it"]
    folder = str(tmp_path / "fsdp2")
    run_threads(3, write, "fsdp2", "owner", folder)
    fsdp1 = run_processes(2, fsdp1_as_users_write_it, folder, BEFORE, AFTER)[0]
    for case, a, b, c in zip(CASES, fsdp2, fsdp1, want, strict=True):
        assert_equal(a, c, f"fsdp1 -> fsdp2: {case.name}")
        assert_equal(b, c, f"fsdp2 -> fsdp1: {case.name}")


def save_asynchronously(rank, folder):
    model, opt = build("fsdp2", "owner")
    advance(model, opt, CASES, F32, 0, BEFORE)
    group = dist.new_group(backend="gloo")  # training keeps using the other one
    future = dcp.async_save(
        states(model, opt), checkpoint_id=folder, process_group=group
    )
    advance(model, opt, CASES, F32, BEFORE, AFTER)  # must not get into the files
    future.result()
    return whole_weights(model, CASES)


@pytest.mark.multiprocess
def test_an_asynchronous_checkpoint_holds_the_moment_of_the_call(tmp_path):
    folder, want = str(tmp_path / "async"), uninterrupted()
    for weights in run_processes(2, save_asynchronously, folder):
        for case, a, b in zip(CASES, weights, want):
            assert_equal(a, b, case.name)
    got = run_threads(3, read_all, "fsdp2", "owner", {"async": folder})
    for case, a, b in zip(CASES, got[0]["async"], want):
        assert_equal(a, b, case.name)


def test_flattened_checkpoints_move_from_blocks_to_owners(tmp_path):
    """From the broadcast distribution, which rounds elsewhere, hence the tolerance."""
    folder = str(tmp_path / "flat")
    run_threads(2, write, "fsdp2", "broadcast", folder, True)
    want = uninterrupted()
    got = run_threads(3, read_all, "fsdp2", "owner", {"flat": folder}, True)
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
    run_threads(2, full_state, path)
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


def test_no_rank_holds_all_of_the_saved_form():
    results = run_threads(3, shards)
    assert sum(held for held, _ in results) == results[0][1]
    assert all(held < 0.6 * whole for held, whole in results)


def test_states_are_matched_by_name_if_both_sides_have_the_same_names():
    first, second = (torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    opt = AdaDiag([("first", first), ("second", second)])
    first.grad, second.grad = torch.ones(4, 4), torch.full((4, 4), 2.0)
    opt.step()
    other = AdaDiag([("second", second), ("first", first)])
    other.load_state_dict(opt.state_dict())
    for param in (first, second):
        for key, value in opt.state[param].items():
            assert_equal(other.state[param][key], value, key)


def test_a_named_state_dict_needs_names():
    opt = AdaDiag([torch.nn.Parameter(torch.randn(4, 4))])
    with pytest.raises(ValueError, match="have no names; make it of param_groups"):
        named_state_dict(opt)


def test_a_parameter_without_saved_state_is_named():
    first, second = (torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    opt = AdaDiag([first, second])
    first.grad, second.grad = torch.ones(4, 4), torch.ones(4, 4)
    opt.step()
    state = opt.state_dict()
    del state["state"][1]
    with pytest.warns(UserWarning, match="parameter 1: the loaded state has nothing"):
        opt.load_state_dict(state)
    assert float(opt.state[second]["step"]) == 0.0
