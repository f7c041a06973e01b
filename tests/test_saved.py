import math

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


LAYOUTS = {
    "rows": (torch.randn(6, 5, 64), (64,), ()),
    "rows of two dimensions": (torch.randn(6, 8, 16), (8, 16), ()),
    "channels": (torch.randn(4, 16, 5, 7), (16, 1, 1), ()),
    "channels_last": (torch.randn(4, 16, 5, 7).to(memory_format=torch.channels_last), (16, 1, 1), ()),
    "transposed": (torch.randn(4, 7, 16).mT, (16, 1), ()),
    "one for all": (torch.randn(4, 64), (1,), ()),
    "columns": (torch.randn(64, 4).t(), (64,), ()),
    "not in order": (torch.randn(4, 7, 16).mT, (16, 7), ("generic",)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_dequantized_is_rescaled_bounded_and_cast_in_the_same_step(name, bits, dtype):
    x, shape, generic = LAYOUTS[name]
    packed = quantize(x.to(dtype), bits)
    weight, bias = torch.randn(shape), torch.randn(shape)
    wide = torch.promote_types(dtype, torch.float32)
    dense = ops.unpack(packed if generic else packed._replace(layout=packed.layout._replace(dtype=wide)))
    for w, b in ((weight, bias), (weight, None), (None, bias)):
        saved = Saved.of(packed).affine(w, b)
        rescaled = dense * (1 if w is None else w)
        rescaled = rescaled + (0 if b is None else b)
        narrower = saved.clamp("relu", 0.0, math.inf).cast(torch.bfloat16)
        with torch.no_grad():
            torch.testing.assert_close(saved.restore(), rescaled)
            torch.testing.assert_close(narrower.restore(), rescaled.clamp(min=0).to(torch.bfloat16))
        assert generic or narrower.restore().stride() == x.stride()
        assert len(saved.recipe.steps) == (2 if generic else 1)
        assert generic or len(narrower.recipe.steps) == 1
        assert "-> affine -> relu" in repr(narrower)


def test_factors_of_two_forms_or_of_none_that_fits_are_no_part_of_that_step():
    packed = quantize(torch.randn(4, 64), 8)
    for weight, bias in (
        (torch.randn(1), torch.randn(64)),
        (torch.randn(3, 4, 64), None),
        (torch.randn(64), torch.randn(4, 1)),
    ):
        saved = Saved.of(packed).affine(weight, bias)
        assert len(saved.recipe.steps) == 2
        expected = ops.unpack(packed) * weight + (0 if bias is None else bias)
        torch.testing.assert_close(saved.restore(), expected)
    strided = torch.randn(64, 2)[:, 0]
    saved = Saved.of(packed).affine(strided, None)
    assert len(saved.recipe.steps) == 1
    torch.testing.assert_close(saved.restore(), ops.unpack(packed) * strided)


def test_only_what_comes_next_is_done_in_the_same_step():
    saved = Saved.of(quantize(torch.randn(4, 64), 8)).affine(torch.randn(64), None)
    assert saved.cast(torch.float32) is saved
    assert len(saved.cast(torch.float64).recipe.steps) == 2  # which is wider
    assert len(saved.cast(torch.bfloat16).clamp("relu", 0.0, 1.0).recipe.steps) == 1
    assert len(saved.clamp("relu", 0.0, 1.0).clamp("relu", 0.5, 1.0).recipe.steps) == 2
    assert len(saved.map("gelu", torch.nn.functional.gelu).clamp("relu", 0.0, 1.0).recipe.steps) == 3
    assert Saved.of(quantize(torch.randn(4, 64), 8)).affine(None, None).recipe.steps[0].rescaling is None
