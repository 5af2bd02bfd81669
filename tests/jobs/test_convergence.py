"""The comparison of optimizers: who trains what, at which learning rate."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support import ROOT
from torch import nn

from sharded_adadiag.testing.ranks import run_threads

sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "benchmarks")]

import convergence  # noqa: E402
import optimizers  # noqa: E402
import rivals  # noqa: E402
import settings  # noqa: E402


def small_model() -> nn.Module:
    torch.manual_seed(0)
    hidden = nn.GRUCell(8, 6)
    return nn.ModuleDict({
        "embedding": nn.Embedding(12, 8),
        "hidden": hidden,
        "head": nn.Linear(6, 12),
    })


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


@pytest.mark.parametrize("name", ["adamw", "adadiag"])
def test_what_is_not_rotated_has_the_plain_learning_rate(name: str) -> None:
    flags = ["--model", "tiny", "--optimizer", name, "--lr", "0.1"]
    model = small_model()
    names = {param: name for name, param in model.named_parameters()}
    for more, plain in (([], 0.1), (["--plain-lr", "0.2"], 0.2)):
        optimizer = optimizers.build_optimizer(model, settings.parse([*flags, *more]))
        rates = {names[p]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert rates["hidden.weight_ih"] == rates["hidden.weight_hh"] == 0.1
        assert rates["embedding.weight"] == rates["head.weight"] == plain
        assert rates["hidden.bias_ih"] == plain


def test_muon_has_the_hidden_matrices_and_adamw_the_rest() -> None:
    """Bit for bit what both do with their own parameters, under one schedule."""
    flags = ["--model", "tiny", "--optimizer", "adamw", "--steps", "8"]
    parsed = settings.parse([*flags, "--lr", "0.1", "--plain-lr", "0.2"])
    ours, theirs = small_model(), small_model()

    def train(rank: int) -> None:
        optimizer = rivals.Pair(ours, rivals.RIVALS["muon"], parsed)
        schedule = optimizers.build_schedule(optimizer, parsed)
        for step in range(3):
            give_gradients(ours, step)
            optimizer.step()
            optimizer.zero_grad()
            assert all(param.grad is None for param in ours.parameters())
            schedule.step()
        assert len(optimizer.state) == len(list(ours.parameters()))

    run_threads(1, train)
    hidden = [theirs["hidden"].weight_ih, theirs["hidden"].weight_hh]
    rest = [p for p in theirs.parameters() if all(p is not h for h in hidden)]
    muon = torch.optim.Muon(
        hidden, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    both = [muon, torch.optim.AdamW(rest, lr=0.2, weight_decay=0.0)]
    schedules = [optimizers.build_schedule(one, parsed) for one in both]
    for step in range(3):
        give_gradients(theirs, step)
        for one in (*both, *schedules):
            one.step()
    for (name, param), other in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(param, other), name
    assert not torch.equal(ours["head"].weight, small_model()["head"].weight)


def test_a_rival_refuses_several_ranks() -> None:
    parsed = settings.parse(["--model", "tiny", "--optimizer", "adamw"])
    models = [small_model() for _ in range(2)]

    def body(rank: int) -> None:
        with pytest.raises(ValueError, match="one rank"):
            rivals.Pair(models[rank], rivals.RIVALS["muon"], parsed)

    run_threads(2, body)


def test_rivals_are_run_by_a_program_of_their_own(tmp_path: Path) -> None:
    flags = ("--model", "tiny")
    muon = convergence.Job("muon", 0.1, 0, flags).command(tmp_path)
    assert [Path(muon[1]).name, *muon[2:5]] == ["rivals.py", "muon", *flags]
    job = convergence.Job("adadiag --refresh-every 5", 0.1, 0, flags)
    command = job.command(tmp_path)
    assert Path(command[1]).name == "pretrain_llama.py"
    assert command[2:8] == ["--optimizer", "adadiag", *flags, "--refresh-every", "5"]


def test_the_plot_has_a_curve_for_each_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib in this environment")
    jobs = [convergence.Job("adamw", 0.1, seed, ()) for seed in range(2)]
    results = [
        convergence.Result(job, [(5, 4.0), (10, 3.0 + job.seed)], 1.0, 0)
        for job in jobs
    ]
    failed = convergence.Result(convergence.Job("soap", 0.1, 0, ()), [], 1.0, 1)
    chosen = {"adamw": results, "muon": results[:1], "soap": [failed]}
    convergence.plot(chosen, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
