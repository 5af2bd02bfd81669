"""Work that waits for other ranks, as coroutines, and what runs several at once.

A job yields a `Transfer` or a `Sum` and is sent what came of it. So the text of a step
calls no collective: `drive` makes them, in one order on every rank, so that one job's
data travel while another computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_adadiag.comm.collectives import Communicator
from sharded_adadiag.comm.exchange import Exchange, Pending
from sharded_adadiag.plan.exchange_plan import ExchangePlan

# While one job computes, the next one's data arrive and the last one's leave.
IN_FLIGHT = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """A planned exchange; the answer is this rank's piece of each item at its target.

    Attributes:
        plan: What goes from whom to whom.
        pieces: This rank's piece of each item in the source layout.
        wire: Dtype of each on the way.
        work: Dtype wanted of each at the target.
        into: Name of the memory for the answer: the job's next transfer of this name
            overwrites it. Regions that come apart lie in the memory of messages, which
            the next transfer overwrites whatever its name.
        apart: Positions of items that are not put together: their answer is a list of
            ``(region, tensor)`` as they came.
    """

    plan: ExchangePlan
    pieces: Sequence[Tensor]
    wire: Sequence[torch.dtype]
    work: Sequence[torch.dtype]
    into: str
    apart: Collection[int] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Sum:
    """Tensors to be added up over all ranks; the answer is the list of totals."""

    values: list[Tensor]


Job = Generator[Transfer | Sum, Any, Any]


class Failures:
    """What failed in a step, carried along until every rank knows of it.

    A rank that fails still makes the exchanges that the others wait for, with whatever
    it has. Its status word goes with the data, and who receives one passes it on.

    Args:
        comm: The ranks of the step.

    Attributes:
        status: 0, or ``1 + index * ranks + rank``: the parameter and the rank that
            failed.
        error: The first exception on this rank itself; None if it failed elsewhere.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.status = 0
        self.error: Exception | None = None

    @contextlib.contextmanager
    def carried(self, index: int) -> Generator[None, None, None]:
        """Note a failure of the work on a parameter instead of raising it.

        Args:
            index: Position of the parameter.
        """
        try:
            yield
        except Exception as error:
            if self.comm.size == 1:
                raise
            if not self.status:
                self.status = 1 + index * self.comm.size + self.comm.rank
                self.error = error

    def receive(self, statuses: dict[int, int]) -> None:
        """Note the status words that came with data, by sender."""
        if statuses and not self.status:
            self.status = max(statuses.values())

    def raise_noted(self, names: Sequence[str]) -> None:
        """Raise if anything failed here or on a rank that sent its status word.

        Args:
            names: Name of each parameter, by its position.

        Raises:
            RuntimeError: It names the parameter and the rank.
        """
        if self.status:
            index, rank = divmod(self.status - 1, self.comm.size)
            raise RuntimeError(
                f"{names[index]}: rank {rank}, which works on it, could not compute "
                "the update"
                + (f": {self.error}" if self.error is not None else "")
                + "; states may have advanced: restart from a checkpoint"
            ) from self.error


class _Running:
    """A job that waits for an answer, in buffers of its own."""

    def __init__(self, job: Job, place: int, drive: _Drive) -> None:
        self.job = job
        self.place = place
        self.drive = drive
        self.asked: Transfer | Sum | None = None
        self._pending: Pending | None = None

    def advance(self, answer: Any) -> None:
        """Let the job run to its next request, and start that."""
        try:
            self.asked = asked = self.job.send(answer)
        except StopIteration:
            self.asked = None
            return
        if isinstance(asked, Transfer):
            self._pending = self.drive.exchange.start(
                asked.plan,
                asked.pieces,
                asked.wire,
                asked.work,
                device=self.drive.device,
                status=self.drive.failures.status,
                into=f"{asked.into} {self.place}",
                messages=f"messages {self.place}",
            )

    def answer(self) -> Any:
        """Wait for what the job has asked for."""
        if isinstance(self.asked, Sum):
            return _totals(self.asked.values, self.drive.exchange.comm)
        assert self._pending is not None and self.asked is not None
        results, statuses = self._pending.finish(self.asked.apart)
        self.drive.failures.receive(statuses)
        return results


class _Drive(NamedTuple):
    """What running jobs need to make their requests."""

    exchange: Exchange
    failures: Failures
    device: torch.device


def drive(
    jobs: Iterable[Job],
    exchange: Exchange,
    failures: Failures,
    *,
    device: torch.device,
    in_flight: int = IN_FLIGHT,
) -> None:
    """Run jobs to their ends, some at a time, with the same collectives on every rank.

    Args:
        jobs: The jobs, each started when there is room for it.
        exchange: Packs and sends their transfers, over the same ranks.
        failures: Learns of the status words that come with data.
        device: Device of the jobs' tensors.
        in_flight: Most jobs at a time; buffers are made for so many.
    """
    needs = _Drive(exchange, failures, device)
    waiting = iter(jobs)
    running: list[_Running] = []
    more = True
    while more or running:
        newest = None
        job = next(waiting, None) if more and len(running) < in_flight else None
        if job is not None:
            taken = {one.place for one in running}
            place = next(i for i in range(in_flight) if i not in taken)
            newest = _Running(job, place, needs)
            newest.advance(None)
        elif len(running) < in_flight:
            more = False
        # The youngest of those whose data are due computes first: its results leave
        # while the older ones' come home.
        for one in reversed(running):
            one.advance(one.answer())
        if newest is not None:
            running.append(newest)
        running = [one for one in running if one.asked is not None]


def _totals(values: Sequence[Tensor], comm: Communicator) -> list[Tensor]:
    """Add up the ranks' values; one all-reduce for each dtype."""
    totals = list(values)
    alike: dict[torch.dtype, list[int]] = {}
    for i, value in enumerate(values):
        alike.setdefault(value.dtype, []).append(i)
    for which in alike.values():
        flat = torch.cat([totals[i].reshape(-1) for i in which])
        flat = flat.to(comm.device(flat.device))
        comm.all_reduce_sum_(flat)
        sizes = [totals[i].numel() for i in which]
        for i, total in zip(which, flat.split(sizes)):
            totals[i] = total.view(values[i].shape).to(values[i].device)
    return totals
