"""What a run tells while it runs: JSON lines, TensorBoard, progress bar."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Stopwatch:
    """Time and tokens since the last line of metrics.

    GPU kernels run behind the program, so the times are taken after waiting for
    them; the program waits for the loss of each step anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        self._tokens = 0
        self._step_seconds = 0.0
        self._optimizer_seconds = 0.0

    @contextmanager
    def step(self, tokens: int) -> Generator[None]:
        started = self._now()
        yield
        self._step_seconds += self._now() - started
        self._tokens += tokens

    @contextmanager
    def optimizer(self) -> Generator[None]:
        """Inside step()."""
        started = self._now()
        yield
        self._optimizer_seconds += self._now() - started

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._step_seconds

    @property
    def optimizer_share(self) -> float:
        return self._optimizer_seconds / self._step_seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of metrics.jsonl."""

    step: int  # finished steps
    loss: float  # nats per token, of the batch of this step, before its update
    lr: float  # of this step's update
    tokens: int  # seen so far, over all ranks
    tokens_per_s: float  # over all ranks, since the last line
    optimizer_share: float  # of the time of a step spent in optimizer.step()
    val_loss: float | None = None
    val_ppl: float | None = None

    @classmethod
    def measured(
        cls,
        watch: Stopwatch,
        *,
        step: int,
        loss: float,
        lr: float,
        tokens: int,
        val_loss: float | None,
    ) -> Line:
        """A line with the watch's times, which start anew."""
        line = cls(
            step=step,
            loss=loss,
            lr=lr,
            tokens=tokens,
            tokens_per_s=watch.tokens_per_s,
            optimizer_share=watch.optimizer_share,
            val_loss=val_loss,
            val_ppl=None if val_loss is None else math.exp(val_loss),
        )
        watch.reset()
        return line


class Metrics:
    """Writes the metrics of a run; made on rank 0 only."""

    def __init__(self, run_dir: Path, *, first_step: int, steps: int) -> None:
        # Imported here because the other ranks have no use for them, and they are slow.
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"
        drop_lines_after(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)
        # In a log file the bar cannot redraw itself: one line in a while is enough.
        interval = 0.2 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
        )

    def write(self, line: Line) -> None:
        values = dataclasses.asdict(line)
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        for name, value in values.items():
            if name not in {"step", "tokens"} and value is not None:
                self._board.add_scalar(name, value, line.step)
        self._bar.set_postfix(
            loss=f"{line.loss:.3f}",
            tok_s=f"{line.tokens_per_s:.0f}",
            lr=f"{line.lr:.2e}",
            opt=f"{line.optimizer_share:.0%}",
            refresh=False,
        )

    def advance(self) -> None:
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last one cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def drop_lines_after(path: Path, step: int) -> None:
    """Forgets what a run wrote after the checkpoint it now continues from."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    temporary = path.with_suffix(".writing")
    temporary.write_text(
        "".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8"
    )
    os.replace(temporary, path)
