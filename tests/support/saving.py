"""Optimizers in every layout whose states are saved, loaded and compared."""

import warnings

import pytest
import torch

from sharded_adadiag import AdaDiag, named_state_dict
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import Case
from sharded_adadiag.testing.ranks import run_threads
from support.training import Parameters, advance, groups, plain_names, sharded_model

# On one rank FSDP1 shards nothing, and says so; its state dicts are deprecated.
FSDP1_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
F32 = torch.float32

CASES = (
    Case("first", (6, 4)),
    Case("second", (6, 4)),
    Case("convolution", (4, 2, 3, 3)),
    Case("vector", (5,), rotate=False),
    Case("embedding", (7, 4), rotate=False),
)

PLACES = {"plain": 1, "replicas": 2, "ddp": 2, "fsdp2": 2, "hsdp": 4, "tp": 2}

EVERYWHERE = {**PLACES, "fsdp1": 2}


def ranked(layout, body, *args):
    """The body on its ranks; one process needs none."""
    if layout == "plain":
        return [body(0, layout, *args)]
    return run_threads(EVERYWHERE[layout], body, layout, *args)


def build(layout, *, backwards=False, frozen=(), **options):
    if layout in ("plain", "replicas"):
        model, extra = Parameters(CASES, F32), {}
    else:
        model, extra = sharded_model(layout, CASES, F32)
    for name, param in plain_names(model).items():
        param.requires_grad_(name not in frozen)
    made = groups(model, CASES)
    if backwards:
        made = [{**g, "params": g["params"][::-1]} for g in made[::-1]]
    defaults = {"lr": 1e-2, "weight_decay": 0.1, "refresh_every": 2}
    return model, AdaDiag(made, **{**defaults, **extra, **options})


def trained(layout, steps=3, **options):
    model, opt = build(layout, **options)
    advance(model, opt, CASES, F32, 0, steps)
    return model, opt


def states(opt):
    return named_state_dict(opt, full_state_dict=True)["state"]


def assert_same_states(got, want):
    assert list(map(sorted, (got, *got.values()))) == list(
        map(sorted, (want, *(want[name] for name in got)))
    )
    for name, state in want.items():
        for key, value in state.items():
            assert_equal(got[name][key], value, f"{name}: {key}")


def said(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if w.category is UserWarning]
