import pytest
import torch
from torch import nn

import dropit
from dropit import ops
from dropit.packed import keep_dense
from dropit.policy import quantize
from dropit.saved import Saved
from dropit.strategies import MinK


def test_what_is_packed_is_restored_by_unpacking():
    packed = MinK(0.5).pack(torch.randn(4, 100))
    assert torch.equal(Saved.of(packed).restore(), ops.unpack(packed))


def test_a_function_of_what_is_saved():
    x, shift = torch.randn(3, 4), torch.ones(4)
    saved = Saved.of(keep_dense(x)).map("minus", torch.sub, shift).map("relu", torch.relu)
    assert torch.equal(saved.restore(), (x - 1).relu())
    assert saved.tensors[-1] is shift
    assert saved.cast(torch.bfloat16).restore().dtype is torch.bfloat16


def test_a_recipe_reads_as_the_chain_that_it_computes():
    model = dropit.to_dropit(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)), gamma=0, compress="int8")
    y = model[1](model[0](torch.randn(2, 4, 8, 8)))
    assert repr(model[2].saver.save(y, y)) == "int8 x-hat -> affine -> relu"


@pytest.mark.parametrize("dense", [True, False])
def test_a_step_changes_what_is_restored_in_place_and_never_what_is_saved(dense):
    x = torch.randn(64)
    packed = keep_dense(x) if dense else quantize(x, 8)
    saved = Saved.of(packed).map("twice", lambda x: x * 2, in_place=lambda x: x.mul_(2))
    before = [None if each is None else each.clone() for each in saved.tensors]
    with torch.no_grad():
        first, second = saved.restore(), saved.restore()
    assert torch.equal(first, second)
    assert all(b is None or torch.equal(a, b) for a, b in zip(saved.tensors, before, strict=True))
    assert torch.equal(first, saved.restore())  # with gradients on, where nothing is changed


@pytest.mark.parametrize("index", [(1,), (slice(None), 2), (slice(1, 3), slice(None), 4), (0, 0, slice(2, 5))])
def test_a_part_of_what_is_computed_point_by_point_from_parts(index):
    x, y = torch.randn(3, 1, 6), torch.randn(5, 1)
    saved = Saved.exactly(x).combine("mul", torch.mul, Saved.exactly(y), pointwise=True)
    saved = saved.map("exp", torch.exp, pointwise=True)
    index += (slice(None),) * (3 - len(index))
    assert torch.equal(saved.part(index).restore(), saved.restore()[index])
    assert not saved.map("flip", torch.flip).recipe.pointwise


def test_what_is_rounded_is_not_computed_point_by_point():
    codes, exact = Saved.of(quantize(torch.randn(64), 8)), Saved.exactly(torch.randn(64))
    assert not codes.map("exp", torch.exp, pointwise=True).recipe.pointwise
    assert not exact.combine("mul", torch.mul, codes, pointwise=True).recipe.pointwise
