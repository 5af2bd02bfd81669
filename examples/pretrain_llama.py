"""Pretrains a LLaMA with FSDP2 and an optimizer of sharded_adadiag.

    torchrun --standalone --nproc-per-node=2 examples/pretrain_llama.py
    torchrun --standalone --nproc-per-node=8 examples/pretrain_llama.py \
        --model 60m --data c4 --precision bf16 --optimizer adadiag --compare adamw

Checkpoints are written while training goes on; Ctrl-C and SIGTERM leave one too.
`--run-dir DIR --resume` continues from the newest one of DIR, or starts if there is
none: the same command restarts a run that crashed. On as many ranks the numbers are
the same to the bit, on another number to rounding. Read in order: settings.py (flags),
corpus.py and batches.py (data), llama.py (model), checkpoints.py, summary.py (plots),
this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import checkpoints
import ranks
import torch
from batches import Batches, BatchShape, prepare_data, validation_batches
from llama import backward, build_model, shard, validation_loss
from metrics import Line, Metrics, Stopwatch
from optimizers import adamw_bytes, build_optimizer, build_schedule, state_bytes
from settings import Settings, parse
from summary import Curve, Ending, report, report_comparison
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.optim.lr_scheduler import LambdaLR

USAGE = 2  # exit code after wrong flags


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
    saver: checkpoints.Saver
    step: int = 0  # finished steps

    def save(self) -> None:
        """Starts to write a checkpoint of the finished steps."""
        here = self.ranks
        rest = {
            "settings": dataclasses.asdict(self.settings),
            "data_key": self.data_key,
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state_dict(),
            "random": here.collect(checkpoints.random_state(here.device)),
        }
        self.saver.save(self.step, self.model, self.optimizer, rest)

    def resume(self) -> None:
        """Continues from the newest checkpoint of the run's folder, if it has one."""
        here = self.ranks
        found = here.agree(str(checkpoints.newest(self.folder) or ""))
        if not found:
            here.say(f"no checkpoint in {self.folder}: starting from step 0")
            return
        checkpoint = Path(found)
        rest = checkpoints.read_run(checkpoint)
        differences = self.settings.differences(rest["settings"])
        if rest["data_key"] != self.data_key:
            differences.append("the text or its tokenizer is another")
        if differences:
            raise ValueError(
                f"--resume: not the run of {checkpoint}: " + "; ".join(differences)
            )
        self.saver.load(checkpoint, self.model, self.optimizer)
        self.schedule.load_state_dict(rest["schedule"])
        self.batches.load_state_dict(rest["batches"])
        self.step = checkpoints.step_of(checkpoint)
        checkpoints.restore_random(
            rest["random"],
            rank=here.rank,
            seed=[self.settings.seed, self.step],
            device=here.device,
        )
        here.say(f"continuing from {checkpoint}")
        written_by = len(rest["random"])
        if written_by != here.world_size:
            here.say(
                f"{written_by} ranks wrote it, {here.world_size} go on: the same"
                " batches and schedule, but sums in another order; a new rank's random"
                " numbers are seeded from --seed, the step and the rank"
            )


def choose_folder(settings: Settings, here: ranks.Ranks) -> Path:
    if settings.run_dir is None:
        now = time.strftime("%Y%m%d-%H%M%S")
        name = f"runs/{settings.model}-{settings.optimizer}-{now}"
        return Path(here.agree(name))  # clocks differ between machines
    folder = Path(settings.run_dir)
    used = (folder / "metrics.jsonl").exists() or checkpoints.newest(folder)
    if not settings.resume and used:
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
        saver=checkpoints.Saver(
            folder, here, keep_last=settings.keep_last, timeout_s=settings.timeout_s
        ),
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
            # A signal, or the failure of a checkpoint, reaches the ranks at different
            # moments: they agree here, and all stop after the same step.
            loss, stopping, failed = here.sum(
                loss / here.world_size, bool(stop), run.saver.failed
            )
        if failed:
            run.saver.raise_failure()
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
        if last or stopping or _due(run.step, settings.save_every):
            run.save()
        if stopping:
            break
    run.saver.wait()
    return run.step < settings.steps


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def run_to_end(run: Run, stop: ranks.StopRequest) -> Ending | None:
    """Trains and reports; None if it was asked to stop."""
    here, settings = run.ranks, run.settings
    stop.listen()
    metrics = None
    if here.rank == 0:
        metrics = Metrics(run.folder, first_step=run.step, steps=settings.steps)
    try:
        interrupted = train(run, stop, metrics)
    except Exception:
        run.saver.settle()  # what is being written may become a whole checkpoint
        raise
    if metrics:
        metrics.close()
    if interrupted:
        return None
    kept, adamw = here.sum(state_bytes(run.optimizer), adamw_bytes(run.model))
    every = settings.refresh_every if settings.rotates else None
    name = f"{settings.optimizer}, lr {settings.lr:g}"
    ending = Ending(
        curve=Curve.read(name, run.folder, every),
        state_bytes=int(kept),
        adamw_bytes=int(adamw),
    )
    if here.rank == 0:
        report(
            run.folder,
            title=f"LLaMA {settings.model}, {settings.optimizer}",
            checkpoint=checkpoints.newest(run.folder),
            ending=ending,
        )
    return ending


@record  # torchrun's summary then shows the exception
def carry_out(settings: Settings, here: ranks.Ranks) -> int:
    """Trains, then the optimizer to compare with, if any; returns the exit code."""
    stop = ranks.StopRequest()
    waiting, endings = [settings], list[Ending]()
    folder = None
    while waiting:
        run = start_run(waiting.pop(), here)
        if run is None:
            return USAGE
        if folder is None:
            folder = run.folder
            waiting = [settings.compared(folder)] if settings.compare else []
        ending = run_to_end(run, stop)
        if ending is None:
            here.say(
                f"stopped after step {run.step}; continue with the same flags and"
                f" --run-dir {folder} --resume"
            )
            return ranks.INTERRUPTED
        endings.append(ending)
        del run  # the first model and its states go before the second are made
    if len(endings) > 1 and folder and here.rank == 0:
        where = f"{here.world_size} ranks on {here.device.type}"
        report_comparison(folder, endings, title=f"LLaMA {settings.model}, {where}")
    return 0


def start_run(settings: Settings, here: ranks.Ranks) -> Run | None:
    """The run of the flags, or None after saying what is wrong with them."""
    try:
        return build_run(settings, here)
    except ValueError as error:
        complain(error)
        return None


def read_flags(argv: Sequence[str] | None) -> Settings | None:
    """What the flags say, or None after saying what is wrong with them."""
    try:
        with contextlib.ExitStack() as muted:
            if not speaks():
                nowhere = muted.enter_context(Path(os.devnull).open("w"))
                muted.enter_context(contextlib.redirect_stdout(nowhere))
                muted.enter_context(contextlib.redirect_stderr(nowhere))
            return parse(argv)
    except ValueError as error:
        complain(error)
        return None


def speaks() -> bool:
    """Whether this rank tells what all find: the first of a machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def complain(error: ValueError) -> None:
    if speaks():
        print(f"pretrain_llama.py: error: {error}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    together = False  # after an error the other ranks are elsewhere: do not wait
    try:
        settings, code = read_flags(argv), USAGE
        if settings:
            if settings.data != "c4":
                os.environ.setdefault("HF_HUB_OFFLINE", "1")
            here = ranks.start(settings.device, timeout_s=settings.timeout_s)
            code = carry_out(settings, here)
            together = code != USAGE
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
