"""Digests of weights and states over the table of hard cases, on every layout.

A change that should alter no number shows the same digests before and after, on one
machine (LAPACK and the CPU's kernels are part of them):

    python tests/digests.py > before.txt
    ... the change ...
    python tests/digests.py | diff before.txt -

``python tests/digests.py N`` makes every N-th line only.
"""

import hashlib
import itertools
import sys
import warnings

import torch
from support.training import Parameters, sharded_model, train
from torch import Tensor
from torch.distributed.tensor import DTensor

from sharded_adadiag.testing.cases import HARD_CASES
from sharded_adadiag.testing.ranks import run_threads

LAYOUTS = [("plain", 1), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 7), ("ddp", 3)]
LAYOUTS += [("hsdp", 4), ("tp", 2), ("fsdp2+tp", 4)]
OPTIONS = {
    "sides": ["one", "two", "none"],
    "basis": ["svd", "eigh"],
    "on_refresh": ["carry", "reproject"],
    "distribution": ["owner", "broadcast", "auto"],
}
STEPS = 14  # a refresh at steps 1 and 13


def digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().contiguous()
        sha.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def run(rank, layout, method, dtype, options):
    cases = tuple(case for case in HARD_CASES if not case.frozen)
    extra = {}
    if layout == "plain":
        model = Parameters(cases, dtype)
    else:
        model, extra = sharded_model(layout, cases, dtype)
    weights, opt = train(model, cases, dtype, method, {**options, **extra}, STEPS)
    found = {f"weight {i}": weight for i, weight in enumerate(weights)}
    for i, state in opt.state_dict()["state"].items():
        for key, value in state.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found[f"state {i} {key}"] = torch.as_tensor(whole)
    return digest(found)


def lines():
    """Layout, ranks, method, dtype and options of every line."""
    choices = [
        dict(zip(OPTIONS, values)) for values in itertools.product(*OPTIONS.values())
    ]
    methods = ("AdaDiag", "AdafacDiag", "HfacDiag")
    for (layout, ranks), method, options in itertools.product(
        LAYOUTS, methods, choices
    ):
        dtypes = (torch.float32, torch.bfloat16)
        for dtype in dtypes if options["basis"] == "svd" else dtypes[:1]:
            yield layout, ranks, method, dtype, options


def main(every: int = 1) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for layout, ranks, method, dtype, options in itertools.islice(
        lines(), 0, None, every
    ):
        got = run_threads(ranks, run, layout, method, dtype, options)
        line = [layout, str(ranks), method, str(dtype), *options.values()]
        print(*line, *sorted(set(got)), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
