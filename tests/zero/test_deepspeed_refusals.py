"""How DeepSpeed finds the optimizers, and what is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.stand_ins import as_if_of
from support.zero_cells import Cell, advance, build, start_deepspeed

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag
from sharded_adadiag.testing.ranks import run_processes
from sharded_adadiag.zero import partitions as zero

# With a version: examples/deepspeed, if on the path, passes for a package without one.
pytest.importorskip(
    "deepspeed", minversion="0.19", reason="the extra [deepspeed] is not installed"
)


def attempt(
    cell: Cell, deepspeed: Any, poke: Callable[[Any, Any], None] | None = None
) -> str:
    try:
        model, engine = build(cell, deepspeed)
        if poke:
            poke(model, engine)
        advance(engine, cell, range(2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@torch.no_grad()
def spoil(model: Any, engine: Any) -> None:
    if torch.distributed.get_rank() == 0:
        model.up.weight.add_(1.0)


def attempts(rank: int) -> dict[str, str]:
    deepspeed = start_deepspeed(rank, 2)
    low = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    before_step = Cell("", 3)
    return {
        "elastic": attempt(Cell("", 1, zero={"elastic_checkpoint": True}), deepspeed),
        "low precision": attempt(Cell("", 2, low), deepspeed),
        "other weights": attempt(Cell("", 2), deepspeed, spoil),
        "exclude": attempt(Cell("", 2, options={"exclude": ["*.no"]}), deepspeed),
        "option": attempt(Cell("", 2, options={"foo": 1}), deepspeed),
        "before a step": attempt(
            before_step, deepspeed, lambda m, e: e.optimizer.optimizer.describe()
        ),
        "excluded": rotated(
            Cell("", 2, options={"exclude": ["up.*"]}, model={"experts": True}),
            deepspeed,
        ),
        "told by name": rotated(Cell("", 1, model={"experts": True}), deepspeed),
        "planned": attempt(Cell("", 1), deepspeed, edit("sides", "two", rank)),
        "steering": attempt(Cell("", 3), deepspeed, edit("refresh_every", 2, rank)),
        "live": attempt(Cell("", 3), deepspeed, edit("weight_decay", 0.0, 0)),
    }


def edit(option: str, value: Any, rank: int) -> Callable[[Any, Any], None]:
    """An edit after the first step, on rank 0 only or on all."""

    def poke(model: Any, engine: Any) -> None:
        advance(engine, Cell("", 0), range(1))
        if rank == 0:
            for group in engine.optimizer.optimizer.param_groups:
                group[option] = value

    return poke


def rotated(cell: Cell, deepspeed: Any) -> str:
    _, engine = build(cell, deepspeed)
    return ",".join(m.name for m in engine.optimizer.optimizer.describe().matrices)


@pytest.mark.multiprocess
def test_what_cannot_work_is_refused_by_name_on_every_rank():
    for said in run_processes(2, attempts):
        assert '"elastic_checkpoint" cuts states' in said["elastic"]
        # This one DeepSpeed refuses itself, before the optimizer is asked.
        assert "Master weights feature requires" in said["low precision"]
        assert "rank 0: up.weight: DeepSpeed's master weights" in said["other weights"]
        assert "the pattern '*.no' matches none" in said["exclude"]
        assert "AdaDiag has no option 'foo'" in said["option"]
        assert "make a step first" in said["before a step"]
        assert said["excluded"] == "down.weight"
        assert said["told by name"] == "up.weight,down.weight"
        assert "rank 0: " in said["planned"] and "'one' to 'two'" in said["planned"]
        assert "refresh_every is 2 on rank 0 and 3 on rank 1" in said["steering"]
        assert said["live"] == "no error"


class Wrapper:
    """Stands for an optimizer of DeepSpeed with a setting."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__ |= settings

    def step(self, flat: torch.Tensor) -> None:
        zero._refuse_settings(flat)


def test_settings_of_the_caller_are_refused_with_the_remedy(monkeypatch):
    module = "deepspeed.runtime.zero.stage3"
    monkeypatch.setattr(Wrapper, "__module__", module)
    monkeypatch.setattr(Wrapper, "step", as_if_of(module, Wrapper.step))
    Wrapper().step(torch.ones(3))
    with pytest.raises(NotImplementedError, match=r'NVMe.*"device": "cpu"'):
        Wrapper(swap_optimizer=True).step(torch.ones(3))
    with pytest.raises(NotImplementedError, match=r"float32 ones: remove bf16_master"):
        Wrapper().step(torch.ones(3, dtype=torch.bfloat16))


def test_the_import_registers_the_optimizers_under_torch_optim():
    for optimizer in (AdaDiag, AdafacDiag, HfacDiag):
        assert getattr(torch.optim, optimizer.__name__) is optimizer


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


LOAD = "import torch, sharded_adadiag_autoload as a; a.load(); "
ASK = """import sys
print('sharded_adadiag' in sys.modules, hasattr(torch.optim, 'AdaDiag'))"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("value,loaded", [("1", True), ("0", False)])
def test_an_environment_variable_asks_for_the_import(value, loaded):
    done = python(LOAD + ASK, SHARDED_ADADIAG_AUTOLOAD=value)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(loaded)] * 2


@pytest.mark.multiprocess
def test_a_package_that_cannot_be_imported_does_not_break_torch():
    broken = "import sys; sys.modules['sharded_adadiag'] = None; "
    done = python(broken + LOAD + "print('torch works')", SHARDED_ADADIAG_AUTOLOAD="1")
    assert done.stdout == "torch works\n" and done.returncode == 0
    assert "sharded_adadiag was not loaded" in done.stderr
