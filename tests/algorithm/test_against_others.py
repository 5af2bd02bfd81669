"""Where others wrote an oracle, the public optimizers are compared with it directly."""

import pytest
import torch
from support.one_process import OPTIMIZERS, STEPS, close, run, train, trainable
from support.oracles import (
    BETAS,
    SHAPES,
    adafactor_direction,
    beta_with_corrected_decay,
    follow,
    galore_in_our_conventions,
    hfac_direction,
    random_matrices,
    run_torch,
)

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 3, 2, 2), (7,)])
@pytest.mark.parametrize("name", ["adadiag", "adafacdiag", "hfacdiag"])
def test_without_rotation_the_steps_are_torch_adamw(
    name, shape, maximize, weight_decay
):
    grads = random_matrices(50, *shape, dtype=torch.float32)
    weight = random_matrices(1, *shape, scale=0.1, seed=1, dtype=torch.float32)[0]
    options = {"lr": 1e-3, "weight_decay": weight_decay, "maximize": maximize}
    expected, expected_state = run_torch(torch.optim.AdamW, grads, weight, **options)
    # The factored methods' own base is not Adam; theirs for embeddings is.
    unrotated = {"sides": "none"} if name == "adadiag" else {"rotate": False}
    actual = trainable(weight)
    group = {"params": [actual], **unrotated}
    optimizer = OPTIMIZERS[name]([group], **options)
    train(optimizer, {"": actual}, {"": grads})
    close(actual, expected, 1e-6)
    for key in ("exp_avg", "exp_avg_sq"):
        close(optimizer.state[actual][key], expected_state[key], 1e-6, key)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("gap", [1, 7])
@pytest.mark.parametrize("name", SHAPES)
def test_adadiag_is_galore_at_full_rank(name, gap, weight_decay):
    grads = random_matrices(30, *SHAPES[name])
    weight = random_matrices(1, *SHAPES[name], scale=0.1, seed=1)[0]
    options = {"lr": 1e-2, "betas": BETAS, "eps": 1e-8, "weight_decay": weight_decay}
    actual, _ = run(
        AdaDiag,
        grads,
        weight=weight,
        refresh_every=gap,
        side="right" if name == "square" else "auto",  # GaLore's squares go right
        **options,
    )
    expected = galore_in_our_conventions(
        grads.numpy(), weight.numpy(), gap=gap, **options
    )
    close(actual, expected, 1e-10)


@pytest.mark.parametrize("threshold", [None, 1.0])
@pytest.mark.parametrize("momentum", [False, True])
def test_adafacdiag_without_rotation_is_adafactor(momentum, threshold):
    grads = random_matrices(STEPS, 6, 9)
    options = {"betas": BETAS, "momentum": momentum, "clip_threshold": threshold}
    actual, _ = run(AdafacDiag, grads, sides="none", lr=1e-2, **options)
    expected = follow(
        lambda history: adafactor_direction(history, BETAS, threshold, momentum),
        grads,
        lr=1e-2,
    )
    close(actual, expected, 1e-12)


def test_adafacdiag_without_rotation_and_momentum_is_torch_adafactor():
    """As in the test of the reference: a beta of its own on every step."""
    grads = random_matrices(20, 6, 9)
    weight = trainable(random_matrices(1, 6, 9, scale=0.1, seed=1)[0])
    expected, _ = run_torch(
        torch.optim.Adafactor, grads, weight.detach(), lr=1e-5, eps=(1e-30, 1e3)
    )
    optimizer = AdafacDiag([weight], lr=1e-2, sides="none", momentum=False)
    for t, grad in enumerate(grads, start=1):
        beta2 = beta_with_corrected_decay(1 - t**-0.8, t)
        optimizer.param_groups[0]["betas"] = (0.9, beta2)
        weight.grad = grad
        optimizer.step()
    close(weight, expected, 1e-10)


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_hfacdiag_without_rotation_is_hfac(threshold):
    grads = random_matrices(STEPS, 6, 9)
    options = {"betas": BETAS, "clip_threshold": threshold}
    actual, _ = run(HfacDiag, grads, sides="none", lr=1e-2, **options)
    expected = follow(lambda h: hfac_direction(h, BETAS, threshold), grads, lr=1e-2)
    close(actual, expected, 1e-12)
