"""pretrain_llama.py with an optimizer of others for the hidden matrices, on one rank.

    python examples/benchmarks/rivals.py muon --model small --lr 0.003

`muon` is torch's, with its rates scaled to those of AdamW; `soap` is
pytorch_optimizer's, with a basis every 10 steps. Each has the matrices that
`param_groups` would rotate; torch's AdamW has the rest, at --plain-lr. Everything else,
flags included, is pretrain_llama.py's; no checkpoint is written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pretrain_llama
from settings import Settings

from sharded_adadiag import param_groups

Make = Callable[[list[nn.Parameter], Settings], torch.optim.Optimizer]


def muon(params: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        params,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


def soap(params: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(params, lr=settings.lr, weight_decay=settings.weight_decay)


RIVALS: dict[str, Make] = {"muon": muon, "soap": soap}


class Pair(torch.optim.Optimizer):
    """A rival for the hidden matrices and AdamW for the rest, as one optimizer.

    Both get the local tensors of the model's shards, which are whole on one rank:
    SOAP does not know DTensors. They share memory, so stepping the one steps the other.
    """

    def __init__(self, model: nn.Module, make: Make, settings: Settings) -> None:
        if torch.distributed.get_world_size() > 1:
            raise ValueError("rivals.py trains on one rank: a shard is no matrix")
        self.twins: list[tuple[nn.Parameter, nn.Parameter]] = []
        hidden, rest = (
            [self._twin(p) for _, p in group["params"]] for group in param_groups(model)
        )
        plain_lr = settings.lr if settings.plain_lr is None else settings.plain_lr
        adamw = torch.optim.AdamW(rest, lr=plain_lr, weight_decay=settings.weight_decay)
        self.parts = [make(hidden, settings), adamw]
        super().__init__([*hidden, *rest], {})
        # The same dicts: a schedule of this is one of both, and so are the states.
        self.param_groups = [g for part in self.parts for g in part.param_groups]
        for part in self.parts:
            part.state = self.state

    def _twin(self, param: Any) -> nn.Parameter:
        self.twins.append((param, nn.Parameter(local(param.detach()))))
        return self.twins[-1][1]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for param, twin in self.twins:
            twin.grad = None if param.grad is None else local(param.grad)
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param, _ in self.twins:
            param.grad = None


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in RIVALS:
        sys.exit(
            f"usage: rivals.py {{{','.join(RIVALS)}}} [flags of pretrain_llama.py]"
        )
    pretrain_llama.build_optimizer = lambda model, settings: Pair(
        model, RIVALS[name], settings
    )
    pretrain_llama.Run.save = lambda run: None
    print(f"{name} takes AdamW's place for the hidden matrices", flush=True)
    pretrain_llama.main(["--optimizer", "adamw", *sys.argv[2:]])


if __name__ == "__main__":
    main()
