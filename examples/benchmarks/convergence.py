"""Validation loss at equal steps, each optimizer at its own best learning rate.

    python examples/benchmarks/convergence.py --optimizers adamw adadiag adadiag++ \
        --out runs/convergence -- --model small --steps 600

One seed chooses the learning rate of each optimizer from the grid of the paper; the
chosen one is then run with all seeds. What follows `--` goes to every run of
`pretrain_llama.py`; `muon` and `soap` run it through rivals.py, on one rank. Flags of
one optimizer alone are written behind its name, in
quotes: "adadiag --refresh-every 20". Results are appended to OUT/results.jsonl as runs
end. Ctrl-C stops; the same command continues, and repeats no run that has a result.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "pretrain_llama.py"
RIVALS = {"muon", "soap"}  # what rivals.py can put in AdaDiag's place
GRID = (0.003, 0.001, 0.0003, 0.0001)
INTERRUPTED = 130  # exit code of pretrain_llama.py when it was asked to stop


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of pretrain_llama.py."""

    optimizer: str  # its name, then flags of its own
    lr: float
    seed: int
    flags: tuple[str, ...]  # of every run

    @property
    def folder(self) -> str:
        identity = "\0".join((self.optimizer, *self.flags)).encode()
        digest = hashlib.sha256(identity).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9+]+", "_", self.optimizer)
        return f"{name}-lr{self.lr:g}-seed{self.seed}-{digest}"

    def command(self, run_dir: Path) -> list[str]:
        name, *own = shlex.split(self.optimizer)
        program = [str(SCRIPT), "--optimizer", name]
        if name in RIVALS:
            program = [str(Path(__file__).with_name("rivals.py")), name]
        return [
            *(sys.executable, *program, *self.flags, *own),
            *("--lr", repr(self.lr), "--seed", str(self.seed)),
            *("--run-dir", str(run_dir)),
        ]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. A run that failed or diverged has an infinite loss."""

    job: Job
    curve: list[tuple[int, float]]  # step, validation loss
    seconds: float
    exit_code: int

    @property
    def steps(self) -> int:
        return self.curve[-1][0] if self.curve else 0

    @property
    def loss(self) -> float:
        """The final validation loss, in nats per token."""
        if self.exit_code != 0 or not self.curve or math.isnan(self.curve[-1][1]):
            return math.inf
        return self.curve[-1][1]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Result:
        values = json.loads(line)
        job = values.pop("job")
        job["flags"] = tuple(job["flags"])
        values["curve"] = [(step, loss) for step, loss in values["curve"]]
        return cls(Job(**job), **values)


class StoppedError(Exception):
    """The driver or a run of it was asked to stop."""


class Runner:
    """Runs jobs as subprocesses and keeps their results in a file."""

    def __init__(self, out: Path, *, parallel: int, threads: int) -> None:
        self.out = out
        self.parallel = parallel
        self.threads = threads
        self.file = out / "results.jsonl"
        self.results: dict[Job, Result] = {}
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                result = Result.from_json(line)
                self.results[result.job] = result
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopping = threading.Event()

    def run(self, jobs: Iterable[Job]) -> list[Result]:
        """The results of the jobs, of those already run from the file."""
        jobs = list(dict.fromkeys(jobs))
        missing = [job for job in jobs if job not in self.results]
        print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them already there")
        with concurrent.futures.ThreadPoolExecutor(self.parallel) as pool:
            futures = [pool.submit(self._run_one, job) for job in missing]
            try:
                for future in concurrent.futures.as_completed(futures):
                    self._keep(future.result())
            except BaseException:
                self.stop()  # leaving the pool waits for the runs to save and end
                raise
        return [self.results[job] for job in jobs]

    def stop(self) -> None:
        """Ask the running subprocesses to leave a checkpoint and end."""
        self.stopping.set()
        for process in list(self.processes):
            process.send_signal(signal.SIGTERM)

    def _keep(self, result: Result) -> None:
        self.results[result.job] = result
        with self.file.open("a", encoding="utf-8") as file:
            file.write(result.to_json() + "\n")
        job = result.job
        print(
            f"{job.optimizer}, lr {job.lr:g}, seed {job.seed}: validation loss "
            f"{result.loss:.4f} after {result.steps} steps, {result.seconds:.0f} s",
            flush=True,
        )

    def _run_one(self, job: Job) -> Result:
        if self.stopping.is_set():
            raise StoppedError
        run_dir = self.out / "runs" / job.folder
        command = job.command(run_dir)
        if any((run_dir / "checkpoints").glob("step-*")):
            command.append("--resume")
        else:
            shutil.rmtree(run_dir, ignore_errors=True)
            run_dir.mkdir(parents=True)
        log = run_dir / "output.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        started = time.perf_counter()
        with log.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is passed on by stop(), and once
            )
            self.processes.add(process)
            if self.stopping.is_set():  # stop() may have come before the line above
                process.terminate()
            code = process.wait()
            self.processes.discard(process)
        if self.stopping.is_set() or code == INTERRUPTED or code < 0:
            raise StoppedError(f"{run_dir.name} ended with exit code {code}")
        curve = read_curve(run_dir / "metrics.jsonl")
        if code != 0 and curve is None:
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise ValueError(f"{shlex.join(command)}\ndid not start:\n{tail}")
        seconds = time.perf_counter() - started
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return Result(job, curve or [], seconds, code)


def read_curve(metrics: Path) -> list[tuple[int, float]] | None:
    """The validation losses by step; None if the run took no step."""
    if not metrics.exists():
        return None
    lines = []
    for text in metrics.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut off by a crash
            lines.append(json.loads(text))
    if not lines:
        return None
    losses = {line["step"]: line.get("val_loss") for line in lines}
    return sorted((step, loss) for step, loss in losses.items() if loss is not None)


def best_lr(results: list[Result]) -> float:
    """The learning rate with the lowest loss; the larger of two equals."""
    best = min(results, key=lambda result: (result.loss, -result.job.lr))
    if best.loss == math.inf:
        raise ValueError(
            f"{best.job.optimizer}: no learning rate of the grid gave a finite loss; "
            "see the output.txt of its runs, or give lower ones in --grid"
        )
    return best.job.lr


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 50 else "-"


def summary_table(chosen: dict[str, list[Result]], grid: list[float]) -> str:
    """Mean and standard deviation over the seeds, one optimizer a line."""
    steps = {r.steps for results in chosen.values() for r in results if r.loss < 1e9}
    if len(steps) > 1:
        raise ValueError(f"runs of different length cannot be compared: {steps} steps")
    first = next(iter(chosen.values()))
    reference = statistics.fmean(result.loss for result in first)
    seeds = ", ".join(str(result.job.seed) for result in first)
    lines = [
        f"After {max(steps, default=0)} steps, "
        f"mean and deviation over seeds {seeds}, each at its best learning rate:",
        "",
        "| optimizer | learning rate | validation loss | perplexity "
        f"| minus {first[0].job.optimizer} |",
        "|---|---:|---:|---:|---:|",
    ]
    for optimizer, results in chosen.items():
        losses = [result.loss for result in results]
        failed = sum(loss == math.inf for loss in losses)
        lr = f"{results[0].job.lr:g}"
        if len(grid) > 1 and results[0].job.lr in (min(grid), max(grid)):
            lr += " (end of the grid)"
        if failed:
            lines.append(
                f"| {optimizer} | {lr} | {failed} of {len(losses)} failed | - | - |"
            )
            continue
        mean = statistics.fmean(losses)
        spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        lines.append(
            f"| {optimizer} | {lr} | {mean:.4f}{spread} | {_perplexity(mean)} "
            f"| {mean - reference:+.4f} |"
        )
    return "\n".join(lines)


def grid_table(searched: dict[str, list[Result]], seed: int) -> str:
    """The final loss at each learning rate, the one that chose it in bold."""
    rates = [result.job.lr for result in next(iter(searched.values()))]
    lines = [
        f"Validation loss by learning rate, seed {seed}:",
        "",
        "| optimizer | " + " | ".join(f"{lr:g}" for lr in rates) + " |",
        "|---" + "|---:" * len(rates) + "|",
    ]
    for optimizer, results in searched.items():
        chosen = best_lr(results)
        cells = [
            f"**{r.loss:.4f}**"
            if r.job.lr == chosen
            else ("failed" if r.loss == math.inf else f"{r.loss:.4f}")
            for r in results
        ]
        lines.append(f"| {optimizer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(chosen: dict[str, list[Result]], path: Path) -> None:
    """The validation loss by step: mean over the seeds, and one standard deviation.

    The whole run on the left; on the right its last part, where the curves are close.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    whole, end = figure.subplots(1, 2, width_ratios=(3, 2))
    finals = []
    for index, (optimizer, results) in enumerate(chosen.items()):
        curves = [dict(result.curve) for result in results if result.loss < math.inf]
        if not curves:
            continue
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [statistics.fmean(curve[s] for curve in curves) for s in steps]
        spreads = [0.0] * len(steps)
        if len(curves) > 1:
            spreads = [statistics.stdev(curve[s] for curve in curves) for s in steps]
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        color, marker = f"C{index}", "osDv^P"[index % 6]
        label = f"{means[-1]:.3f}  {optimizer}, lr {results[0].job.lr:g}"
        last = sum(step < 0.6 * steps[-1] for step in steps)
        for axes, first in ((whole, 0), (end, last)):
            shown = slice(first, None)
            (line,) = axes.plot(steps[shown], means[shown], color=color, label=label)
            line.set(marker=marker, markersize=4)
            axes.fill_between(
                steps[shown], low[shown], high[shown], alpha=0.15, color=color, lw=0
            )
        finals.append((means[-1], line))
    for axes in (whole, end):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    whole.set_xlim(left=0)
    whole.set_ylabel("validation loss (nats per token)")
    if finals:  # the legend has the order of the curves' ends
        lines = [line for _, line in sorted(finals, key=lambda f: -f[0])]
        whole.legend(handles=lines, title="at the end", frameon=False)
    figure.savefig(path, dpi=120)


def machine(args: argparse.Namespace) -> str:
    """Where the runs were made, as far as one can tell without starting torch."""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {args.threads} threads a run, "
        f"torch {importlib.metadata.version('torch')}, "
        f"{datetime.date.today().isoformat()}"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [-- flags of pretrain_llama.py]",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=["adamw", "adadiag", "adadiag++"],
        help="the first is the one the others are compared with",
    )
    parser.add_argument("--grid", nargs="+", type=float, default=list(GRID))
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        help="the first of them chooses the learning rate",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument(
        "--threads", type=int, help="threads of a run (default: cores / jobs)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"))
    arguments = sys.argv[1:] if argv is None else argv
    flags: list[str] = []
    if "--" in arguments:
        split = arguments.index("--")
        arguments, flags = arguments[:split], arguments[split + 1 :]
    args = parser.parse_args(arguments)
    args.flags = tuple(flags)
    args.optimizers = list(dict.fromkeys(args.optimizers))
    args.grid = sorted(set(args.grid), reverse=True)
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.threads is None:
        args.threads = max(1, (os.cpu_count() or 1) // args.jobs)
    return args


def compare(args: argparse.Namespace, runner: Runner) -> str:
    """Run what is missing, write the table and the plot; return the table."""
    search = [
        Job(optimizer, lr, args.seeds[0], args.flags)
        for optimizer in args.optimizers
        for lr in args.grid
    ]
    searched: dict[str, list[Result]] = {}
    for result in runner.run(search):
        searched.setdefault(result.job.optimizer, []).append(result)
    final = [
        Job(optimizer, best_lr(results), seed, args.flags)
        for optimizer, results in searched.items()
        for seed in args.seeds
    ]
    chosen: dict[str, list[Result]] = {}
    for result in runner.run(final):
        chosen.setdefault(result.job.optimizer, []).append(result)
    table = "\n\n".join([
        f"`pretrain_llama.py {shlex.join(args.flags)}`",
        summary_table(chosen, args.grid),
        grid_table(searched, args.seeds[0]),
    ])
    (args.out / "table.md").write_text(table + "\n", encoding="utf-8")
    plot(chosen, args.out / "validation.png")
    return table


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _terminate)
    runner = Runner(args.out, parallel=args.jobs, threads=args.threads)
    try:
        table = compare(args, runner)
    except (KeyboardInterrupt, StoppedError) as stopped:
        sys.exit(f"stopped {stopped}; the same command continues".replace(" ;", ";"))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"\n{table}\n\nresults: {runner.file}\nplot: {args.out / 'validation.png'}")


if __name__ == "__main__":
    main()
