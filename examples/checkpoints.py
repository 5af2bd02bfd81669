"""Checkpoints of a run: RUN_DIR/checkpoints/step-N, written while training goes on.

A checkpoint is what torch.distributed.checkpoint (DCP) writes of the weights and the
optimizer's states, each piece once and to be read on any number of ranks, and run.pt:
the rest. It is written under another name and renamed when every rank has finished,
so a folder named step-N is always whole. All ranks must see the same folder.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import io
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import WriteResult

FORMAT = 1  # counted up when run.pt or the names of the states change
_RUN = "run.pt"


class Saver:
    """Writes and reads the checkpoints of a run; every rank has one.

    One checkpoint at a time is written in the background. Its collectives are made by
    a thread, so they have a process group to themselves.
    """

    def __init__(
        self, run_dir: Path, ranks: Ranks, *, keep_last: int, timeout_s: float
    ) -> None:
        """Removes what a crash may have left; older checkpoints than the last
        `keep_last` are removed when there is a new one (0 keeps all)."""
        self._root = _root(run_dir)
        self._ranks = ranks
        self._keep_last = keep_last
        self._saving: concurrent.futures.Future | None = None
        self._step = 0
        self._group = dist.new_group(
            backend="gloo", timeout=datetime.timedelta(seconds=timeout_s)
        )
        if ranks.rank == 0:
            for leftover in self._root.glob("step-*.*"):
                shutil.rmtree(leftover)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        run: dict[str, Any],
    ) -> None:
        """Starts to write a checkpoint, after the one before is whole.

        When it returns there is a copy of everything: training may go on. Every rank
        calls it.

        Args:
            step: Number of finished steps.
            model: Its weights are saved.
            optimizer: Its states are saved.
            run: What else is needed: rank 0's is saved, plain values and tensors.
        """
        self.wait()
        content = io.BytesIO()
        torch.save({"format": FORMAT, **run}, content)
        self._step = step
        self._saving = dcp.async_save(
            _states(model, optimizer),
            storage_writer=_Writer(
                self._root / f"step-{step}", content.getvalue(), self._keep_last
            ),
            process_group=self._group,
        )

    @property
    def failed(self) -> bool:
        """Whether the checkpoint being written has failed on this rank.

        Never waits. The ranks see it at different moments: let them agree, then call
        `raise_failure` on all.
        """
        saving = self._saving
        return saving is not None and saving.done() and saving.exception() is not None

    def wait(self) -> None:
        """Returns when the last checkpoint is whole; every rank calls it.

        Raises:
            RuntimeError: On every rank, if it could not be written.
        """
        if self._saving is None:
            return
        self.settle()
        (failures,) = self._ranks.sum(self.failed)
        if failures:
            self.raise_failure()
        self._saving = None

    def settle(self) -> None:
        """Returns when nothing is being written, whether it went well or not.

        It asks nothing of the other ranks' training, so it may be called after an
        error. A rank that is gone is noticed by the group at once or at its timeout.
        """
        if self._saving is not None:
            concurrent.futures.wait([self._saving])

    def raise_failure(self) -> NoReturn:
        """Raises the same error on every rank; every rank calls it.

        Raises:
            RuntimeError: Always; it says which rank met what.
        """
        error = self._saving.exception() if self.failed and self._saving else None
        reasons: dict[int, str] = {}
        for found in self._ranks.collect(_reasons(error, self._ranks.rank)):
            reasons |= found
        raise RuntimeError(
            f"the checkpoint of step {self._step} could not be written: "
            + _listed(reasons)
            + f"; the newest whole one is {newest(self._root.parent)}"
        )

    def load(
        self, checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Puts saved weights and states in place; every rank calls it.

        Raises:
            RuntimeError: On every rank, if they cannot be read.
        """
        states = _states(model, optimizer)
        try:
            dcp.load(states, checkpoint_id=checkpoint, process_group=self._group)
        except dcp.CheckpointException as error:  # not an Exception to Python
            listed = _listed(_reasons(error, self._ranks.rank))
            raise RuntimeError(f"{checkpoint} could not be read: {listed}") from error
        set_state_dict(
            model,
            optimizer,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
        )


class _Writer(dcp.FileSystemWriter):
    """Makes the written files a checkpoint when every rank has finished.

    DCP reports an exception of any method on any rank to all ranks, so everything that
    touches the disk is done here.
    """

    def __init__(self, final: Path, run: bytes, keep_last: int) -> None:
        super().__init__(_beside(final, "writing"))
        self._final = final
        self._run = run
        self._keep_last = keep_last

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all ranks have written and synced their files."""
        super().finish(metadata, results)
        folder, final = _beside(self._final, "writing"), self._final
        with (folder / _RUN).open("wb") as file:
            file.write(self._run)
            file.flush()
            os.fsync(file.fileno())
        _sync_names(folder)
        folder.rename(final)
        _sync_names(final.parent)
        for old in _all(final.parent)[: -self._keep_last] if self._keep_last else []:
            # Renamed first: half of a removed checkpoint must not look like a whole.
            shutil.rmtree(old.rename(_beside(old, "removing")))


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return next(reversed(_all(_root(run_dir))), None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What was given to `Saver.save` as `run`.

    Raises:
        ValueError: if another version of this program wrote it.
    """
    path = checkpoint / _RUN
    run = {}
    if path.exists():
        run = torch.load(path, map_location="cpu", weights_only=True)
    if run.get("format") != FORMAT:
        found = f"has format {run['format']}" if "format" in run else f"has no {_RUN}"
        raise ValueError(
            f"{checkpoint} {found}, this program reads format {FORMAT}; continue with"
            " the version that wrote it, or start anew in another folder"
        )
    return run


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of this rank's random numbers, to be part of a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(
    saved: list[dict[str, torch.Tensor]],
    *,
    rank: int,
    seed: Sequence[int],
    device: torch.device,
) -> None:
    """Continues a rank's random numbers, or begins them.

    Args:
        saved: The `random_state` of each rank that there was.
        rank: Of this process.
        seed: With the rank, it seeds the random numbers of a rank that is new.
        device: Of this process.
    """
    if rank >= len(saved):
        sequence = np.random.SeedSequence([*seed, rank])
        torch.manual_seed(int(sequence.generate_state(1)[0]))
        return
    torch.set_rng_state(saved[rank]["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved[rank]["cuda"], device)


def _root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _all(root: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=step_of)


def _beside(checkpoint: Path, what: str) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.{what}")


def _sync_names(folder: Path) -> None:
    """Makes the names in a folder survive a power failure, as fsync does contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and states by name, as DTensors or equal on all ranks; a collective."""
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states}


def _reasons(error: BaseException | None, rank: int) -> dict[int, str]:
    """What went wrong, by rank; DCP tells of the other ranks too."""
    if error is None:
        return {}
    found = {rank: error}
    if isinstance(error, dcp.CheckpointException) and error.failures:
        found = {other: cause for other, (cause, _) in error.failures.items()}
    return {r: f"{type(cause).__name__}: {cause}" for r, cause in found.items()}


def _listed(reasons: dict[int, str]) -> str:
    return ", ".join(f"rank {r}: {text}" for r, text in sorted(reasons.items()))
