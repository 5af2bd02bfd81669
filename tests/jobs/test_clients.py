"""The examples for other trainers: a run that is resumed ends as an undisturbed one."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from support.launching import free_port
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_processes

FOLDER = ROOT / "examples" / "clients"
STEPS_PER_EPOCH = 8
MATRICES = 14  # of the tiny LLaMA, head and embedding left out
pytest.importorskip("transformers", reason="the extra [examples] is not installed")


def test_each_example_fits_on_a_page():
    examples = list(FOLDER.glob("with_*.py"))
    assert len(examples) == 5
    for example in examples:
        assert len(example.read_text().splitlines()) <= 40, example.name


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    forget_accelerate()


def forget_accelerate() -> None:
    """Accelerate keeps the state of a process for ever."""
    state = importlib.import_module("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def check(resumed: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    assert list(resumed) == list(whole)
    for name, weight in resumed.items():
        assert_equal(weight, whole[name], name)


def rotated(optimizer: Any) -> list[str]:
    """The names in the groups that are rotated."""
    groups = [group for group in optimizer.param_groups if group["rotate"]]
    return [name for group in groups for name in group["param_names"]]


def by_trainer(module: str, folder: Path, *flags: str) -> Any:
    """The trainer of a run resumed in an epoch, compared with an undisturbed one."""
    main = importlib.import_module(module).main
    half = STEPS_PER_EPOCH + 3
    common = ["--output_dir", str(folder), "--max_steps", str(2 * half), "--use_cpu"]
    common += ["--save_steps", str(half), "--disable_tqdm", "true", *flags]
    whole = main(common)
    resumed = main([*common, "--resume_from_checkpoint", f"{folder}/checkpoint-{half}"])
    for trainer in (whole, resumed):
        assert trainer.state.global_step == 2 * half
    first, last = (whole.state.log_history[i]["loss"] for i in (0, -2))
    assert last < first
    check(weights(resumed.model), weights(whole.model))
    return resumed


def check_names(optimizer: Any) -> None:
    """The names are the model's, and what was excluded is not rotated."""
    names = rotated(optimizer)
    assert names == [row.name for row in optimizer.describe().matrices]
    assert len(names) == MATRICES - 2
    others = ("k_proj", "embed", "lm_head")
    assert not any(part in name for name in names for part in others)


def test_a_trainer_makes_the_optimizer_and_goes_on_as_if_uninterrupted(tmp_path):
    trainer = by_trainer("with_trainer", tmp_path)
    check_names(trainer.optimizer.optimizer)


# Peft asks transformers 5 by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_adapters_of_peft_are_rotated_and_go_on_as_if_uninterrupted(tmp_path):
    pytest.importorskip("peft", reason="the extra [clients] is not installed")
    trainer = by_trainer("with_peft", tmp_path)
    optimizer = trainer.optimizer.optimizer
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * MATRICES
    assert [row.name for row in optimizer.describe().matrices] == trained
    assert set(trained) <= set(rotated(optimizer))


def by_accelerate(folder: Path, again: Callable[[], None]) -> tuple[nn.Module, Any]:
    """Model and optimizer of a resumed run, compared with a whole one."""
    train = importlib.import_module("with_accelerate").train
    whole, _ = train(str(folder), epochs=2)
    again()
    resumed, optimizer = train(str(folder), epochs=2, resume=1)
    check(weights(resumed), weights(whole))
    return resumed, optimizer


def test_accelerate_goes_on_as_if_uninterrupted(tmp_path):
    _, optimizer = by_accelerate(tmp_path, forget_accelerate)
    check_names(optimizer)


def by_lightning(folder: Path, full: bool | None = None) -> None:
    """A whole run and a resumed one, of one process or with FSDP2 of two."""
    example = importlib.import_module("with_lightning")
    strategies = importlib.import_module("lightning.pytorch.strategies")

    def train(name: str, epochs: int, resume: str | None = None) -> Any:
        flags = {"accelerator": "cpu", "log_every_n_steps": 1}
        flags |= {"enable_progress_bar": False, "enable_model_summary": False}
        if full is not None:
            save = {"save_distributed_checkpoint": not full}
            flags |= {
                "devices": 2,
                "strategy": strategies.ModelParallelStrategy(**save),
            }
        return example.train(str(folder / name), epochs, resume=resume, **flags)

    whole, half = train("whole", 2), train("half", 1)
    path = half.checkpoint_callback.best_model_path
    resumed = train("half", 2, resume=path)
    assert resumed.global_step == whole.global_step == 2 * half.global_step
    assert Path(path).is_dir() == (full is False)
    assert len(rotated(resumed.optimizers[0])) == MATRICES
    check(weights(resumed.model), weights(whole.model))


# Lightning 2.6 asks torch by an old name, and wishes for more processes.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_lightning_goes_on_as_if_uninterrupted(tmp_path):
    pytest.importorskip("lightning", reason="the extra [clients] is not installed")
    by_lightning(tmp_path)


def pretend_gpus() -> None:
    """Accelerate 1.15 has FSDP for accelerators only: it is told the ranks are some."""
    accelerate = importlib.import_module("accelerate")
    forget_accelerate()
    state = accelerate.PartialState(cpu=True, backend="gloo")
    state.distributed_type = accelerate.DistributedType.MULTI_GPU


def sharded(rank: int, folder: Path, port: int) -> None:
    """Every client with FSDP2, in processes that torchrun might have started."""
    sys.path.insert(0, str(FOLDER))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    # What accelerate launch --use_fsdp --fsdp_version 2 sets.
    place |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    configured = '{"use_configured_state": true}'
    pretend_gpus()
    trainer = by_trainer(
        "with_trainer", folder / "trainer", "--fsdp", "--accelerator_config", configured
    )
    check_sharded(trainer.model, trainer.optimizer.optimizer)
    pretend_gpus()
    check_sharded(*by_accelerate(folder / "accelerate", pretend_gpus))
    for full in (False, True):
        by_lightning(folder / f"lightning-{full}", full)


def check_sharded(model: nn.Module, optimizer: Any) -> None:
    assert all(isinstance(param, DTensor) for param in model.parameters())
    check_names(optimizer)


@pytest.mark.multiprocess
def test_sharded_with_fsdp2_all_go_on_as_if_uninterrupted(tmp_path):
    """The optimizer is made before accelerate shards, and after Lightning did."""
    pytest.importorskip("lightning", reason="the extra [clients] is not installed")
    run_processes(2, sharded, tmp_path, free_port())
