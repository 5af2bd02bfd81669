"""What ranks find out of each other before a step changes anything."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from support.small_model import snapshot
from support.training import groups, local_gradient, sharded_model, whole_weights
from torch import nn
from torch.distributed.tensor import DTensor

from sharded_adadiag import AdaDiag
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import Case, gradients
from sharded_adadiag.testing.ranks import run_threads

CASES = (Case("matrix", (8, 6)), Case("other", (6, 8)), Case("vector", (5,)))
# The layouts in which several ranks hold the same; under tensor parallelism vectors.
REPLICAS = [("ddp", 2), ("hsdp", 4), ("tp", 2)]
DISTRIBUTIONS = ["owner", "broadcast"]


def start(layout, distribution):
    model, extra = sharded_model(layout, CASES, torch.float32)
    options = {"lr": 1e-2, "distribution": distribution, **extra}
    return model, AdaDiag(groups(model, CASES), **options)


def give_gradients(model, step):
    named = dict(model.named_parameters())
    for case, grad in zip(CASES, gradients(CASES, step, torch.float32)):
        named[case.name].grad = local_gradient(named[case.name], grad)
    return named


def is_last():
    return dist.get_rank() == dist.get_world_size() - 1


def message_of(opt, model, error):
    """The error of a step, which must change nothing."""
    before = snapshot(model, opt)
    with pytest.raises(error) as caught:
        opt.step()
    assert all(map(torch.equal, snapshot(model, opt), before))
    return str(caught.value)


def loaded_into_other_weights(rank, layout, distribution):
    model, opt = start(layout, distribution)
    give_gradients(model, 0)
    opt.step()
    state = opt.state_dict()
    state["state"] = {
        i: {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in s.items()}
        for i, s in state["state"].items()
    }
    model, opt = start(layout, distribution)
    opt.load_state_dict(copy.deepcopy(state))
    named = give_gradients(model, 1)
    changed = named["vector"].data
    changed = changed.to_local() if isinstance(changed, DTensor) else changed
    if is_last():
        changed += 1.0
    message = message_of(opt, model, ValueError)
    if is_last():
        changed -= 1.0
    opt.step()  # equal replicas go on
    return message


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("layout,world_size", REPLICAS)
def test_replicas_are_compared_at_the_first_step_after_a_load(
    layout, world_size, distribution
):
    messages = run_threads(world_size, loaded_into_other_weights, layout, distribution)
    assert len(set(messages)) == 1
    assert f"{world_size - 1} hold the same part of it with" in messages[0]
    assert messages[0].startswith("vector: ")


def later_parameters(rank):
    """A parameter that joins later is compared when it does."""
    first = nn.Parameter(torch.ones(4, 4))
    later = nn.Parameter(torch.full((4, 4), float(is_last())))
    opt = AdaDiag([("first", first)], process_group=dist.group.WORLD)
    first.grad = torch.eye(4)
    opt.step()
    opt.add_param_group({"params": [("later", later)]})
    later.grad = torch.eye(4)
    with pytest.raises(ValueError, match="later: ranks 0 and 1 hold the same part"):
        opt.step()


def test_replicas_of_a_parameter_that_joins_later_are_compared():
    run_threads(2, later_parameters)


def without_one_gradient(rank, layout, distribution, name):
    model, opt = start(layout, distribution)
    give_gradients(model, 0)
    opt.step()
    named = give_gradients(model, 1)
    if is_last():
        named[name].grad = None
    message = message_of(opt, model, RuntimeError)
    give_gradients(model, 1)
    for param in model.parameters():
        if param is named["other"]:
            param.grad = None  # nobody has one: nothing is wrong
    opt.step()
    return message, whole_weights(model, CASES)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "layout,world_size,name",
    [(*r, name) for r in REPLICAS for name in ("matrix", "vector")][:-2]
    + [("tp", 2, "vector")],
)
def test_a_gradient_that_one_replica_lacks_is_refused_on_every_rank(
    layout, world_size, name, distribution
):
    arguments = layout, distribution, name
    ran = run_threads(world_size, without_one_gradient, *arguments)
    assert len({message for message, _ in ran}) == 1
    assert ran[0][0].startswith(f"{name}: rank ")
    assert f"{world_size - 1}, which holds the same part" in ran[0][0]
    for _, weights in ran:
        for a, b in zip(weights, ran[0][1]):
            assert_equal(a, b)


def without_a_shards_gradient(rank):
    """On both ranks that hold it: no two of them part."""
    model, opt = start("hsdp", "owner")
    named = give_gradients(model, 0)
    if rank % 2:
        named["matrix"].grad = None
    opt.step()
    held = named["matrix"].detach().to_local().clone()
    return held, float(opt.state[named["matrix"]]["step"])


def test_a_shard_without_gradient_on_all_its_replicas_counts_as_zeros():
    ran = run_threads(4, without_a_shards_gradient)
    assert [step for _, step in ran] == [1.0] * 4
    assert_equal(ran[1][0], ran[3][0])


def two_policies(rank, order, where):
    """NaN in two groups; by rank, which of them have one."""
    params = [nn.Parameter(torch.ones(4, 4)) for _ in order]
    opt = AdaDiag(
        [
            {"params": [(policy, param)], "nonfinite": policy}
            for policy, param in zip(order, params)
        ],
        process_group=dist.group.WORLD,
    )
    for policy, param in zip(order, params):
        param.grad = torch.eye(4)
        if policy in where[rank]:
            param.grad[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="raise: its gradient has NaN"):
        opt.step()
    assert opt.skipped_steps == 0
    for policy, param in zip(order, params):
        if policy == "raise":
            param.grad = torch.eye(4)
    if "skip" in where[0] + where[1]:
        opt.step()
        assert opt.skipped_steps == 1
    assert all(bool((param == 1.0).all()) for param in params)


@pytest.mark.parametrize("order", [("raise", "skip"), ("skip", "raise")])
@pytest.mark.parametrize(
    "where", [(("raise", "skip"), ()), (("skip",), ("raise",))], ids=["one", "two"]
)
def test_an_error_wins_over_a_skip_whatever_the_order(order, where):
    run_threads(2, two_policies, order, where)


def test_an_error_wins_over_a_skip_on_one_process():
    good, bad = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    opt = AdaDiag([
        {"params": [("sparse", good)]},
        {"params": [("skipped", bad)], "nonfinite": "skip"},
    ])
    good.grad = torch.eye(4).to_sparse()
    bad.grad = torch.full((4, 4), math.inf)
    with pytest.raises(RuntimeError, match="sparse: AdaDiag does not support sparse"):
        opt.step()
    assert opt.skipped_steps == 0
