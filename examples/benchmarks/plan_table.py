"""The table of docs/planning.md: what the largest runs would need, by the command.

    python examples/benchmarks/plan_table.py
    python examples/benchmarks/plan_table.py --models llama-7b --ranks 8 64
    python examples/benchmarks/plan_table.py --page docs/planning.md

Each row is one call of ``python -m sharded_adadiag plan ... --json``, in a process of
its own, so that seconds and memory are those of one plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- plan_table.py: begin -->", "<!-- plan_table.py: end -->"
COLUMNS = (
    "model",
    "ranks",
    "layout",
    "plan s",
    "process MB",
    "rounds",
    "ranks per team",
    "efficiency",
    "work max/mean",
    "refresh max/mean",
    "state MB, mean",
    "state max/mean",
    "MB sent, step",
    "messages, step",
    "buffers MB",
)


def questions(
    models: list[str], ranks: list[int], layouts: list[str]
) -> Iterator[tuple[str, int, str, list[str]]]:
    """Model, ranks, name of the layout and its arguments."""
    for model in models:
        for count in ranks:
            for layout in layouts:
                yield model, count, layout, ["--layout", layout]
            if count == 4096 and "fsdp2" in layouts:
                # 512 copies on 8 ranks: planning does not end in minutes.
                name = f"HSDP, 8 x {count // 8}"
                yield model, count, name, ["--replicas", "8"]


def figures(model: str, ranks: int, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "sharded_adadiag", "plan", model, "--json"]
    command += ["--ranks", str(ranks), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def row(model: str, ranks: int, layout: str, found: dict[str, Any]) -> tuple[str, ...]:
    sizes = [int(size) for size in found["team_sizes"]]
    teams = f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    state = found["state_bytes_max"] / found["state_bytes_mean"]
    return (
        model,
        f"{ranks:,}",
        layout,
        f"{found['plan_seconds']:.1f}",
        f"{found['peak_rss_mb']:.0f}",
        f"{found['rounds']:,}",
        teams,
        f"{found['step_efficiency']:.2f}",
        f"{found['work_max_over_mean']:.2f}",
        f"{found['refresh_max_over_mean']:.2f}",
        f"{found['state_bytes_mean'] / 1e6:,.0f}",
        f"{state:.2f}",
        f"{found['sent_bytes_step_max'] / 1e6:,.0f}",
        f"{found['messages_step_max']:,}",
        f"{found['buffer_bytes_max'] / 1e6:.1f}",
    )


def line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama-7b", "llama-70b"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 512, 4096])
    parser.add_argument("--layouts", nargs="+", default=["fsdp2", "zero"])
    parser.add_argument("--page", type=Path, help="put the table between its marks")
    asked = parser.parse_args()
    head = (COLUMNS, ("---",) * 3 + ("---:",) * (len(COLUMNS) - 3))
    lines = [line(cells) for cells in head]
    print(*lines, sep="\n", flush=True)
    for model, ranks, layout, arguments in questions(
        asked.models, asked.ranks, asked.layouts
    ):
        cells = row(model, ranks, layout, figures(model, ranks, arguments))
        lines.append(line(cells))
        print(lines[-1], flush=True)
    if asked.page:
        before, rest = asked.page.read_text().split(BEGIN)
        after = rest.split(END)[1]
        table = "\n".join([BEGIN, *lines, END])
        asked.page.write_text(before + table + after)


if __name__ == "__main__":
    main()
