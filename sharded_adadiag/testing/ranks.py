"""Run a function on several ranks of a gloo group: as threads or as processes."""

from __future__ import annotations

import datetime
import io
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What nearly every body needs; it takes far longer to import than a test to run.
_IMPORTED_ONCE = [
    "sharded_adadiag.testing.ranks",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


def run_threads(world_size: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``body(rank, *args)`` on ranks that are threads of this process.

    Fast enough for 64 ranks, and an exception on one rank ends the run. Threads share
    the global random state, so pass generators. Stands on torch's private
    threaded process group, tried with torch 2.13.

    Args:
        world_size: Number of ranks.
        body: The function; the default group exists while it runs.
        *args: Further arguments.

    Returns:
        What each rank returned.

    Raises:
        RuntimeError: If any rank raised; with its traceback.
    """
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    c10d: Any = torch._C._distributed_c10d
    isolate = c10d._set_thread_isolation_mode
    results: list[Any] = [None] * world_size
    errors: dict[int, BaseException] = {}
    isolate(True)
    world = threaded._install_threaded_pg()
    store = c10d.HashStore()

    def rank_main(rank: int) -> None:
        try:
            dist.init_process_group(
                backend="threaded", rank=rank, world_size=world_size, store=store
            )
            results[rank] = body(rank, *args)
        except BaseException as error:
            errors[rank] = error
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            if world.default_pg is not None:
                dist.destroy_process_group()

    threads = [
        threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        isolate(False)
    _raise_first(errors)
    return results


def run_processes(
    world_size: int, body: Callable[..., Any], *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Run ``body(rank, *args)`` on ranks that are processes of a gloo group.

    Each rank is a process of its own that ends with the call, so a body may change
    anything, or kill itself. They are forked from one process that has imported torch
    and done nothing else: the first call starts it, it ends with this interpreter.

    Args:
        world_size: Number of ranks.
        body: A function that can be pickled; the default group exists while it runs.
        *args: Further arguments, picklable.
        timeout_s: Seconds until a collective of the group fails.

    Returns:
        What each rank returned; it must be picklable.

    Raises:
        RuntimeError: If any rank raised; with its traceback.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    queue = context.SimpleQueue()
    folder = tempfile.TemporaryDirectory()
    store = os.path.join(folder.name, "store")  # a file cannot be taken by others
    environment = dict(os.environ)  # the forking process has that of the first call
    processes = [
        context.Process(
            target=_process_main,
            args=(rank, world_size, store, timeout_s, queue, environment, body, args),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}
    while len(results) + len(errors) < world_size:
        dead = [r for r, p in enumerate(processes) if p.exitcode is not None]
        if not queue.empty():
            rank, value, error = queue.get()
            if error is None:
                results[rank] = torch.load(io.BytesIO(value), weights_only=False)
            else:
                errors[rank] = RuntimeError(error)
        elif silent := [r for r in dead if r not in results and r not in errors]:
            codes = [processes[r].exitcode for r in silent]
            errors |= {r: RuntimeError(f"died with exit code {codes}") for r in silent}
        else:
            time.sleep(0.02)
    for process in processes:
        process.join()
    folder.cleanup()
    _raise_first(errors)
    return [results[rank] for rank in range(world_size)]


def _process_main(
    rank: int,
    world_size: int,
    store: str,
    timeout_s: float,
    queue: Any,
    environment: dict[str, str],
    body: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    try:
        # By value: tensors would be shared by a process that is about to end.
        buffer = io.BytesIO()
        torch.save(body(rank, *args), buffer)
        queue.put((rank, buffer.getvalue(), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        # A process that still holds a DeviceMesh at interpreter exit may abort
        # (torch 2.13, gloo), so it leaves without one.
        dist.destroy_process_group()
        os._exit(0)


def _raise_first(errors: dict[int, BaseException]) -> None:
    # A rank that is stopped because another one raised gets a SystemExit.
    own = {r: e for r, e in errors.items() if not isinstance(e, SystemExit)} or errors
    if own:
        rank = min(own)
        text = "".join(traceback.format_exception(own[rank]))
        raise RuntimeError(f"rank {rank} failed:\n{text}") from own[rank]
