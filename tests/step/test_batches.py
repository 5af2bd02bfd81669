"""A matrix's numbers do not depend on what is updated together with it."""

import pytest
import torch
from torch import nn

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag

SHAPES = [(24, 40)] * 3 + [(40, 24)] * 2 + [(200, 320)] * 3 + [(7, 5)] * 3


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def trained(method, which, steps=3, broken=(), **options):
    """Weights of some of the matrices; ``broken``: (step, matrix) with a NaN."""
    values = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=values)) for s in SHAPES]
    named = [(f"w{i}", params[i]) for i in which]
    opt = method([{"params": named, "rotate": True}], lr=0.01, basis="eigh", **options)
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=values)
            if (step, i) in broken:
                param.grad[0, 0] = torch.nan
        opt.step()
    return {i: params[i].detach() for i in which}


@pytest.mark.parametrize("sides", ["one", "two", "none"])
@pytest.mark.parametrize("method", [AdaDiag, AdafacDiag, HfacDiag])
def test_a_matrix_alone_has_the_bits_that_it_has_among_others(method, sides, threads):
    together = trained(method, range(len(SHAPES)), sides=sides, noise_floor=0.001)
    for i in (0, 2, 4, 5, 7, 10):
        alone = trained(method, [i], sides=sides, noise_floor=0.001)
        assert torch.equal(alone[i], together[i]), SHAPES[i]


@pytest.mark.parametrize("sides", ["one", "two", "none"])
@pytest.mark.parametrize("method", [AdaDiag, AdafacDiag, HfacDiag])
def test_a_nan_that_is_ignored_stays_in_its_matrix(method, sides):
    """The memory that it has passed through serves the other matrices next."""
    options = {"sides": sides, "nonfinite": "ignore"}
    clean = trained(method, range(len(SHAPES)), **options)
    broken = trained(method, range(len(SHAPES)), broken={(1, 0), (1, 6)}, **options)
    for i, weight in broken.items():
        if i in (0, 6):
            assert weight.isnan().any()
        else:
            assert torch.equal(weight, clean[i]), SHAPES[i]
