"""What an ordinary step of one rank dispatches, and how often the host waits for it."""

import collections

import pytest
import torch
from support.host_reads import Host
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag
from sharded_adadiag.step.batching import BATCH_NUMEL

# Of the 60M LLaMA: 56 matrices of three shapes, but smaller.
ATTENTION, UP, DOWN = (192, 192), (516, 192), (192, 516)
LLAMA = [ATTENTION] * 32 + [UP] * 16 + [DOWN] * 8
SMALL = [(rows // 4, cols // 4) for rows, cols in LLAMA]
# What makes no kernel: views, memory that is not filled, questions to torch itself.
NO_KERNEL = {
    *("as_strided", "detach", "reshape", "select", "slice", "t", "transpose"),
    *("unbind", "unsqueeze", "view", "expand", "empty", "new_empty", "empty_strided"),
    *("promote_types", "_record_function_enter_new", "_record_function_exit"),
}


class Kernels(TorchDispatchMode):
    """Counts the dispatched operations, views aside."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_KERNEL:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def optimizer(method, shapes, **options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    named = [(f"w{i}", param) for i, param in enumerate(params)]
    opt = method([{"params": named, "rotate": True}], basis="eigh", **options)
    for _ in range(2):  # the second is ordinary, and what is kept has been made
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        opt.step()
    return opt


def kernels(method, shapes, **options):
    opt = optimizer(method, shapes, **options)
    with Kernels() as mode:
        opt.step()
    return mode.count


def test_adadiag_needs_at_most_four_kernels_for_a_matrix():
    """Two products, Adam and the subtraction; one more product for the other side."""
    count = kernels(AdaDiag, LLAMA)
    assert count["mm"] == 2 * len(LLAMA)
    assert count.total() <= 4 * len(LLAMA) + 16, count
    two = kernels(AdaDiag, LLAMA[:8], sides="two")
    assert two["mm"] == 4 * 8
    assert two.total() <= 6 * 8 + 16, two


@pytest.mark.parametrize(
    ("method", "most"), [(AdaDiag, 200), (AdafacDiag, 600), (HfacDiag, 600)]
)
def test_matrices_of_one_shape_are_updated_together(method, most):
    """3,757 operations with HfacDiag when each matrix had a rule of its own."""
    count = kernels(method, SMALL)
    assert count.total() < most, count
    one_more = kernels(method, [*SMALL, SMALL[0]])
    assert one_more.total() <= count.total() + 6


@pytest.mark.parametrize(
    ("method", "most"), [(AdaDiag, 200), (AdafacDiag, 600), (HfacDiag, 600)]
)
def test_an_accelerator_updates_large_matrices_together_too(method, most, monkeypatch):
    """On a CPU they are updated one by one, which is faster there."""
    monkeypatch.setitem(BATCH_NUMEL, "cpu", BATCH_NUMEL["cuda"])
    count = kernels(method, LLAMA)
    assert count.total() < most, count


@pytest.mark.parametrize("method", [AdaDiag, AdafacDiag, HfacDiag])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_ordinary_step_reads_the_norms_of_the_gradients_alone(method, weight_decay):
    """And the step counts, which are on the host on every device."""
    opt = optimizer(method, SMALL, weight_decay=weight_decay)
    assert all(state["step"].is_cpu for state in opt.state.values())
    with Host() as mode:
        opt.step()
    assert mode.reads == ["tolist", "tolist"]
    assert mode.made == 0


def test_a_learning_rate_in_a_tensor_is_read_once():
    opt = optimizer(AdaDiag, SMALL, lr=torch.tensor(1e-3))
    with Host() as mode:
        opt.step()
    assert len(mode.reads) <= 3
