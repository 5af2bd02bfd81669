"""The code of docs/checkpoints.md runs as printed, and does what the page says."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from support import ROOT
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from sharded_adadiag import AdaDiag, param_groups
from sharded_adadiag.testing.assertions import assert_equal

PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# Each block of the page by what it alone says.
BLOCKS = {
    "AdamW's state by name": "get_optimizer_state_dict(model, adamw)",
    "a file of AdamW's": 'torch.load("adamw.pt"',
}


def block(name: str) -> str:
    (code,) = [code for code in CODE if BLOCKS[name] in code]
    return code


def run_of_adamw() -> tuple[nn.Module, torch.optim.AdamW]:
    """What the page takes for granted: a model and the AdamW that has trained it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 9))
    adamw = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(3):
        train(model, adamw)
    return model, adamw


def train(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    opt.zero_grad()
    tokens = torch.arange(9)
    nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
    opt.step()


def test_every_block_of_the_page_is_run():
    assert sorted(CODE) == sorted(map(block, BLOCKS))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_hands_over_what_the_page_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adamw = run_of_adamw()
    monkeypatch.chdir(tmp_path)
    torch.save(adamw.state_dict(), "adamw.pt")
    names = {
        "torch": torch,
        "AdaDiag": AdaDiag,
        "param_groups": param_groups,
        "get_optimizer_state_dict": get_optimizer_state_dict,
        "model": model,
        "adamw": adamw,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(block(name), name, "exec"), names)
    opt = names["opt"]
    # "A warning for each matrix says that it has no rotation yet."
    assert ["1.weight" in str(w.message) for w in caught] == [True]
    # "Learning rate, betas, eps and weight decay are then AdamW's in both groups", and
    # what AdamW has no word for "stays as the optimizer was made".
    assert [group["rotate"] for group in opt.param_groups] == [True, False]
    for group in opt.param_groups:
        assert (group["lr"], group["weight_decay"]) == (2e-3, 0.05)
        assert group["refresh_every"] == 200
    for param in model.parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert_equal(opt.state[param][key], adamw.state[param][key], key)
    # "The first basis is made of the next gradient."
    train(model, opt)
    assert "rotation_right" in opt.state[model[1].weight]
