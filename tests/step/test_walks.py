"""Through how many files a gradient passes in an ordinary step."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import sharded_adadiag
from sharded_adadiag import AdaDiag
from sharded_adadiag.testing.ranks import run_threads

PACKAGE = Path(sharded_adadiag.__file__).parent


def walk(rank, count):
    """Files of the package entered, and moves between them, calls and returns."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharded(value):
        return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)

    named = [(f"w{i}", nn.Parameter(sharded(torch.ones(8, 6)))) for i in range(count)]
    opt = AdaDiag([{"params": named, "rotate": True}], distribution="owner")
    generator = torch.Generator().manual_seed(0)
    files, moves, at = set(), 0, None

    def look(frame, event, _):
        nonlocal moves, at
        if event == "return":
            frame = frame.f_back
        if event not in {"call", "return"} or frame is None:
            return
        file = Path(frame.f_code.co_filename)
        if PACKAGE in file.parents and file.parent.name != "testing" and file != at:
            files.add(file)
            moves, at = moves + (at is not None), file

    for step in range(4):
        for _, param in named:
            param.grad = sharded(torch.randn(8, 6, generator=generator))
        sys.setprofile(look if step == 3 else None)
        opt.step()
        sys.setprofile(None)
    return len(files), moves


def test_a_gradient_on_the_owner_route_passes_few_files():
    for files, _ in run_threads(2, walk, 1):
        assert 5 < files <= 14


def test_further_gradients_add_few_moves_between_files():
    """1,429 moves for 20 gradients before a step was handed what it needs."""
    (_, one), _ = run_threads(2, walk, 1)
    for _, moves in run_threads(2, walk, 20):
        assert moves <= one + 19 * 5
