"""The pretraining example with a quick model and, on request, a fault.

SABOTAGE in the environment is a JSON list of faults, one for each start by torchrun;
further starts are ordinary runs. `where` it strikes is a key of PLACES, `how` is a
function of this file, `rank` and `call` (counted from 1) say which call it is. With
`after`, that call first waits for the checkpoint of this step to be whole; those of a
save do not count before.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import metrics
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


def is_whole(step: int) -> bool:
    """Whether the checkpoint of a step is; there is none of step 0."""
    folder = Path(sys.argv[sys.argv.index("--run-dir") + 1])
    return not step or (folder / "checkpoints" / f"step-{step}").exists()


def sabotage(*, where: str, how: str, rank: int, call: int, after: int = 0) -> None:
    """Makes one call of a function go wrong."""
    if rank != int(os.environ["RANK"]):
        return
    owner, name = PLACES[where]
    real: Callable = getattr(owner, name)
    fault: Callable = globals()[how]
    whole = functools.partial(is_whole, after)
    calls = 0

    def strike(*args: Any) -> None:
        nonlocal calls
        in_background = threading.current_thread() is not threading.main_thread()
        if in_background != (where == "save") or (where == "save" and not whole()):
            return
        calls += 1
        if calls == call:
            while not whole():
                time.sleep(0.01)
            fault(*args)

    def faulty(*args: Any, **rest: Any) -> Any:
        if where != "step":
            strike(*args)
        result = real(*args, **rest)
        if where == "step":
            strike(*args)
        return result

    setattr(owner, name, faulty)


if __name__ == "__main__":
    pretrain_llama.build_model = build_model
    metrics.plot_losses = lambda folder, title: folder / "no plot"
    faults = json.loads(os.environ.get("SABOTAGE", "[]"))
    for fault in faults[int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) :][:1]:
        sabotage(**fault)
    pretrain_llama.main()
