"""Training under DeepSpeed in one cell of the table stage x precision x setting.

A cell is checked in two ways. Against one process that trains on the whole batch: to
rounding. And step by step by a follower: a plain optimizer that gets the full gradients
which DeepSpeed's own helper puts together, and must come to the same bits.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag
from sharded_adadiag.testing.reference import ReferenceOptimizer

STEPS, BATCH, LENGTH, VOCAB, WIDTH = 6, 12, 24, 11, 8
OPTIONS: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.1, "refresh_every": 3}
CLASSES = {"AdaDiag": AdaDiag, "AdafacDiag": AdafacDiag, "HfacDiag": HfacDiag}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting.

    Attributes:
        name: Of the setting.
        stage: Of ZeRO.
        config: Joined to the config.
        zero: Joined to ``zero_optimization``.
        model: Options of the model.
        route: How the optimizer gets in: "json", "client" or "callable".
        method: Name of the optimizer.
        options: Its options besides `OPTIONS`.
        groups: Options of the rotated and of the plain group ("client" only).
        init: Build the model under ``deepspeed.zero.Init``.
    """

    name: str
    stage: int
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    zero: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    route: str = "json"
    method: str = "AdaDiag"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    groups: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    init: bool = False

    @property
    def precision(self) -> str:
        if self.config.get("fp16"):
            return "fp16"
        if not self.config.get("bf16"):
            return "fp32"
        high = self.config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        return "bf16, fp32 sums" if high else "bf16"

    @property
    def accumulation(self) -> int:
        return self.config.get("gradient_accumulation_steps", 1)


class Model(nn.Module):
    """Rotated matrices whose gradients have full rank, and what is not rotated."""

    def __init__(
        self,
        *,
        tied: bool = False,
        frozen: bool = False,
        unused: bool = False,
        branch: bool = False,
        experts: bool = False,
        stack: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, 13)
        self.down = nn.Linear(13, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        if frozen:
            self.fixed = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        if unused:
            self.unused = nn.Linear(5, 7)
        if branch:  # no gradient but zeros for its first layer until the first step
            self.into = nn.Linear(WIDTH, WIDTH, bias=False)
            self.zero_init = nn.Linear(WIDTH, WIDTH, bias=False)
        if experts:  # told from matrices by name and shape
            self.moe = nn.ModuleDict({"gate": nn.Linear(WIDTH, 4, bias=False)})
            self.moe.experts = nn.Module()
            self.moe.experts.gate_up_proj = nn.Parameter(torch.zeros(4, WIDTH, WIDTH))
            self.moe.experts.bias = nn.Parameter(torch.zeros(4, WIDTH))
        if stack:
            self.stack = nn.Parameter(torch.zeros(3, WIDTH, WIDTH))
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)  # the last one is the head
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if hasattr(self, "fixed"):
            x = x + self.fixed(x)
        if hasattr(self, "into"):
            x = x + self.zero_init(torch.tanh(self.into(x)))
        if hasattr(self, "stack"):
            x = x + torch.tanh(x @ self.stack[0]) @ self.stack[1] @ self.stack[2]
        return self.lm_head(self.down(torch.tanh(self.up(x))) * self.scale)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The same start everywhere; values of parameters that ZeRO has not yet cut."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.empty(p.shape).uniform_(-0.4, 0.4, generator=generator)
        * ("zero_init" not in name)
        for name, p in model.named_parameters()
    }


def loss_of(model: nn.Module, step: int, rows: slice) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)[rows]
    logits = model(tokens[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def sorted_groups(
    named: Iterable[tuple[str, nn.Parameter]], cell: Cell | None = None
) -> list[dict[str, Any]]:
    """By name, as the config file's route does it."""
    members: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, param in named:
        members["embed" not in name and "lm_head" not in name].append((name, param))
    own = cell.groups if cell else ({}, {})
    return [
        {"params": members[True], **own[0]},
        {"params": members[False], "rotate": False, **own[1]},
    ]


def one_process(cell: Cell) -> dict[str, Tensor]:
    """The weights after training on the whole batch, by the slow reference."""
    model = Model(**cell.model)
    start = weights(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(start[name])
    groups = [
        {**group, "params": [p for _, p in group["params"] if p.requires_grad]}
        for group in sorted_groups(model.named_parameters(), cell)
    ]
    options = {**OPTIONS, **cell.options}
    options.pop("rotation_dtype", None)  # the reference keeps what is precise enough
    reference = ReferenceOptimizer(cell.method.lower(), groups, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in range(STEPS):
        for param in trained:
            param.grad = torch.zeros_like(param)  # DeepSpeed knows no missing gradient
        for part in range(cell.accumulation):
            loss = loss_of(model, cell.accumulation * step + part, slice(None))
            (loss / cell.accumulation).backward()
        if threshold := cell.config.get("gradient_clipping"):
            assert float(nn.utils.clip_grad_norm_(trained, threshold)) > threshold
        reference.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def start_deepspeed(rank: int, world_size: int) -> Any:
    """DeepSpeed on gloo without its just-in-time builds, which CPU runs do not need."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "DS_ACCELERATOR": "cpu",
        "TORCHDYNAMO_DISABLE": "1",
    }
    warnings.simplefilter("ignore")  # DeepSpeed's own, many per step
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    gc.freeze()  # what is imported need not be searched for each engine
    return deepspeed


def build(cell: Cell, deepspeed: Any) -> tuple[nn.Module, Any]:
    """The model and DeepSpeed's engine."""
    # An engine that ends makes DeepSpeed forget all names; it must not do so while
    # the next one is made, on one rank earlier than on another.
    gc.collect()
    world_size = dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world_size,
        "gradient_clipping": 0.0,
        **cell.config,
        "zero_optimization": {"stage": cell.stage, **cell.zero},
    }
    options = {**OPTIONS, **cell.options}
    kwargs: dict[str, Any] = {}
    plain = Model(**cell.model)
    start = weights(plain)
    if cell.init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Model(**cell.model)
        for name, param in model.named_parameters():
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                if dist.get_rank() == 0:
                    param.data.copy_(start[name])
    else:
        model = plain
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(start[name])
    if cell.route == "json":
        config["optimizer"] = {"type": cell.method, "params": options}
        kwargs["model_parameters"] = list(model.parameters())
    elif cell.route == "client":
        groups = sorted_groups(model.named_parameters(), cell)
        kwargs["optimizer"] = CLASSES[cell.method](groups, **options)
    else:
        kwargs["model_parameters"] = list(model.parameters())
        kwargs["optimizer"] = lambda params: CLASSES[cell.method](params, **options)
    engine, *_ = deepspeed.initialize(model=model, config=config, **kwargs)
    return model, engine


def full_weights(model: nn.Module, deepspeed: Any) -> dict[str, Tensor]:
    params = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())):
        return {name: p.detach().clone() for name, p in params.items()}


class Follower:
    """Plain master weights that see the gradients DeepSpeed puts together."""

    def __init__(self, model: nn.Module, cell: Cell, deepspeed: Any) -> None:
        self.model, self.stage = model, cell.stage
        named = full_weights(model, deepspeed)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            n: nn.Parameter(w.float()) for n, w in named.items() if n in trained
        }
        groups = sorted_groups(self.masters.items(), cell)
        self.opt = CLASSES[cell.method](groups, **{**OPTIONS, **cell.options})

    def step(self, lrs: list[float], scale: float) -> None:
        for group, lr in zip(self.opt.param_groups, 2 * lrs):
            group["lr"] = lr
        from deepspeed.utils import safe_get_full_grad

        for name, param in self.model.named_parameters():
            if name in self.masters:
                grad = param.grad if self.stage == 0 else safe_get_full_grad(param)
                self.masters[name].grad = grad.detach().float() / scale
        self.opt.step()


def train(cell: Cell, deepspeed: Any) -> dict[str, float]:
    """Train a cell; the largest differences to one process and to the follower."""
    model, engine = build(cell, deepspeed)
    # Clipping comes between DeepSpeed's helper and the optimizer; with round robin
    # the helper itself mistakes the place of most parameters (0.19.8).
    alone = cell.config.get("gradient_clipping") or "round_robin_gradients" in cell.zero
    follower = None if alone else Follower(model, cell, deepspeed)
    advance(engine, cell, range(STEPS), follower)
    got = full_weights(model, deepspeed)
    result = {}
    if cell.precision == "fp32" and "scheduler" not in cell.config:
        want = one_process(cell)
        result["one process"] = largest(got, want)
    if follower is not None:
        masters = {n: m.detach().to(got[n].dtype) for n, m in follower.masters.items()}
        result["follower"] = largest({n: got[n] for n in masters}, masters)
    result["moved"] = largest(got, weights(Model(**cell.model)))
    return result


def advance(
    engine: Any, cell: Cell, steps: range, follower: Follower | None = None
) -> None:
    """Train on this rank's rows of every batch."""
    share = BATCH // dist.get_world_size()
    rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    for step in steps:
        for part in range(cell.accumulation):
            loss = loss_of(engine, cell.accumulation * step + part, rows)
            engine.backward(loss)
            if part == cell.accumulation - 1 and follower is not None:
                # DeepSpeed's helper gives gradients with the scale of their loss.
                scale = getattr(engine.optimizer, "loss_scale", 1.0)
                follower.step(engine.get_lr(), float(scale))
            engine.step()


def largest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(float((got[n].double() - want[n].double()).abs().max()) for n in got)


def run_cells(rank: int, world_size: int, cells: list[Cell]) -> dict[str, Any]:
    """Several cells in one launch; a failure of one is told, not hidden."""
    deepspeed = start_deepspeed(rank, world_size)
    results: dict[str, Any] = {}
    for cell in cells:
        try:
            results[cell.name] = train(cell, deepspeed)
        except ValueError as error:
            if cell.precision != "fp16" or "fp16 is not supported" not in str(error):
                raise
            results[cell.name] = {"moved": 1.0}  # DeepSpeed refuses it by name
        print(cell.stage, cell.name, results[cell.name], file=sys.stderr, flush=True)
    return results


def followed(rank: int, world_size: int, cells: list[Cell]) -> dict[str, Any]:
    """What the slow reference does not know: the difference to the follower only."""
    deepspeed = start_deepspeed(rank, world_size)
    results: dict[str, Any] = {}
    for cell in cells:
        model, engine = build(cell, deepspeed)
        follower = Follower(model, cell, deepspeed)
        advance(engine, cell, range(STEPS), follower)
        got = full_weights(model, deepspeed)
        masters = {n: m.detach().to(got[n].dtype) for n, m in follower.masters.items()}
        moved = largest(got, weights(Model(**cell.model)))
        keys = set(engine.optimizer.optimizer._binding.prepared().plan.matrices)
        stacks = {m.share.kind for m in keys}
        results[cell.name] = largest(got, masters), moved, stacks
    return results


def collectives_per_call(rank: int, world_size: int, cells: list[Cell]) -> list[set]:
    """What one call of the optimizer's ``step`` makes, once everything is planned."""
    from sharded_adadiag.comm.collectives import ProcessGroup
    from sharded_adadiag.optimizer import RotatedOptimizer

    deepspeed = start_deepspeed(rank, world_size)
    made: list[str] = []
    calls: list[tuple[str, ...]] = []

    def counted(name: str, real: Any) -> Any:
        def collective(self: Any, *args: Any) -> Any:
            made.append(name)
            return real(self, *args)

        return collective

    for name in ("start_all_to_all", "all_reduce_max_", "all_reduce_sum_"):
        setattr(ProcessGroup, name, counted(name, getattr(ProcessGroup, name)))
    real_step = RotatedOptimizer.step

    def step(self: Any, closure: Any = None) -> Any:
        made.clear()
        result = real_step(self, closure)
        calls.append(tuple(made))
        return result

    RotatedOptimizer.step = step  # type: ignore[method-assign]
    found = []
    for cell in cells:
        _, engine = build(cell, deepspeed)
        advance(engine, cell, range(1))
        calls.clear()
        advance(engine, cell, range(1, 3))
        found.append(set(calls))
    return found
