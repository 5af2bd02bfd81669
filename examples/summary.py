"""What a run says when it has ended: its plot, its closing lines, and a comparison."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from metrics import read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One for each curve of a plot, in order.
_COLOURS = ("tab:blue", "tab:orange", "tab:green")


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run as it is drawn: one value per line of its metrics."""

    name: str
    lines: list[dict[str, Any]]
    refresh_every: int | None  # steps between two bases; None if it has none

    @classmethod
    def read(cls, name: str, run_dir: Path, refresh_every: int | None = None) -> Curve:
        return cls(name, read_lines(run_dir / "metrics.jsonl"), refresh_every)

    def seconds(self) -> list[float]:
        """Seconds of training up to each line, without validation and checkpoints."""
        return list(itertools.accumulate(self._durations()))

    def optimizer_share(self) -> float:
        """Of all the seconds of training, those in optimizer.step()."""
        durations = self._durations()
        shares = [line["optimizer_share"] for line in self.lines]
        return sum(s * d for s, d in zip(shares, durations)) / sum(durations)

    def refreshes(self) -> list[int]:
        """The steps that make new bases."""
        if self.refresh_every is None:
            return []
        return list(range(1, self.lines[-1]["step"] + 1, self.refresh_every))

    def validated(self) -> list[int]:
        """The lines with a validation loss, by their place."""
        return [i for i, line in enumerate(self.lines) if line["val_loss"] is not None]

    def _durations(self) -> list[float]:
        tokens = [0, *(line["tokens"] for line in self.lines)]
        new = [after - before for before, after in itertools.pairwise(tokens)]
        return [n / line["tokens_per_s"] for n, line in zip(new, self.lines)]


def plot_losses(path: Path, curves: Sequence[Curve], *, title: str) -> Path:
    """Draws the losses over steps and over seconds; returns the file."""
    # A Figure without pyplot needs no display and leaves no global state behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for curve, colour in zip(curves, itertools.cycle(_COLOURS)):
        steps = [line["step"] for line in curve.lines]
        _draw(by_step, curve, steps, colour)
        _draw(by_time, curve, curve.seconds(), colour)
    by_step.set_xlabel("step")
    by_step.set_ylabel("loss (nats per token)")
    by_time.set_xlabel("seconds of training (without validation and checkpoints)")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    by_step.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    return path


def _draw(axes: Axes, curve: Curve, x: Sequence[float], colour: str) -> None:
    losses = [line["loss"] for line in curve.lines]
    axes.plot(
        x,
        losses,
        color=colour,
        linewidth=0.8,
        alpha=0.5,
        label=f"{curve.name}, training (one batch)",
    )
    validated = curve.validated()
    axes.plot(
        [x[i] for i in validated],
        [curve.lines[i]["val_loss"] for i in validated],
        color=colour,
        linewidth=1.6,
        marker="o",
        markersize=4,
        label=f"{curve.name}, validation",
    )
    refreshes = curve.refreshes()
    if refreshes:
        # Just above the axis: a mark on the curve would hide it.
        axes.plot(
            np.interp(refreshes, [line["step"] for line in curve.lines], x),
            [0.02] * len(refreshes),
            transform=axes.get_xaxis_transform(),
            color=colour,
            linestyle="none",
            marker="|",
            markersize=8,
            label=f"{curve.name}, new bases",
        )


@dataclasses.dataclass(frozen=True)
class Ending:
    """What is known of a run when it has ended."""

    curve: Curve
    state_bytes: int  # over all ranks
    adamw_bytes: int  # what AdamW keeps for the same parameters: two of each

    def describe_optimizer(self) -> str:
        """Its share of the time and its states."""
        return (
            f"{self.curve.optimizer_share():.1%} of the time of training; states"
            f" {megabytes(self.state_bytes)} over all ranks, AdamW's"
            f" {megabytes(self.adamw_bytes)}"
            f" (x {self.state_bytes / self.adamw_bytes:.2f})"
        )


def megabytes(number: float) -> str:
    return f"{number / 1e6:.2f} MB"


def report(
    run_dir: Path,
    *,
    title: str,
    checkpoint: Path | str | None,
    ending: Ending | None = None,
) -> None:
    """Draws the plot of a run and says where everything is."""
    curve = ending.curve if ending else Curve.read("loss", run_dir)
    plot = plot_losses(run_dir / "loss.png", [curve], title=title)
    last = curve.lines[-1]
    optimizer = f"optimizer:   {ending.describe_optimizer()}\n" if ending else ""
    print(
        f"validation loss {last['val_loss']:.4f}, perplexity {last['val_ppl']:.2f}"
        f" after {last['step']} steps\n"
        f"{optimizer}"
        f"plot:        {plot}\n"
        f"metrics:     {run_dir / 'metrics.jsonl'}\n"
        f"tensorboard: tensorboard --logdir {run_dir / 'tensorboard'}\n"
        f"checkpoint:  {checkpoint}",
        flush=True,
    )


def report_comparison(run_dir: Path, endings: Sequence[Ending], *, title: str) -> None:
    """Draws runs on the same data in one plot, and prints a line for each."""
    curves = [ending.curve for ending in endings]
    plot = plot_losses(run_dir / "compare.png", curves, title=title)
    width = max(len(curve.name) for curve in curves)
    print(
        f"\n{'':{width}}  validation  perplexity  seconds  in optimizer"
        "        states  beside AdamW"
    )
    for ending in endings:
        curve, last = ending.curve, ending.curve.lines[-1]
        print(
            f"{curve.name:{width}}  {last['val_loss']:10.4f}  {last['val_ppl']:10.2f}"
            f"  {curve.seconds()[-1]:7.1f}  {curve.optimizer_share():12.1%}"
            f"  {megabytes(ending.state_bytes):>12}"
            f"  {'x':>8} {ending.state_bytes / ending.adamw_bytes:.2f}"
        )
    print(f"comparison:  {plot}", flush=True)
