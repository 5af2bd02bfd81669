"""Pretrains a LLaMA with DeepSpeed and the optimizer that its config file names.

    cd examples/deepspeed
    deepspeed --num_gpus 2 pretrain_llama.py --deepspeed_config ds_config_stage3.json
    torchrun --standalone --nproc-per-node=2 pretrain_llama.py \
        --deepspeed_config ds_config_stage2.json --model 60m --data c4

Without a GPU both run on the CPU. All that the optimizer needs of this script is
`import sharded_adadiag`, which makes its name known; started as

    deepspeed --num_gpus 2 --module sharded_adadiag.run pretrain_llama.py ...

a script needs not even that. Text, model, metrics and flags are those of
examples/pretrain_llama.py, but for the flags that the config file decides (optimizer,
learning rate, batch, precision). `--run-dir DIR --resume` continues from the newest
checkpoint of DIR, on as many ranks with the same numbers, bit for bit.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
import ranks
import starting
from batches import Batches, BatchShape, prepare_data, validation_batches
from llama import build_model, token_loss, validation_loss
from metrics import Line, Metrics, Stopwatch
from settings import Settings
from summary import report
from torch import Tensor

import sharded_adadiag  # noqa: F401 - makes "AdaDiag" known to DeepSpeed


@dataclasses.dataclass
class Run:
    """Everything a step needs."""

    settings: Settings
    ranks: ranks.Ranks
    folder: Path
    data_key: str
    batches: Batches
    validation: list[Tensor]
    engine: Any
    step: int = 0  # finished steps

    @property
    def checkpoints(self) -> str:
        return str(self.folder / "checkpoints")

    def save(self) -> None:
        rest = {
            "step": self.step,
            "settings": dataclasses.asdict(self.settings),
            "data_key": self.data_key,
            "batches": self.batches.state_dict(),
        }
        self.engine.save_checkpoint(
            self.checkpoints, tag=f"step-{self.step}", client_state=rest
        )

    def resume(self) -> None:
        """Continues from the newest checkpoint of the run's folder, if it has one."""
        found, rest = None, {}
        if Path(self.checkpoints, "latest").exists():
            found, rest = self.engine.load_checkpoint(self.checkpoints)
        if found is None:
            self.ranks.say(f"no checkpoint in {self.folder}: starting from step 0")
            return
        differences = self.settings.differences(rest["settings"])
        if rest["data_key"] != self.data_key:
            differences.append("the text or its tokenizer is another")
        if differences:
            raise ValueError(f"--resume: not the run of {found}: {differences}")
        self.batches.load_state_dict(rest["batches"])
        self.step = rest["step"]
        self.ranks.say(f"continuing from {found}")


def choose_folder(settings: Settings, here: ranks.Ranks) -> Path:
    if settings.run_dir is None:
        now = time.strftime("%Y%m%d-%H%M%S")
        return Path(here.agree(f"runs/{settings.model}-deepspeed-{now}"))
    folder = Path(settings.run_dir)
    if not settings.resume and (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"--run-dir {folder} holds a run already; give --resume to continue it,"
            " or another folder"
        )
    return folder


def build_run(config: Path, settings: Settings, here: ranks.Ranks) -> Run:
    folder = choose_folder(settings, here)
    model = build_model(settings)
    num_parameters = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=str(config)
    )
    settings = dataclasses.replace(
        settings,
        batch=engine.train_batch_size(),
        micro_batch=engine.train_micro_batch_size_per_gpu(),
    )
    shape = BatchShape(settings.batch, settings.sequence, here.rank, here.world_size)
    here.say(f"text: {settings.data} (tokens kept in {settings.cache_dir})")
    corpus, batches = prepare_data(settings, here, shape)
    here.say(
        f"LLaMA {settings.model}: {num_parameters:,} parameters,"
        f" {engine.optimizer_name()}, ZeRO stage {engine.zero_optimization_stage()},"
        f" world size {here.world_size} on {here.device.type}; writing to {folder}"
    )
    run = Run(
        settings=settings,
        ranks=here,
        folder=folder,
        data_key=corpus.key,
        batches=batches,
        validation=validation_batches(
            corpus.tokens("val"), shape, settings.val_batches
        ),
        engine=engine,
    )
    if settings.resume:
        run.resume()
    return run


def train_step(run: Run, watch: Stopwatch) -> float:
    """One update; returns this rank's loss before it."""
    engine = run.engine
    chunks = run.batches.get(run.step).to(run.ranks.device)
    chunks = chunks.split(run.settings.micro_batch)
    total = 0.0
    for chunk in chunks:
        loss = token_loss(engine, chunk, reduction="mean")
        engine.backward(loss)
        with watch.optimizer():
            engine.step()  # updates, and zeroes gradients, after the last chunk only
        total += loss.item() / len(chunks)
    run.step += 1
    return total


def train(run: Run, metrics: Metrics | None) -> None:
    settings, here = run.settings, run.ranks
    watch = Stopwatch(here.device)
    batch_tokens = settings.batch * settings.sequence
    while run.step < settings.steps:
        lr = run.engine.get_lr()[0]
        with watch.step(batch_tokens):
            (loss,) = here.sum(train_step(run, watch) / here.world_size)
        last = run.step == settings.steps
        val_loss = None
        if last or run.step % settings.val_every == 0:
            val_loss = validation_loss(
                run.engine,
                run.validation,
                micro_batch=settings.micro_batch,
                ranks=here,
            )
        if last or val_loss is not None or run.step % settings.log_every == 0:
            line = Line.measured(
                watch,
                step=run.step,
                loss=loss,
                lr=lr,
                tokens=run.step * batch_tokens,
                val_loss=val_loss,
            )
            if metrics:
                metrics.write(line)
        if metrics:
            metrics.advance()
        if last or (settings.save_every and run.step % settings.save_every == 0):
            run.save()


def main(argv: Sequence[str] | None = None) -> None:
    config, settings = starting.read_arguments(argv)
    if settings.data != "c4":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        here = ranks.start(starting.prepare(), timeout_s=settings.timeout_s)
        run = build_run(config, settings, here)
        metrics = None
        if here.rank == 0:
            steps = settings.steps
            metrics = Metrics(run.folder, first_step=run.step, steps=steps)
        train(run, metrics)
        if metrics:
            metrics.close()
            name = run.engine.optimizer_name()
            report(
                run.folder,
                title=f"LLaMA {settings.model}, {name}",
                checkpoint=f"{run.checkpoints}/step-{run.step}",
            )
    except Exception:
        traceback.print_exc()
        ranks.leave(1, together=False)
    ranks.leave(0, together=True)


if __name__ == "__main__":
    main()
