"""Gradients in another dtype than their parameter's (``param.grad_dtype``)."""

import pytest
import torch
import torch.distributed as dist
from support.counting import Counted
from support.small_model import snapshot
from support.training import (
    Parameters,
    groups,
    local_gradient,
    sharded_model,
    whole_weights,
)
from torch import nn
from torch.distributed.tensor import DTensor

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import Case, gradients
from sharded_adadiag.testing.ranks import run_threads

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="torch has no param.grad_dtype yet"
)
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
CASES = (Case("wide", (8, 12)), Case("tall", (12, 8)), Case("vector", (64,)))
WIDE_STATES = {"state_dtype": F32, "rotation_dtype": F32}


def advance(model, opt, steps=4, dtype=F32):
    for param in model.parameters():
        param.grad_dtype = dtype
    for step in range(steps):
        for param, grad in zip(model.parameters(), gradients(CASES, step, dtype)):
            param.grad = local_gradient(param, grad)
        opt.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_plain_parameter_is_updated_by_adamw_in_float32(weight_decay):
    options = {"lr": 1e-2, "weight_decay": weight_decay}
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(64, generator=generator).to(BF16))
    twin = nn.Parameter(param.detach().float())
    opt = AdaDiag([("vector", param)], state_dtype=F32, **options)
    adamw = torch.optim.AdamW([twin], fused=True, **options)
    param.grad_dtype = F32
    for _ in range(5):
        param.grad = torch.randn(64, generator=generator)
        twin.grad = param.grad.clone()
        opt.step()
        adamw.step()
        with torch.no_grad():
            twin.copy_(twin.to(BF16))  # what is kept of the weights
        assert_equal(param.detach().float(), twin.detach())
        for key in ("exp_avg", "exp_avg_sq"):
            assert_equal(opt.state[param][key], adamw.state[twin][key], key)


@pytest.mark.parametrize("states", [{}, WIDE_STATES], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("cls", [AdaDiag, AdafacDiag, HfacDiag])
def test_a_matrix_rotates_the_gradient_as_it_is(cls, states):
    """Its states are those of a float32 parameter, as far as they are kept in float32.

    Else its bases are, and moments differ because a basis was rounded.
    """
    narrow, wide = Parameters(CASES, BF16), Parameters(CASES, F32)
    opt = cls(groups(narrow, CASES), refresh_every=3, **states)
    other = cls(groups(wide, CASES), refresh_every=3, **WIDE_STATES)
    steps = 4 if states else 1
    advance(narrow, opt, steps)
    advance(wide, other, steps)
    for a, b in zip(narrow.parameters(), wide.parameters()):
        kept = {k: v for k, v in opt.state[a].items() if states or "rotation" in k}
        for key, value in kept.items():
            assert_equal(value, other.state[b][key].to(value.dtype), key)
        assert a.dtype == BF16


def on_ranks(rank, layout, distribution, seen):
    model, extra = sharded_model(layout, CASES, BF16)
    options = {"distribution": distribution, "refresh_every": 100, **WIDE_STATES}
    opt = AdaDiag(groups(model, CASES), **options, **extra)
    advance(model, opt, 3)
    before = seen.bytes  # of rank 1 alone
    advance(model, opt, 1)
    sent = seen.bytes - before
    promised = opt.describe().ranks[1].bytes_per_step
    moments = [
        value.full_tensor() if isinstance(value, DTensor) else value
        for state in opt.state_dict()["state"].values()
        for value in state.values()
    ]
    return whole_weights(model, CASES), moments, (sent, promised)


@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
@pytest.mark.parametrize("layout,world_size", [("fsdp2", 3), ("hsdp", 4), ("ddp", 2)])
def test_gradients_travel_in_their_own_dtype(
    layout, world_size, distribution, monkeypatch
):
    model = Parameters(CASES, BF16)
    opt = AdaDiag(groups(model, CASES), refresh_every=100, **WIDE_STATES)
    advance(model, opt, 3)
    advance(model, opt, 1)
    states = [v for s in opt.state_dict()["state"].values() for v in s.values()]
    seen = Counted()
    with seen.watching(monkeypatch):
        ran = run_threads(world_size, on_ranks, layout, distribution, seen)
    sent, promised = ran[1][2]
    assert sent == promised
    for weights, moments, _ in ran:
        for a, b in zip(moments, states):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        if distribution == "owner":
            for a, b in zip([*weights, *moments], [*model.parameters(), *states]):
                assert_equal(a.detach(), b.detach())


def wider_than_planned(rank):
    model, extra = sharded_model("fsdp2", CASES, BF16)
    opt = AdaDiag(groups(model, CASES), **extra)
    advance(model, opt, 1, BF16)
    before = snapshot(model, opt)
    for param in model.parameters():
        param.grad = None
    with pytest.raises(RuntimeError, match="set the parameter's grad_dtype") as caught:
        advance(model, opt, 1, F32)
    assert all(map(torch.equal, snapshot(model, opt), before))
    return str(caught.value)


def test_a_gradient_that_got_wider_is_refused_on_every_rank():
    messages = run_threads(2, wider_than_planned)
    assert len(set(messages)) == 1
    assert "wider than torch.bfloat16" in messages[0]


def unlike(rank):
    params = [("a", nn.Parameter(torch.ones(4, 6, dtype=BF16)))]
    params[0][1].grad_dtype = F32 if rank else BF16
    params[0][1].grad = torch.ones(4, 6, dtype=F32 if rank else BF16)
    with pytest.raises(ValueError, match="gradients in torch.float32 instead of"):
        AdaDiag(params, process_group=dist.group.WORLD).step()


def test_ranks_with_gradients_of_different_dtypes_all_raise():
    run_threads(2, unlike)
