"""torchtitan's container of optimizers, which learns the name AdaDiag.

python with_torchtitan.py EPOCHS FILE to save to [FILE to go on from]
"""

import sys
from dataclasses import dataclass

import tiny
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from sharded_adadiag import AdaDiag


class Container(OptimizersContainer):
    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """What torchtitan's Trainer.Config takes as its optimizer."""

    _resolve_optimizer_factory = staticmethod({"AdaDiag": AdaDiag}.__getitem__)


def group(pattern: str, **kwargs) -> ParamGroupConfig:
    kwargs = {"optimizer_kwargs": {"lr": 1e-2, "refresh_every": 10, **kwargs}}
    return ParamGroupConfig(pattern=pattern, optimizer_name="AdaDiag", **kwargs)


def train(epochs: int, target: str, source: str | None = None):
    groups = [group("embed|lm_head", rotate=False), group(".")]
    model = tiny.llama()
    optimizer = Container.Config(param_groups=groups).build(model_parts=[model])
    if source:
        tiny.load(source, model, optimizer)
    tiny.train(model, optimizer, epochs)
    tiny.save(target, model, optimizer)
    return model, optimizer


if __name__ == "__main__":
    train(int(sys.argv[1]), *sys.argv[2:])
