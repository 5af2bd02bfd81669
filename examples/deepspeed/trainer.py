"""Trains the same LLaMA with Hugging Face's Trainer and the same config files.

    deepspeed --num_gpus 2 trainer.py --deepspeed_config ds_config_stage3.json
    torchrun --standalone --nproc-per-node=2 trainer.py \
        --deepspeed_config ds_config_stage2.json --model tiny --steps 20

The optimizer and its schedule come from the config file, as always when that has them:
of the Trainer's own flags only those are set that must agree with the file. Nothing is
fetched from the network.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ranks
import starting
import torch
from accelerate import DistributedType, PartialState
from corpus import prepare_files
from llama import build_model
from settings import Settings
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import sharded_adadiag  # noqa: F401 - makes "AdaDiag" known to DeepSpeed


class Windows(Dataset):
    """Consecutive windows of a token array, as the model takes them."""

    def __init__(self, tokens: Any, sequence: int) -> None:
        count = len(tokens) // sequence
        self.rows = torch.from_numpy(tokens[: count * sequence].astype("int64"))
        self.rows = self.rows.view(count, sequence)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def deepspeed_on_cpu() -> dict[str, Any]:
    """Arguments for training without a GPU.

    Accelerate 1.15 has no DeepSpeed there: on a CPU it either ignores it, or takes
    every rank for the only one. So the ranks are joined here, and it is told.
    """
    state = PartialState(cpu=True, backend="gloo")
    state.distributed_type = DistributedType.DEEPSPEED
    return {"use_cpu": True, "accelerator_config": {"use_configured_state": True}}


def training_arguments(
    config: Path, settings: Settings, device: str
) -> TrainingArguments:
    content = json.loads(config.read_text())
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return TrainingArguments(
        output_dir=settings.run_dir or "runs/trainer",
        deepspeed=str(config),
        per_device_train_batch_size=content["train_batch_size"] // world_size,
        learning_rate=content["optimizer"]["params"]["lr"],
        max_grad_norm=content["gradient_clipping"],
        warmup_steps=content["scheduler"]["params"]["warmup_num_steps"],
        bf16=content["bf16"]["enabled"],
        max_steps=settings.steps,
        logging_steps=settings.log_every,
        save_steps=settings.save_every or settings.steps,
        seed=settings.seed,
        report_to="none",
        **(deepspeed_on_cpu() if device == "cpu" else {}),
    )


def main(argv: Sequence[str] | None = None) -> None:
    config, settings = starting.read_arguments(argv)
    device = starting.prepare()
    arguments = training_arguments(config, settings, device)
    with arguments.main_process_first():
        corpus = prepare_files(
            settings.data,
            vocab=settings.vocab,
            cache_dir=settings.cache_dir,
            max_mb=settings.max_mb,
            build=True,
        )
    trainer = Trainer(
        model=build_model(settings),
        args=arguments,
        train_dataset=Windows(corpus.tokens("train"), settings.sequence),
        eval_dataset=Windows(corpus.tokens("val"), settings.sequence),
    )
    trainer.train(resume_from_checkpoint=settings.resume or None)
    trainer.evaluate()
    trainer.save_state()
    engine = trainer.model_wrapped
    if trainer.is_world_process_zero():
        print(
            f"{engine.optimizer_name()}, ZeRO stage {engine.zero_optimization_stage()},"
            f" world size {engine.world_size}: {trainer.state.log_history[-1]}"
        )
    ranks.leave(0, together=True)


if __name__ == "__main__":
    main()
