"""Pretrains a LLaMA with FSDP2 and an optimizer of sharded_adadiag.

    torchrun --standalone --nproc-per-node=2 examples/pretrain_llama.py
    torchrun --standalone --nproc-per-node=8 examples/pretrain_llama.py \
        --model 60m --data c4 --precision bf16 --optimizer adadiag

Ctrl-C and SIGTERM leave a checkpoint; `--run-dir DIR --resume` continues from the
newest one, on the same number of ranks and with the same numbers. Read in order:
settings.py (flags), corpus.py and batches.py (data), llama.py (model), this file.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import checkpoints
import ranks
import torch
from batches import (
    Batches,
    BatchShape,
    StreamBatches,
    WindowBatches,
    validation_batches,
)
from c4 import open_c4, prepare_c4
from corpus import Corpus, prepare_files
from llama import backward, build_model, shard, validation_loss
from metrics import Line, Metrics, Stopwatch, plot_losses, read_lines
from optimizers import build_optimizer, build_schedule
from settings import Settings, parse
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


@dataclasses.dataclass
class Run:
    """Everything a step needs."""

    settings: Settings
    ranks: ranks.Ranks
    folder: Path
    data_key: str
    batches: Batches
    validation: list[Tensor]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    step: int = 0  # finished steps

    def state_dict(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        return {
            "settings": dataclasses.asdict(self.settings),
            "data_key": self.data_key,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state_dict(),
            "random": random,
        }

    def save(self) -> Path:
        return checkpoints.save(
            self.folder,
            self.step,
            self.state_dict(),
            ranks=self.ranks,
            keep_last=self.settings.keep_last,
        )

    def resume(self) -> None:
        """Continues from the newest checkpoint of the run's folder."""
        checkpoint = checkpoints.newest(self.folder)
        if checkpoint is None:
            raise ValueError(f"--resume: no checkpoint in {self.folder}/checkpoints")
        state = checkpoints.load(checkpoint, ranks=self.ranks)
        differences = self.settings.differences(state["settings"])
        if state["data_key"] != self.data_key:
            differences.append("the text or its tokenizer is another")
        if differences:
            raise ValueError(
                f"--resume: not the run of {checkpoint}: " + "; ".join(differences)
            )
        checkpoints.load_weights(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"])
        self.step = checkpoints.step_of(checkpoint)
        self.ranks.say(f"continuing from {checkpoint}")


def prepare_data(
    settings: Settings, here: ranks.Ranks, shape: BatchShape
) -> tuple[Corpus, Batches]:
    """The corpus, tokenized by the first process of each machine if need be."""

    def prepare(*, build: bool) -> Corpus:
        if settings.data == "c4":
            windows = settings.val_batches * settings.batch
            return prepare_c4(
                vocab=settings.vocab,
                cache_dir=settings.cache_dir,
                val_tokens=windows * settings.sequence + 1,
                build=build,
            )
        return prepare_files(
            settings.data,
            vocab=settings.vocab,
            cache_dir=settings.cache_dir,
            max_mb=settings.max_mb,
            build=build,
        )

    if here.local_rank == 0:
        prepare(build=True)
    here.wait()
    corpus = prepare(build=False)
    if settings.data == "c4":
        texts = open_c4("train")
        return corpus, StreamBatches(texts, corpus.tokenizer(), shape, here)
    return corpus, WindowBatches(corpus.tokens("train"), shape, seed=settings.seed)


def choose_folder(settings: Settings, here: ranks.Ranks) -> Path:
    if settings.run_dir is None:
        now = time.strftime("%Y%m%d-%H%M%S")
        name = f"runs/{settings.model}-{settings.optimizer}-{now}"
        return Path(here.agree(name))  # clocks differ between machines
    folder = Path(settings.run_dir)
    if not settings.resume and (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"--run-dir {folder} holds a run already; give --resume to continue it,"
            " or another folder"
        )
    return folder


def build_run(settings: Settings, here: ranks.Ranks) -> Run:
    folder = choose_folder(settings, here)
    here.wait()  # nobody writes to the folder before all have looked at it
    shape = BatchShape(settings.batch, settings.sequence, here.rank, here.world_size)
    here.say(f"text: {settings.data} (tokens kept in {settings.cache_dir})")
    corpus, batches = prepare_data(settings, here, shape)
    validation = validation_batches(corpus.tokens("val"), shape, settings.val_batches)
    model = build_model(settings)
    num_parameters = sum(p.numel() for p in model.parameters())
    shard(model, settings, here)
    optimizer = build_optimizer(model, settings)
    here.say(
        f"LLaMA {settings.model}: {num_parameters:,} parameters, {settings.optimizer},"
        f" world size {here.world_size} on {here.device.type}; writing to {folder}"
    )
    run = Run(
        settings=settings,
        ranks=here,
        folder=folder,
        data_key=corpus.key,
        batches=batches,
        validation=validation,
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, settings),
    )
    if settings.resume:
        run.resume()
    return run


def train_step(run: Run, watch: Stopwatch) -> float:
    """One update; returns this rank's loss before it."""
    settings = run.settings
    tokens = run.batches.get(run.step).to(run.ranks.device)
    loss = backward(run.model, tokens, micro_batch=settings.micro_batch)
    if settings.grad_clip > 0:
        nn.utils.clip_grad_norm_(run.model.parameters(), settings.grad_clip)
    with watch.optimizer():
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.schedule.step()
    run.step += 1
    return loss


def train(run: Run, stop: ranks.StopRequest, metrics: Metrics | None) -> bool:
    """Trains to the end, or until a rank is asked to stop; returns whether it was."""
    settings, here = run.settings, run.ranks
    watch = Stopwatch(here.device)
    batch_tokens = settings.batch * settings.sequence
    while run.step < settings.steps:
        lr = run.schedule.get_last_lr()[0]
        with watch.step(batch_tokens):
            loss = train_step(run, watch)
            # A signal reaches the ranks at different moments: they agree here, and
            # all stop after the same step.
            loss, stopping = here.sum(loss / here.world_size, bool(stop))
        last = run.step == settings.steps
        val_loss = None
        if last or run.step % settings.val_every == 0:
            val_loss = validation_loss(
                run.model,
                run.validation,
                micro_batch=settings.micro_batch,
                ranks=here,
            )
        logged = last or run.step % settings.log_every == 0
        if logged or val_loss is not None or stopping:
            line = Line(
                step=run.step,
                loss=loss,
                lr=lr,
                tokens=run.step * batch_tokens,
                tokens_per_s=watch.tokens_per_s,
                optimizer_share=watch.optimizer_share,
                val_loss=val_loss,
                val_ppl=None if val_loss is None else math.exp(val_loss),
            )
            watch.reset()
            if metrics:
                metrics.write(line)
        if metrics:
            metrics.advance()
        if last or stopping or _due(run.step, settings.save_every):
            run.save()
        if stopping:
            return not last
    return False


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def report(run: Run) -> None:
    """Draws the plot and says where everything is."""
    folder, settings = run.folder, run.settings
    title = f"LLaMA {settings.model}, {settings.optimizer}"
    plot = plot_losses(folder, title=title)
    last = read_lines(folder / "metrics.jsonl")[-1]
    print(
        f"validation loss {last['val_loss']:.4f}, perplexity {last['val_ppl']:.2f}"
        f" after {last['step']} steps\n"
        f"plot:        {plot}\n"
        f"metrics:     {folder / 'metrics.jsonl'}\n"
        f"tensorboard: tensorboard --logdir {folder / 'tensorboard'}\n"
        f"checkpoint:  {checkpoints.newest(folder)}",
        flush=True,
    )


def carry_out(run: Run) -> int:
    """Trains, then reports; returns the exit code."""
    here, settings = run.ranks, run.settings
    stop = ranks.StopRequest()
    stop.listen()
    metrics = None
    if here.rank == 0:
        metrics = Metrics(run.folder, first_step=run.step, steps=settings.steps)
    interrupted = train(run, stop, metrics)
    if metrics:
        metrics.close()
    if interrupted:
        here.say(
            f"stopped after step {run.step}; continue with the same flags and"
            f" --run-dir {run.folder} --resume"
        )
        return ranks.INTERRUPTED
    if here.rank == 0:
        report(run)
    return 0


def set_up(argv: Sequence[str] | None) -> Run | None:
    """The run that the flags ask for, or None after saying what is wrong with them."""
    try:
        settings = parse(argv)
        if settings.data != "c4":
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        here = ranks.start(settings.device, timeout_s=settings.timeout_s)
        return build_run(settings, here)
    except ValueError as error:
        # What the flags cause is found by the first rank of a machine too.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"pretrain_llama.py: error: {error}", file=sys.stderr)
        return None


def main(argv: Sequence[str] | None = None) -> NoReturn:
    together = False  # after an error the other ranks are elsewhere: do not wait
    try:
        run = set_up(argv)
        code = 2 if run is None else carry_out(run)
        together = run is not None
    except KeyboardInterrupt:
        print("stopped before the first step", file=sys.stderr)
        code = ranks.INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        if ranks.lost_contact(error):
            print(ranks.LOST_CONTACT, file=sys.stderr)
        code = 1
    ranks.leave(code, together=together)


if __name__ == "__main__":
    main()
