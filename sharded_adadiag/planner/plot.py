"""The loads of the ranks as a picture."""

from __future__ import annotations

from pathlib import Path

from sharded_adadiag.plan.plan import Plan
from sharded_adadiag.plan.report import state_bytes, step_work
from sharded_adadiag.planner.figures import refresh_work


def plot(plan: Plan, title: str, file: Path) -> None:
    """Draw work of a step, state and work of a refresh of every rank.

    Args:
        plan: The plan.
        title: The picture's title.
        file: Where to write it; the name's end says in which format.

    Raises:
        ValueError: If there is no matplotlib, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    loads = {
        "work of a step\n(multiply-adds)": step_work(plan),
        "state\n(bytes)": state_bytes(plan),
        "work of a refresh\n(multiply-adds)": refresh_work(plan),
    }
    figure = Figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(loads), sharex=True)
    edges = [rank - 0.5 for rank in range(plan.world_size + 1)]
    for axis, (name, load) in zip(axes, loads.items()):
        axis.stairs(load, edges, fill=True)
        axis.axhline(sum(load) / len(load), color="black", linewidth=1, label="mean")
        axis.set_ylabel(name)
    axes[0].legend(loc="lower right")
    axes[-1].set_xlabel("rank")
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot {file}: {error}") from error
