"""The table of what a rule keeps of a matrix."""

import pytest
import torch
from support.training import CLASSES
from torch import nn

from sharded_adadiag.algorithm.spec import StateSpec
from sharded_adadiag.testing.assertions import assert_equal

ROTATION = StateSpec(("m", "m"), "copy")
SIDES = {"none": (False, False), "one": (True, False), "two": (True, True)}


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", CLASSES)
def test_the_table_lists_what_a_trained_matrix_has(name, sides):
    weight = nn.Parameter(torch.ones(3, 5))
    weight.grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    opt = CLASSES[name]([{"params": [weight], "rotate": True}], sides=sides)
    opt.step()
    left, right = SIDES[sides]
    options = opt._binding.prepared().entries[0].spec.options
    table = CLASSES[name].rule.states(options, left=left, right=right)
    state = {key: value for key, value in opt.state[weight].items() if key != "step"}
    assert [*state] == [*table]
    for key, spec in table.items():
        assert tuple(state[key].shape) == spec.shape((3, 5), (3, 5))


def test_a_rule_without_a_first_moment_has_none_in_its_table():
    weight = nn.Parameter(torch.ones(3, 5))
    groups = [{"params": [weight], "rotate": True}]
    opt = CLASSES["AdafacDiag"](groups, momentum=False)
    opt.describe()
    options = opt._binding.prepared().entries[0].spec.options
    table = CLASSES["AdafacDiag"].rule.states(options, left=True, right=False)
    assert [*table] == ["exp_avg_sq_row", "exp_avg_sq_col", "rotation_left"]
    assert [*opt.state[weight]] == ["step", *table]


def test_a_block_is_as_large_as_the_rank_s_and_a_copy_as_the_matrix():
    moment = StateSpec(("m", "n"), power=1)
    assert moment.shape((2, 5), (6, 5)) == (2, 5)
    assert StateSpec(("n",), power=2).shape((2, 5), (6, 5)) == (5,)
    assert ROTATION.shape((2, 5), (6, 5)) == (6, 6)
    assert ROTATION.shape((0, 5), (0, 0)) == (0, 0)
    dtypes = torch.bfloat16, torch.float32
    assert moment.dtype(*dtypes) == torch.bfloat16
    assert ROTATION.dtype(*dtypes) == torch.float32


def test_a_copy_begins_as_the_identity_and_a_block_as_zeros():
    stack = torch.full((2, 3, 3), torch.nan)
    ROTATION.begin(stack)
    assert_equal(stack, torch.eye(3).expand(2, 3, 3))
    StateSpec(("m", "m")).begin(stack)
    assert_equal(stack, torch.zeros(2, 3, 3))
