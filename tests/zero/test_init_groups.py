"""A model built under ``deepspeed.zero.Init`` is sorted by the shapes it hides."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support.zero_cells import BATCH, OPTIONS, Cell, Model, advance, start_deepspeed

from sharded_adadiag import AdaDiag, param_groups
from sharded_adadiag.testing.ranks import run_processes

# With a version: examples/deepspeed, if on the path, passes for a package without one.
pytest.importorskip(
    "deepspeed", minversion="0.19", reason="the extra [deepspeed] is not installed"
)


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def sorted_model(model: Model) -> tuple[list[Any], list[str]]:
    """Names by group, and the report."""
    logger, kept = logging.getLogger("sharded_adadiag"), Kept()
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    groups = param_groups(model)
    logger.removeHandler(kept)
    names = [(g["rotate"], [name for name, _ in g["params"]]) for g in groups]
    return names, kept.messages


def emptied(rank: int) -> dict[str, Any]:
    deepspeed = start_deepspeed(rank, 2)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // 2,
        "zero_optimization": {"stage": 3},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Model()
    found = {"emptied": model.up.weight.numel() == 0, "as it is": sorted_model(model)}
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found["gathered"] = sorted_model(model)
    found["plain"] = sorted_model(Model())
    opt = AdaDiag(param_groups(model), **OPTIONS)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=opt)
    advance(engine, Cell("", 3), range(2))
    found["rotated"] = {m.name for m in opt.describe().matrices}
    return found


@pytest.mark.multiprocess
def test_param_groups_sees_through_zero_init():
    for found in run_processes(2, emptied):
        assert found["emptied"]
        assert found["as it is"] == found["gathered"] == found["plain"]
        assert found["as it is"][0][0] == (True, ["up.weight", "down.weight"])
        assert found["rotated"] == {"up.weight", "down.weight"}
