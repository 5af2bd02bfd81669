"""The optimizers on a GPU, and the same tests on the CPU so that they are known to run.

The reference is on the CPU on either device: signs and null spaces of the bases are
settled, so that no library's choice decides the run.
"""

import contextlib
import warnings

import pytest
import torch
from support.host_reads import Host
from support.one_process import (
    OPTIMIZERS,
    close,
    make_gradients,
    make_parameters,
    train,
    trainable,
)

from sharded_adadiag.testing.reference import ReferenceOptimizer

WITHOUT_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device"
)
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, WITHOUT_GPU])]
SIDES = ["one", "two"]
BASES = ["svd", "eigh"]
# With two sides the entries off the diagonal are rounding right after a refresh, which
# every rule blows up to the size of the others. Far above it, they are made zeros.
NOISE_FLOOR = {"one": 0.0, "two": 1e-8}
REFRESH_EVERY = 5  # of 12 steps: in the 1st, 6th and 11th; the next one is ordinary

on_devices = pytest.mark.parametrize("device", DEVICES)
methods = pytest.mark.parametrize("method", OPTIMIZERS)
sides = pytest.mark.parametrize("sides", SIDES)


def options_of(sides, **more):
    fixed = {"lr": 1e-2, "refresh_every": REFRESH_EVERY, "weight_decay": 0.1}
    return fixed | {"sides": sides, "noise_floor": NOISE_FLOOR[sides]} | more


def trained(device, method, dtype=torch.float64, **options):
    """An optimizer after 12 steps, and its parameters by name."""
    params = {
        name: trainable(p.detach().to(device))
        for name, p in make_parameters(dtype).items()
    }
    grads = {name: g.to(device) for name, g in make_gradients(1.0, dtype).items()}
    group = {"params": list(params.items()), "rotate": True}
    opt = OPTIMIZERS[method]([group], **options)
    train(opt, params, grads)
    return opt, params


@contextlib.contextmanager
def waits():
    """What makes the host wait for the GPU, as torch warns of it."""
    found = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [w for w in caught if "synchronizing CUDA operation" in str(w.message)]


@on_devices
@methods
@sides
@pytest.mark.parametrize("basis", BASES)
def test_twelve_steps_are_those_of_the_reference(device, method, sides, basis):
    """In float64, where 1e-9 leaves room for rounding and for no other formula."""
    options = options_of(sides, basis=basis)
    _, params = trained(device, method, **options)
    theirs = make_parameters()
    reference = ReferenceOptimizer(method, theirs.values(), **options)
    train(reference, theirs, make_gradients(1.0))
    for name, param in params.items():
        close(param.cpu(), theirs[name], 1e-9, name)


@on_devices
@sides
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", [(96, 96), (64, 176), (176, 64)])
def test_bases_are_orthonormal(device, sides, basis, shape):
    """To float32's rounding: sums of 176 products err by some 1e-6 at most."""
    weight = trainable(torch.zeros(shape, device=device))
    opt = OPTIMIZERS["adadiag"]([weight], sides=sides, basis=basis, refresh_every=1)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight.grad = grad.to(device)
    opt.step()
    keys = [key for key in opt.state[weight] if key.startswith("rotation")]
    assert len(keys) == len(SIDES[: 1 + (sides == "two")])
    for key in keys:
        q = opt.state[weight][key].double()
        eye = torch.eye(len(q), device=device, dtype=q.dtype)
        assert (q.mT @ q - eye).abs().max() < 1e-5


@on_devices
@methods
@sides
def test_an_ordinary_step_reads_the_device_once(device, method, sides):
    """It reads the norms of all gradients; step counts lie on the host, read or not."""
    opt, params = trained(device, method, torch.float32, **options_of(sides))
    for param in params.values():
        param.grad.normal_()
    before = [p.detach().clone() for p in params.values()]
    with Host() as mode:
        if device == "cuda":
            with waits() as found:
                opt.step()
            assert len(found) == 1, [str(w) for w in found]
        else:
            opt.step()
    # The norms and the matrices' step counts; those of the others one by one.
    assert mode.reads.count("tolist") == 2
    if device == "cpu":
        assert set(mode.reads) == {"tolist", "__int__"}
    assert all(not torch.equal(a, b) for a, b in zip(before, params.values()))


@on_devices
@methods
@sides
def test_states_are_with_their_parameter_and_step_counts_on_the_host(
    device, method, sides
):
    opt, params = trained(device, method, torch.float32, **options_of(sides))
    for name, param in params.items():
        states = {**opt.state[param]}
        assert states.pop("step").is_cpu
        assert states, name
        assert {state.device for state in states.values()} == {param.device}, name
