"""What ranks send, keep and say, beside the weights they end with."""

import contextlib
import math
import time

import pytest
import torch
import torch.distributed as dist
from test_parity import Parameters, alone, groups, sharded_model, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag, param_groups
from sharded_adadiag.comm.collectives import ProcessGroup
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import (
    HARD_CASES,
    ONE_PARAMETER,
    Case,
    gradients,
)
from sharded_adadiag.testing.ranks import run_processes, run_threads

F64 = torch.float64


@pytest.mark.parametrize("method", ["AdafacDiag", "HfacDiag"])
@pytest.mark.parametrize("sides", ["none", "one", "two"])
@pytest.mark.parametrize("layout,world_size", [("fsdp2", 3), ("ddp", 2)])
def test_factored_methods_agree_in_both_distributions(
    layout, world_size, sides, method
):
    for distribution in ("owner", "broadcast"):
        options = {"sides": sides, "distribution": distribution}
        cases = HARD_CASES
        if sides == "two" and distribution == "broadcast":
            # A longer side has directions without any gradient. The accumulators'
            # 1e-30 does not tame their round-off, so only bits of one order agree.
            cases = tuple(c for c in cases if len(set(c.shape)) == 1)
        want = alone(cases, F64, method, options)
        got = run_threads(world_size, weights_of, layout, cases, F64, method, options)
        for rank in range(world_size):
            for case, a, b in zip(cases, got[rank], want):
                if distribution == "owner":
                    assert_equal(a, b, case.name)
                else:
                    torch.testing.assert_close(
                        a, b, atol=1e-6, rtol=1e-6, msg=lambda m, c=case: c.name + m
                    )


def weights_of(rank, layout, cases, dtype, method, options):
    model, extra = sharded_model(layout, cases, dtype)
    return train(model, cases, dtype, method, {**options, **extra})[0]


@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
@pytest.mark.parametrize(
    "options",
    [
        {"on_refresh": "reproject", "sides": "one"},
        {"on_refresh": "reproject", "sides": "two"},
        {"noise_floor": 1e-3, "sides": "two"},
        {"side": "right"},
        {"basis": "eigh"},
        {"side": "left", "maximize": True},
        {"max_rotated_dim": 8},
        {"rotation_dtype": torch.float32, "state_dtype": torch.float32},
    ],
    ids=str,
)
def test_every_option_means_the_same_on_several_ranks(options, distribution):
    options = {**options, "distribution": distribution}
    want = alone(HARD_CASES, F64, "AdaDiag", options)
    got = run_threads(3, weights_of, "fsdp2", HARD_CASES, F64, "AdaDiag", options)
    # States kept in float32 round, and the blocks round elsewhere than the whole.
    bar = 1e-6 if "state_dtype" not in options else 2e-4
    for case, a, b in zip(HARD_CASES, got[0], want):
        if distribution == "owner":
            assert_equal(a, b, case.name)
        else:
            torch.testing.assert_close(
                a, b, atol=bar, rtol=bar, msg=lambda m, c=case: f"{c.name}: {m}"
            )


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_a_single_parameter_is_enough(world_size):
    options = {"distribution": "auto"}
    want = alone(ONE_PARAMETER, F64, "AdaDiag", options)
    got = run_threads(
        world_size, weights_of, "fsdp2", ONE_PARAMETER, F64, "AdaDiag", options
    )
    torch.testing.assert_close(got[0][0], want[0], atol=1e-6, rtol=1e-6)


def test_shards_by_columns_agree_and_need_no_communication_for_wide_matrices(
    monkeypatch,
):
    cases = (Case("wide", (6, 12)), Case("wider", (8, 16)))
    options = {"distribution": "broadcast", "basis": "eigh", "nonfinite": "ignore"}
    want = alone(cases, F64, "AdaDiag", options)
    counted = Counted()
    with counted.watching(monkeypatch):
        ran = run_threads(2, by_columns, cases, options)
    # Whether all gradients of step 1 are zero; Gram matrices and bases of 3 refreshes.
    assert counted.calls == 1 + 3 * 2
    for weights, report in ran:
        assert report.collectives_per_step == 0
        assert report.ranks[0].bytes_per_step == 0
        for a, b in zip(weights, want):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def by_columns(rank, cases, options):
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Parameters(cases, F64)
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1))
    weights, opt = train(model, cases, F64, "AdaDiag", options)
    return weights, opt.describe()


class Counted:
    """Counts the collectives of one rank and the bytes it hands to them."""

    def __init__(self):
        self.calls, self.bytes = 0, 0

    @contextlib.contextmanager
    def watching(self, monkeypatch):
        to_all, to_sum = ProcessGroup.start_all_to_all, ProcessGroup.all_reduce_sum_
        to_max = ProcessGroup.all_reduce_max_

        def all_to_all(comm, target, source, received, sent):
            self.count(comm, source.nbytes)
            return to_all(comm, target, source, received, sent)

        def all_reduce_sum_(comm, tensor):
            self.count(comm, tensor.nbytes)
            to_sum(comm, tensor)

        def all_reduce_max_(comm, tensor):
            self.count(comm, tensor.nbytes)
            to_max(comm, tensor)

        with monkeypatch.context() as patch:
            patch.setattr(ProcessGroup, "start_all_to_all", all_to_all)
            patch.setattr(ProcessGroup, "all_reduce_sum_", all_reduce_sum_)
            patch.setattr(ProcessGroup, "all_reduce_max_", all_reduce_max_)
            yield

    def count(self, comm, size):
        if comm.rank == 1:
            self.calls += 1
            self.bytes += size


@pytest.mark.parametrize("method", [AdaDiag, AdafacDiag, HfacDiag])
@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("distribution", ["owner", "broadcast", "auto"])
@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_collectives_and_bytes_are_those_that_describe_promises(
    layout, distribution, sides, method, monkeypatch
):
    options = {"sides": sides, "distribution": distribution}
    ordinary = promised_and_made(layout, method, options, monkeypatch)
    if method is AdaDiag and distribution == "owner":
        assert ordinary[0] == (3 if layout == "fsdp2" else 2)


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
@pytest.mark.parametrize("method", [AdaDiag, AdafacDiag])
@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_a_noise_floor_costs_the_collective_that_describe_promises(
    layout, method, nonfinite, monkeypatch
):
    """A broadcast step needs the norm of the whole gradient for it."""
    options = {"distribution": "broadcast", "nonfinite": nonfinite}
    none = promised_and_made(layout, method, options, monkeypatch)
    options["noise_floor"] = 1e-3
    some = promised_and_made(layout, method, options, monkeypatch)
    assert some[0] == none[0] + 1


def promised_and_made(layout, method, options, monkeypatch):
    """Steps 2 and 3 are ordinary, step 4 refreshes every basis (T = 3)."""
    seen = {}
    cases = tuple(c for c in HARD_CASES if not c.without_gradient)

    def body(rank):
        model, extra = sharded_model(layout, cases, torch.float32)
        opt = method(groups(model, cases), refresh_every=3, **options, **extra)
        for step in range(4):
            dist.barrier()
            set_gradients(model, cases, step, torch.float32)
            before = (counted.calls, counted.bytes)
            dist.barrier()
            opt.step()
            if rank == 1:
                after = (counted.calls, counted.bytes)
                seen[step] = tuple(b - a for a, b in zip(before, after))
        return opt.describe()

    counted = Counted()
    with counted.watching(monkeypatch):
        report = run_threads(3, body)[1]
    ordinary = report.collectives_per_step, report.ranks[1].bytes_per_step
    assert seen[1] == seen[2] == ordinary
    assert seen[3] == (
        ordinary[0] + report.refresh_collectives,
        ordinary[1] + report.ranks[1].refresh_bytes,
    )
    return ordinary


def set_gradients(model, cases, step, dtype):
    named = dict(model.named_parameters())
    for case, grad in zip(cases, gradients(cases, step, dtype)):
        param = named[case.name]
        if case.frozen or case.without_gradient:
            continue
        if isinstance(param, DTensor):
            grad = distribute_tensor(
                grad, param.device_mesh, param.placements, src_data_rank=None
            )
        param.grad = grad


def test_an_owner_sends_and_receives_two_models_over_the_ranks():
    """2 x numel / world elements per rank and step, however many ranks."""
    cases = tuple(Case(f"w{i}", (24, 24)) for i in range(8))
    numel = 8 * 24 * 24
    for world_size in (2, 4, 8):
        reports = run_threads(world_size, described, cases, {"distribution": "owner"})
        sent = [row.bytes_per_step for row in reports[0].ranks]
        away = 2 * 4 * numel * (world_size - 1) / world_size**2
        headers = 2 * 8 * (world_size - 1) + 4 * (len(cases) + 4)
        assert max(sent) == min(sent) == away + headers


def described(rank, cases, options):
    model, _ = sharded_model("fsdp2", cases, torch.float32)
    opt = AdaDiag(groups(model, cases), **options)
    return opt.describe()


@pytest.mark.parametrize("distribution", ["owner", "auto"])
def test_states_are_sharded_on_the_60m_shapes(distribution):
    """Meta tensors of LLaMA 60M on 4 ranks: the real states, without the memory."""
    per_rank = run_threads(4, bytes_of_60m, distribution)
    whole = run_threads(1, bytes_of_60m, distribution)[0]
    mean = sum(per_rank) / 4
    assert max(per_rank) <= 1.15 * mean
    if distribution == "owner":
        assert sum(per_rank) == pytest.approx(whole, rel=0.02)


def bytes_of_60m(rank, distribution):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(32000, 512))
        for _ in range(8):
            shapes = [(512, 512)] * 4 + [(512, 1376)] * 2 + [(1376, 512)]
            linears = [nn.Linear(a, b, bias=False) for a, b in shapes]
            model.append(fully_shard(nn.Sequential(*linears), mesh=mesh))
        model.append(nn.Linear(512, 32000, bias=False))
    fully_shard(model, mesh=mesh)
    return AdaDiag(param_groups(model), distribution=distribution).state_bytes()


class Widening(nn.Module):
    """A regression model whose gradients have full rank on the rotated side."""

    def __init__(self, dtype):
        super().__init__()
        self.first = nn.Linear(8, 12, dtype=dtype)
        self.second = nn.Linear(12, 8, dtype=dtype)
        # Ranks that are threads share the global random state.
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for param in self.parameters():
                param.uniform_(-0.3, 0.3, generator=generator)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def backward_steps(rank, world_size, layout, dtype, distribution):
    """Each rank sees its slice of the same global batch."""
    model = Widening(dtype)
    process_group = None
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(model, mesh=mesh)
    opt = AdaDiag(
        model.parameters(),
        lr=1e-3,
        refresh_every=12,
        distribution=distribution,
        process_group=dist.group.WORLD if layout == "ddp" else process_group,
    )
    generator = torch.Generator().manual_seed(11)
    share = 96 // world_size
    for _ in range(30):
        x = torch.randn(96, 8, generator=generator, dtype=dtype)
        y = torch.randn(96, 8, generator=generator, dtype=dtype)
        mine = slice(rank * share, (rank + 1) * share)
        loss = (model(x[mine]) - y[mine]).square().mean()
        opt.zero_grad()
        loss.backward()
        if layout == "ddp":
            for param in model.parameters():
                dist.all_reduce(param.grad)
                param.grad /= world_size
        opt.step()
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in model.parameters()
    ]


@pytest.mark.multiprocess
@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_real_backward_passes_on_gloo_processes_agree_to_1e_6(layout, distribution):
    check_backward(run_processes, 2, layout, distribution)


@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
@pytest.mark.parametrize(
    "layout,world_size",
    [
        *(("fsdp2", world_size) for world_size in (1, 2, 3, 4, 8)),
        ("ddp", 2),
        ("ddp", 4),
    ],
)
def test_real_backward_passes_agree_to_1e_6(layout, world_size, distribution):
    check_backward(run_threads, world_size, layout, distribution)


def check_backward(run, world_size, layout, distribution):
    dtype = torch.float32
    want = backward_steps(0, 1, "single", dtype, "auto")
    got = run(world_size, backward_steps, world_size, layout, dtype, distribution)
    for weights in got:
        for a, b in zip(weights, want):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0.0)


@pytest.mark.multiprocess
def test_owners_on_gloo_processes_give_the_same_bits():
    options = {"distribution": "owner", "sides": "two"}
    want = alone(HARD_CASES, torch.float32, "AdaDiag", options)
    got = run_processes(
        2, weights_of, "fsdp2", HARD_CASES, torch.float32, "AdaDiag", options
    )
    for case, a, b in zip(HARD_CASES, got[1], want):
        assert_equal(a, b, case.name)


def fresh(layout="fsdp2", **options):
    model, extra = sharded_model(layout, NAMED, torch.float32)
    return model, AdaDiag(groups(model, NAMED), **options, **extra)


NAMED = (Case("a_weight", (8, 6)), Case("b_weight", (6, 8)), Case("c_bias", (5,)))


def snapshot(model, opt):
    tensors = [p.detach() for p in model.parameters()]
    tensors += [v for s in opt.state.values() for v in s.values()]
    return [(t.to_local() if isinstance(t, DTensor) else t).clone() for t in tensors]


def errors_of(rank, poison, options):
    """The error each rank gets if only the last rank's gradient is poisoned."""
    model, opt = fresh(**options)
    set_gradients(model, NAMED, 0, torch.float32)
    opt.step()
    before = snapshot(model, opt)
    set_gradients(model, NAMED, 1, torch.float32)
    if rank == dist.get_world_size() - 1:
        dict(model.named_parameters())["b_weight"].grad.to_local()[0, 0] = poison
    try:
        opt.step()
        message = ""
    except RuntimeError as error:
        message = str(error)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, snapshot(model, opt)))
    set_gradients(model, NAMED, 2, torch.float32)
    opt.step()  # a refused step leaves the optimizer usable
    return message, unchanged, opt.skipped_steps


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
def test_a_nonfinite_gradient_on_one_rank_is_refused_on_all(distribution, poison):
    for message, unchanged, _ in run_threads(
        3, errors_of, poison, {"distribution": distribution}
    ):
        assert "b_weight" in message
        assert "NaN or Inf" in message
        assert unchanged


def test_skipping_skips_the_whole_step_on_every_rank_and_counts_it():
    for message, unchanged, skipped in run_threads(
        3, errors_of, math.nan, {"nonfinite": "skip"}
    ):
        assert message == ""
        assert unchanged
        assert skipped == 1


def mismatched(rank, what):
    shapes = {"a": (8, 6), "b": (6, 8)}
    if rank == 1:
        shapes = {
            "shape": {"a": (8, 6), "b": (6, 9)},
            "name": {"a": (8, 6), "c": (6, 8)},
            "count": {"a": (8, 6)},
            "options": shapes,
        }[what]
    params = [(name, nn.Parameter(torch.ones(s))) for name, s in shapes.items()]
    for _, param in params:
        param.grad = torch.ones_like(param)
    sides = "two" if rank == 1 and what == "options" else "one"
    opt = AdaDiag(params, process_group=dist.group.WORLD, sides=sides)
    with pytest.raises(ValueError, match="every rank of the group") as caught:
        opt.step()
    return str(caught.value)


@pytest.mark.parametrize("what", ["shape", "name", "count", "options"])
def test_ranks_with_different_parameters_all_raise_the_same_error(what):
    messages = run_threads(3, mismatched, what)
    assert len(set(messages)) == 1
    assert "rank 1" in messages[0]


def failing_owner(rank, distribution):
    model, opt = fresh(distribution=distribution)
    owner = opt.describe().matrices[0].owner
    set_gradients(model, NAMED, 0, torch.float32)
    try:
        opt.step()
    except RuntimeError as error:
        return owner, str(error)
    return owner, ""


@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
def test_an_owner_that_fails_takes_all_ranks_down_with_one_message(
    distribution, monkeypatch
):
    from sharded_adadiag import blocks
    from sharded_adadiag.algorithm import update

    real = update.compute_basis

    def out_of_memory(grad, **rest):
        if tuple(grad.shape) == (8, 6):
            raise MemoryError("no room for the SVD")
        return real(grad, **rest)

    monkeypatch.setattr(update, "compute_basis", out_of_memory)
    monkeypatch.setattr(blocks, "compute_basis", out_of_memory)
    results = run_threads(3, failing_owner, distribution)
    owner = results[0][0]
    for rank, (_, message) in enumerate(results):
        assert f"a_weight: its owner, rank {owner}, could not compute" in message
        assert ("no room for the SVD" in message) == (rank == owner)


@pytest.mark.multiprocess
def test_errors_come_within_seconds_on_gloo_processes():
    start = time.monotonic()
    for message, unchanged, _ in run_processes(2, errors_of, math.nan, {}):
        assert "b_weight" in message
        assert unchanged
    assert time.monotonic() - start < 100.0


def test_a_basis_is_computed_on_exactly_one_rank(monkeypatch):
    """Counts decompositions over 4 ranks and 2 refreshes in each distribution."""
    from sharded_adadiag import blocks
    from sharded_adadiag.algorithm import update

    calls = []
    real = update.compute_basis

    def counting(grad, **options):
        calls.append(tuple(grad.shape))
        return real(grad, **options)

    monkeypatch.setattr(update, "compute_basis", counting)
    monkeypatch.setattr(blocks, "compute_basis", counting)
    for distribution in ("owner", "broadcast"):
        calls.clear()
        run_threads(4, four_steps, distribution)
        assert sorted(calls) == sorted([(8, 6), (6, 8)] * 2)


def four_steps(rank, distribution):
    model, opt = fresh(distribution=distribution, refresh_every=3)
    for step in range(4):
        set_gradients(model, NAMED, step, torch.float32)
        opt.step()


def first_zero_step(rank, distribution):
    """What torch's state-dict helpers do: a step with zero gradients and lr 0."""
    model, opt = fresh(distribution=distribution)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    named = dict(model.named_parameters())
    keys = {name: sorted(opt.state[param]) for name, param in named.items()}
    steps = [float(state["step"]) for state in opt.state.values()]
    return keys, steps


@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
def test_a_zero_first_step_creates_every_key_on_every_rank_and_counts_nothing(
    distribution,
):
    results = run_threads(4, first_zero_step, distribution)
    for keys, steps in results:
        assert keys == results[0][0]
        assert keys["a_weight"] == ["exp_avg", "exp_avg_sq", "rotation_right", "step"]
        assert keys["b_weight"] == ["exp_avg", "exp_avg_sq", "rotation_left", "step"]
        assert keys["c_bias"] == ["exp_avg", "exp_avg_sq", "step"]
        assert steps == [0.0, 0.0, 0.0]
