"""Decompositions that fail, and numbers at the ends of their range."""

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

from sharded_adadiag import AdaDiag
from sharded_adadiag.algorithm import basis as basis_module
from sharded_adadiag.testing.assertions import assert_equal


@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_changes_when_a_gradient_is_not_finite(cls):
    named = parameters()
    opt = cls(named, lr=1e-2)
    run(opt, named, 0, 2)
    before = weights(named) + [
        v.clone() for s in opt.state.values() for v in s.values()
    ]
    give_gradients(named, 2)
    named[1][1].grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="tall: .*NaN or Inf"):
        opt.step()
    after = weights(named) + [v for s in opt.state.values() for v in s.values()]
    for a, b in zip(after, before):
        assert_equal(a, b)


def test_large_finite_gradients_are_not_mistaken_for_infinite_ones():
    """Their sum overflows float32; every entry is finite."""
    param = nn.Parameter(torch.zeros(4, 4))
    opt = AdaDiag([("big", param)], lr=1e-2)
    param.grad = torch.full((4, 4), 3e38)
    opt.step()
    assert float(opt.state[param]["step"]) == 1.0


def failing(exception, monkeypatch, names):
    for name in names:

        def fail(*args, **kwargs):
            raise exception("did not converge")

        monkeypatch.setattr(torch.linalg, name, fail)


def test_an_svd_that_does_not_converge_falls_back_to_eigh_and_warns_once(monkeypatch):
    named, twin = parameters(), parameters()
    want = AdaDiag(twin, lr=1e-2, basis="eigh", refresh_every=2)
    run(want, twin, 0, 4)
    failing(basis_module.LinAlgError, monkeypatch, ["svd"])
    opt = AdaDiag(named, lr=1e-2, refresh_every=2)
    messages = warnings_of(lambda: run(opt, named, 0, 4))
    assert len(messages) == 3  # one for each matrix, though each was refreshed twice
    assert any("wide: " in m and "eigh was used" in m for m in messages)
    for a, b in zip(weights(named), weights(twin)):
        assert_equal(a, b)


def test_if_eigh_fails_as_well_the_old_basis_is_kept(monkeypatch):
    named = parameters()
    opt = AdaDiag(named, lr=1e-2, refresh_every=2)
    run(opt, named, 0, 2)
    old = opt.state[named[0][1]]["rotation_left"].clone()
    failing(basis_module.LinAlgError, monkeypatch, ["svd", "eigh"])
    messages = warnings_of(lambda: run(opt, named, 2, 4))
    assert any("wide: " in m and "the old basis was kept" in m for m in messages)
    assert_equal(opt.state[named[0][1]]["rotation_left"], old)


def test_a_decomposition_that_returns_nan_without_an_error_is_noticed(monkeypatch):
    real = torch.linalg.svd

    def silent(*args, **kwargs):
        u, s, vh = real(*args, **kwargs)
        return u * float("nan"), s, vh * float("nan")

    monkeypatch.setattr(torch.linalg, "svd", silent)
    named = parameters()
    messages = warnings_of(lambda: run(AdaDiag(named, lr=1e-2), named, 0, 1))
    assert any("wide: " in m and "eigh was used" in m for m in messages)
    assert all(bool(w.isfinite().all()) for w in weights(named))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("basis", ["svd", "eigh"])
def test_extreme_scales_give_finite_weights(basis, scale):
    named = parameters()
    opt = AdaDiag(named, lr=1e-2, basis=basis, refresh_every=2)
    for step in range(4):
        give_gradients(named, step)
        for _, param in named:
            param.grad *= scale
        opt.step()
    assert all(bool(w.isfinite().all()) for w in weights(named))
