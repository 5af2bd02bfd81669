"""The class that trainers call with the model when they want its optimizer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag, model_factory, param_groups
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_threads

EXCLUDE = ["layers.*.router.weight"]
PLAIN_NAMES = ["embedding.weight", "layers.0.router.weight", "layers.1.router.weight"]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.up = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return x + self.up(x) * self.router(x).softmax(-1).amax(-1, keepdim=True)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for param in self.parameters():
                param.normal_(generator=generator)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


class Mine(AdaDiag):
    """An optimizer of a user."""


class MineFactory(model_factory(Mine)):
    """A factory of a user, with an option of its own."""

    def __call__(self, model, *args, **options):
        return super().__call__(model, *args, lr=0.5, **options)


def sorted_out(optimizer):
    """What is in a group besides the parameters, group by group."""
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("optimizer", [AdaDiag, AdafacDiag, HfacDiag, Mine])
@pytest.mark.parametrize("arguments", [(), (object(),)], ids=["Trainer", "axolotl"])
def test_it_makes_what_the_param_groups_of_the_model_make(optimizer, arguments):
    model, options = Model(), {"lr": 0.1, "refresh_every": 7}
    want = optimizer(param_groups(model, exclude=EXCLUDE), **options)
    made = model_factory(optimizer)()(model, *arguments, exclude=EXCLUDE, **options)
    assert type(made) is optimizer
    assert sorted_out(made) == sorted_out(want)
    assert made.param_groups[1]["param_names"] == PLAIN_NAMES
    for ours, theirs in zip(made.param_groups, want.param_groups):
        assert all(a is b for a, b in zip(ours["params"], theirs["params"]))


def test_transformers_takes_it_for_a_factory():
    trainer_optimizer = pytest.importorskip(
        "transformers.trainer_optimizer", reason="the extra [examples] is missing"
    )
    assert trainer_optimizer.is_optimizer_factory(model_factory(AdaDiag))


def test_there_is_one_class_for_an_optimizer_and_it_says_what_it_is():
    made = model_factory(AdaDiag)
    assert made is model_factory(AdaDiag)
    assert made is not model_factory(HfacDiag) and made is not model_factory(Mine)
    assert isinstance(made, type) and made.__name__ == "AdaDiagFactory"
    assert "AdaDiag" in made.__doc__
    assert repr(made) == "model_factory(AdaDiag)"
    assert repr(made()) == "model_factory(AdaDiag)()"
    assert repr(MineFactory).startswith("<class ")


@pytest.mark.parametrize(
    "made", [model_factory(AdaDiag), model_factory(Mine), MineFactory]
)
def test_it_can_be_pickled_and_copied(made):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(made, protocol)) is made
        assert type(pickle.loads(pickle.dumps(made(), protocol))) is made
    assert copy.deepcopy(made) is made


def test_a_factory_of_a_user_may_extend_it():
    assert MineFactory()(Model()).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.optim.AdamW, "got AdamW, it must be the class AdaDiag"),
        (AdaDiag(param_groups(Model())), "got an object of <class '.*AdaDiag'>, it"),
        ([AdaDiag], "got an object of <class 'list'>, it must be the class AdaDiag"),
    ],
)
def test_it_is_made_of_our_optimizers_only(wrong, text):
    with pytest.raises(TypeError, match=text):
        model_factory(wrong)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"device_mesh": None}, TypeError, "AdaDiag has no option 'device_mesh'"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"exclude": "gate.*"}, ValueError, "'gate.*' matches none of the model's 5"),
    ],
)
def test_errors_are_those_of_the_optimizer_and_of_the_groups(options, error, text):
    with pytest.raises(error, match=text):
        model_factory(AdaDiag)()(Model(), **options)


def test_parameters_are_not_taken_for_a_model():
    with pytest.raises(TypeError, match="expected an nn.Module, got list"):
        model_factory(AdaDiag)()(list(Model().parameters()))


def trained(rank, before):
    """Weights by name; the optimizer is made before or after FSDP2 shards the model."""
    model, make = Model(), model_factory(AdaDiag)()
    options = {"exclude": EXCLUDE, "lr": 0.1, "refresh_every": 2}
    if before:
        opt = make(model, **options)
    names = {param: name for name, param in model.named_parameters()}
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    if before:
        # As accelerate does: position by position in the group's own list.
        for group in opt.param_groups:
            for i, param in enumerate(group["params"]):
                group["params"][i] = model.get_parameter(names[param])
    else:
        opt = make(model, **options)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        model(torch.randint(16, (12,), generator=generator)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    matrices = [line.name for line in opt.describe().matrices]
    return {n: p.full_tensor() for n, p in model.named_parameters()}, matrices


def test_it_may_be_called_before_or_after_fsdp2_shards_the_model():
    for before, after in zip(
        run_threads(2, trained, True), run_threads(2, trained, False)
    ):
        assert before[1] == after[1] == ["layers.0.up.weight", "layers.1.up.weight"]
        for name, weight in before[0].items():
            assert_equal(weight, after[0][name], name)
