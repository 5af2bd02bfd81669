"""What fails on one rank is one error, or one skipped step, on all."""

import math
import time

import pytest
import torch
import torch.distributed as dist
from support.small_model import NAMED, fresh, set_gradients, snapshot
from torch import nn

from sharded_adadiag import AdaDiag
from sharded_adadiag.testing.ranks import run_processes, run_threads


def errors_of(rank, poison, options):
    """The error each rank gets if only the last rank's gradient is poisoned."""
    model, opt = fresh(**options)
    set_gradients(model, NAMED, 0, torch.float32)
    opt.step()
    before = snapshot(model, opt)
    set_gradients(model, NAMED, 1, torch.float32)
    if rank == dist.get_world_size() - 1:
        dict(model.named_parameters())["b_weight"].grad.to_local()[0, 0] = poison
    try:
        opt.step()
        message = ""
    except RuntimeError as error:
        message = str(error)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, snapshot(model, opt)))
    set_gradients(model, NAMED, 2, torch.float32)
    opt.step()  # a refused step leaves the optimizer usable
    return message, unchanged, opt.skipped_steps


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
def test_a_nonfinite_gradient_on_one_rank_is_refused_on_all(distribution, poison):
    for message, unchanged, _ in run_threads(
        3, errors_of, poison, {"distribution": distribution}
    ):
        assert "b_weight" in message
        assert "NaN or Inf" in message
        assert unchanged


def test_skipping_skips_the_whole_step_on_every_rank_and_counts_it():
    for message, unchanged, skipped in run_threads(
        3, errors_of, math.nan, {"nonfinite": "skip"}
    ):
        assert message == ""
        assert unchanged
        assert skipped == 1


def mismatched(rank, what):
    shapes = {"a": (8, 6), "b": (6, 8)}
    if rank == 1:
        shapes = {
            "shape": {"a": (8, 6), "b": (6, 9)},
            "name": {"a": (8, 6), "c": (6, 8)},
            "count": {"a": (8, 6)},
            "options": shapes,
        }[what]
    params = [(name, nn.Parameter(torch.ones(s))) for name, s in shapes.items()]
    for _, param in params:
        param.grad = torch.ones_like(param)
    sides = "two" if rank == 1 and what == "options" else "one"
    opt = AdaDiag(params, process_group=dist.group.WORLD, sides=sides)
    with pytest.raises(ValueError, match="every rank of the group") as caught:
        opt.step()
    return str(caught.value)


@pytest.mark.parametrize("what", ["shape", "name", "count", "options"])
def test_ranks_with_different_parameters_all_raise_the_same_error(what):
    messages = run_threads(3, mismatched, what)
    assert len(set(messages)) == 1
    assert "rank 1" in messages[0]


def failing_owner(rank, distribution):
    model, opt = fresh(distribution=distribution)
    owner = opt.describe().matrices[0].owner
    set_gradients(model, NAMED, 0, torch.float32)
    try:
        opt.step()
    except RuntimeError as error:
        return owner, str(error)
    return owner, ""


@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
def test_an_owner_that_fails_takes_all_ranks_down_with_one_message(
    distribution, monkeypatch
):
    from sharded_adadiag.algorithm import statistic

    real = statistic.compute_basis

    def out_of_memory(grad, **rest):
        if tuple(grad.shape) == (8, 6):
            raise MemoryError("no room for the SVD")
        return real(grad, **rest)

    monkeypatch.setattr(statistic, "compute_basis", out_of_memory)
    results = run_threads(3, failing_owner, distribution)
    owner = results[0][0]
    for rank, (_, message) in enumerate(results):
        assert f"a_weight: rank {owner}, which works on it, could not" in message
        assert ("no room for the SVD" in message) == (rank == owner)


@pytest.mark.multiprocess
def test_errors_come_within_seconds_on_gloo_processes():
    start = time.monotonic()
    for message, unchanged, _ in run_processes(2, errors_of, math.nan, {}):
        assert "b_weight" in message
        assert unchanged
    assert time.monotonic() - start < 100.0


def first_zero_step(rank, distribution):
    """What torch's state-dict helpers do: a step with zero gradients and lr 0."""
    model, opt = fresh(distribution=distribution)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    named = dict(model.named_parameters())
    keys = {name: sorted(opt.state[param]) for name, param in named.items()}
    steps = [float(state["step"]) for state in opt.state.values()]
    return keys, steps


@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
def test_a_zero_first_step_creates_every_key_on_every_rank_and_counts_nothing(
    distribution,
):
    results = run_threads(4, first_zero_step, distribution)
    for keys, steps in results:
        assert keys == results[0][0]
        assert keys["a_weight"] == ["exp_avg", "exp_avg_sq", "rotation_right", "step"]
        assert keys["b_weight"] == ["exp_avg", "exp_avg_sq", "rotation_left", "step"]
        assert keys["c_bias"] == ["exp_avg", "exp_avg_sq", "step"]
        assert steps == [0.0, 0.0, 0.0]
