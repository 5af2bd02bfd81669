"""Four parameters of an optimizer in one process."""

import warnings

import torch
from torch import nn

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag

CLASSES = [AdaDiag, AdafacDiag, HfacDiag]


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wide": (5, 8), "tall": (8, 5), "conv": (4, 2, 3, 3), "bias": (7,)}
    return [
        (name, nn.Parameter(torch.randn(s, generator=generator).to(dtype)))
        for name, s in shapes.items()
    ]


def give_gradients(named, step):
    generator = torch.Generator().manual_seed(100 + step)
    for _, param in named:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def run(opt, named, start, stop):
    for step in range(start, stop):
        give_gradients(named, step)
        opt.step()


def weights(named):
    return [param.detach().clone() for _, param in named]


def warnings_of(body):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        body()
    return [str(w.message) for w in caught]
