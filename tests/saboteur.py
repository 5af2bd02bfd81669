"""The pretraining example with a quick model and, on request, a fault.

SABOTAGE in the environment is a JSON list of faults, one for each start by torchrun:
`where` it strikes (a key of PLACES), `how` (a function of this file), on which `rank`,
and at which `call` of that place, counted from 1. Further starts are ordinary runs.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import pretrain_llama
import torch
from torch import Tensor, nn

# ------------------------------------------------------------- the quick model


class Output(NamedTuple):
    logits: Tensor


class QuickModel(nn.Module):
    """Two residual layers: transformers alone takes longer to import than a test."""

    def __init__(self, vocab: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Dropout(dropout),  # so that random numbers matter
                nn.Linear(2 * width, width),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Output:
        hidden = self.embedding(input_ids)
        for layer in self.model.layers:
            hidden = hidden + layer(hidden)
        return Output(self.head(hidden))


def build_model(settings: Any) -> nn.Module:
    torch.manual_seed(settings.seed)
    dropout = float(os.environ.get("DROPOUT", "0"))
    return QuickModel(settings.vocab, settings.hidden, dropout)


# ------------------------------------------------------------------ the faults


def kill(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_node(*args: Any) -> None:
    """Ends torchrun's agent as well: nothing starts this rank again."""
    os.kill(os.getppid(), signal.SIGKILL)
    kill()


def run_out_of_memory(*args: Any) -> None:
    raise torch.OutOfMemoryError("no room for the singular vectors")


def fill_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def poison(model: nn.Module, *args: Any) -> None:
    """A NaN in this rank's part of one gradient."""
    model.model.layers[1][3].weight.grad.to_local()[0, 0] = torch.nan


# Where a fault strikes: an object and the name of its function. `backward` is followed
# by the fault, so that the gradients are there; the others are preceded by it. DCP
# calls torch.save for each tensor, in the middle of a file, in its own thread.
PLACES: dict[str, tuple[Any, str]] = {
    "step": (pretrain_llama, "backward"),
    "refresh": (torch.linalg, "svd"),
    "save": (torch, "save"),
}


def sabotage(*, where: str, how: str, rank: int, call: int) -> None:
    """Makes one call of a function go wrong."""
    if rank != int(os.environ["RANK"]):
        return
    owner, name = PLACES[where]
    real: Callable = getattr(owner, name)
    fault: Callable = globals()[how]
    calls = 0

    def faulty(*args: Any, **rest: Any) -> Any:
        nonlocal calls
        in_background = threading.current_thread() is not threading.main_thread()
        calls += in_background == (where == "save")
        strikes = calls == call and in_background == (where == "save")
        if strikes and where != "step":
            fault(*args)
        result = real(*args, **rest)
        if strikes and where == "step":
            fault(*args)
        return result

    setattr(owner, name, faulty)


if __name__ == "__main__":
    pretrain_llama.build_model = build_model
    pretrain_llama.plot_losses = lambda folder, title: folder / "no plot"
    faults = json.loads(os.environ.get("SABOTAGE", "[]"))
    for fault in faults[int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) :][:1]:
        sabotage(**fault)
    pretrain_llama.main()
