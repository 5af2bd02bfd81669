"""The public optimizers in one process, on parameters of every kind."""

import torch

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag
from support.oracles import random_matrices

OPTIMIZERS = {"adadiag": AdaDiag, "adafacdiag": AdafacDiag, "hfacdiag": HfacDiag}

# Two of one shape, which are computed together, and one of each awkward kind.
PARAMETERS = {
    "square": (6, 6),
    "wide": (5, 9),
    "wide twin": (5, 9),
    "tall": (9, 5),
    "convolution": (6, 3, 2, 2),
    "tall convolution": (9, 1, 2, 2),
    "vector": (7,),
    "scalar": (),
    "row": (1, 8),
    "column": (8, 1),
}

STEPS = 12


def close(actual, expected, tolerance, name="weight"):
    """Every difference is below ``tolerance`` times the largest entry expected."""
    if not isinstance(expected, torch.Tensor):
        expected = torch.tensor(expected)
    torch.testing.assert_close(
        actual.detach(),
        expected.detach(),
        rtol=0.0,
        atol=tolerance * float(expected.detach().abs().max()),
        msg=lambda message: f"{name}: {message}",
    )


def trainable(tensor):
    return tensor.clone().requires_grad_()


def make_parameters(dtype=torch.float64):
    return {
        name: trainable(random_matrices(1, *shape, scale=0.1, seed=i, dtype=dtype)[0])
        for i, (name, shape) in enumerate(PARAMETERS.items())
    }


def make_gradients(scale, dtype=torch.float64, steps=STEPS):
    return {
        name: random_matrices(steps, *shape, scale=scale, seed=100 + i, dtype=dtype)
        for i, (name, shape) in enumerate(PARAMETERS.items())
    }


def train(optimizer, parameters, gradients):
    for t in range(len(next(iter(gradients.values())))):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][t].clone()
        optimizer.step()


def run(optimizer_class, grads, *, weight=None, **options):
    """One parameter's weight after a step for each gradient, and its state."""
    weight = trainable(torch.zeros_like(grads[0]) if weight is None else weight)
    optimizer = optimizer_class([weight], **options)
    train(optimizer, {"": weight}, {"": grads})
    return weight.detach(), optimizer.state[weight]


ROTATIONS = {
    "none": {"sides": "none"},
    "one": {"sides": "one"},
    "left": {"sides": "one", "side": "left"},
    "right": {"sides": "one", "side": "right"},
    "two": {"sides": "two"},
}
