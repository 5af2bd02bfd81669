"""Starting, stopping and interrupting the processes of a run."""

from __future__ import annotations

import dataclasses
import datetime
import os
import signal
import sys
import types
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
LOST_CONTACT = (
    "communication with the other ranks failed: one of them has ended, or did not"
    " answer within --timeout-s; start the job again with --resume"
)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    def wait(self) -> None:
        """Returns once every rank has come here."""
        dist.barrier()

    def sum(self, *values: float) -> list[float]:
        """The sums of the values over the ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor on every rank."""
        # A non-contiguous tensor would arrive scrambled on gloo, without an error.
        tensor = tensor.to(self.device).contiguous()
        dist.broadcast(tensor, src=0)
        return tensor

    def agree(self, text: str) -> str:
        """Rank 0's text on every rank."""
        texts = [text]
        dist.broadcast_object_list(texts, src=0)
        return texts[0]

    def say(self, message: str) -> None:
        if self.rank == 0:
            print(message, flush=True)


def start(device: str, *, timeout_s: float) -> Ranks:
    """Joins the process group torchrun describes, or makes one of this process.

    A collective that waits longer than `timeout_s` for another rank is an error.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = _best_device(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    backend = "nccl" if device == "cuda" else "gloo"
    gpu = None
    if device == "cuda":
        gpu = torch.device("cuda", local_rank)
        torch.cuda.set_device(gpu)
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        backend,
        device_id=gpu,
        timeout=datetime.timedelta(seconds=timeout_s),
        **({} if "RANK" in os.environ else alone),
    )
    world_size = dist.get_world_size()
    return Ranks(
        rank=dist.get_rank(),
        local_rank=local_rank,
        world_size=world_size,
        device=gpu or torch.device("cpu"),
        # Not init_device_mesh: where there is a GPU it makes another group for gloo,
        # with a timeout of its own.
        mesh=DeviceMesh.from_group(dist.group.WORLD, device),
    )


def _best_device(num_local: int) -> str:
    if not torch.cuda.is_available():
        return "cpu"
    if torch.cuda.device_count() >= num_local:
        return "cuda"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"{num_local} ranks on a machine with {torch.cuda.device_count()} GPU:"
            " running on the CPU; start one rank per GPU to use them"
        )
    return "cpu"


class StopRequest:
    """True after Ctrl-C or SIGTERM, which no longer end the process at once.

    Repeated signals are ignored: in a terminal Ctrl-C reaches a worker twice, from
    the terminal and from torchrun, and the second must not break the checkpoint.
    """

    def __init__(self) -> None:
        self._requested = False

    def __bool__(self) -> bool:
        return self._requested

    def listen(self) -> None:
        signal.signal(signal.SIGINT, self._note)
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self._requested = True


def lost_contact(error: Exception) -> bool:
    """Whether an error says that another rank has ended or does not answer."""
    # gloo has no class of its own for it; its messages begin with their source file.
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def leave(code: int, *, together: bool) -> NoReturn:
    """Ends the process; `together` waits for the other ranks first."""
    if together and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # At a normal exit the interpreter would destroy the DeviceMesh after gloo's
    # threads, which now and then aborts the process and hides its exit code.
    os._exit(code)
