"""The kernels give what the reference gives, bit for bit. Without a GPU Triton's interpreter runs them."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from torch import nn

import dropit
from dropit import ops
from dropit.ops import reference, triton
from dropit.ops.reference import Rescaling
from dropit.packed import flatten
from tests.ops.test_cpu import awkward, bits_of, same
from tests.ops.test_reference import scattered_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("n", [1, 100, 256, 300, 2000, 4096 + 7])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_packing_and_unpacking(dtype, n):
    rng = np.random.default_rng(n)
    for count in (1, 26, 60, 256):
        rest = n % 256
        rest_count = max(1, round(rest * count / 256)) if rest else 0
        flat, layout = flatten(awkward(rng, n, dtype).to(DEVICE))
        arguments = (flat, 256, count, rest_count, layout._replace(per_block=count))
        packed, expected = triton.pack_largest(*arguments), reference.pack_largest(*arguments)
        same(packed, expected)
        assert torch.equal(bits_of(triton.unpack(packed)), bits_of(reference.unpack(packed)))


@pytest.mark.parametrize("count", [1, 100, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_positions_with_counts_and_in_bits(dtype, count):
    x = torch.randn(2, 3, 250).to(dtype).to(DEVICE).transpose(1, 2)
    flat, layout = flatten(x)
    packed = reference.pack_largest(flat, 1500, count, 0, layout)
    dense, expected = triton.unpack(packed), reference.unpack(packed)
    assert torch.equal(dense, expected)
    assert dense.stride() == expected.stride() == x.stride()


@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.int8])
def test_narrower_values(value_dtype):
    flat, layout = flatten(torch.randn(1000, device=DEVICE))
    arguments = (flat, 256, 60, 50, layout._replace(per_block=60), value_dtype)
    packed = triton.pack_largest(*arguments)
    same(packed, reference.pack_largest(*arguments))
    assert torch.equal(triton.unpack(packed), reference.unpack(packed))


@pytest.mark.parametrize("n", [1, 63, 256, 2500])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_marks(dtype, n):
    rng = np.random.default_rng(n)
    flat, grad = (awkward(rng, n, dtype).to(DEVICE) for _ in range(2))
    for lower, upper in ((0.0, float("inf")), (-1.0, 0.1)):
        x = torch.nn.functional.hardtanh(flat, lower, upper)
        bits = triton.range_bitmask(x, lower, upper)
        assert torch.equal(bits, reference.range_bitmask(x, lower, upper))
        assert torch.equal(bits_of(triton.apply_bitmask(grad, bits)), bits_of(reference.apply_bitmask(grad, bits)))


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("n", [1, 31, 32, 65, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantization(dtype, n, bits, noisy):
    if bits == 16 and dtype.itemsize == 2:
        pytest.skip("takes no less")
    x = (torch.randn(n) * 10 ** torch.linspace(-6, 3, n)).to(dtype).to(DEVICE)
    x[:: max(1, n // 3)] = 0
    noise = torch.rand_like(x) if noisy else None
    steps, scales = triton.quantize(x, bits, noise)
    expected_steps, expected_scales = reference.quantize(x, bits, noise)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(steps, expected_steps)
    dense = triton.dequantize(steps, scales, dtype, n)
    assert torch.equal(dense, reference.dequantize(steps, scales, dtype, n))


@pytest.mark.parametrize("n", [1, 3, 63, 64, 66, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantization_to_levels(dtype, n):
    for x in (
        torch.randn(n),
        torch.randn(n).relu() + 3,
        torch.full((n,), -2.5),
        torch.randn(n) * 10 ** torch.linspace(-6, 3, n),
    ):
        x = x.to(dtype).to(DEVICE)
        codes, scales = triton.quantize(x, 2)
        expected_codes, expected_scales = reference.quantize(x, 2)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(triton.dequantize(codes, scales, dtype, n), reference.dequantize(codes, scales, dtype, n))


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's, in the interpreter
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_levels_over_the_whole_range_and_of_what_is_not_finite(dtype):
    x = scattered_groups(np.random.default_rng(2), dtype, 100).flatten()[:-5].to(DEVICE)
    if dtype is torch.bfloat16 and DEVICE == "cpu":
        x[x.abs() < torch.finfo(dtype).tiny] = 0  # which Triton's interpreter converts to other numbers
    x[5::170] = torch.tensor([float("nan"), float("inf"), -float("inf")]).to(x).repeat(20)[: len(x[5::170])]
    codes, scales = triton.quantize(x, 2)
    expected_codes, expected_scales = reference.quantize(x, 2)
    assert torch.equal(bits_of(scales.flatten()), bits_of(expected_scales.flatten()))
    assert torch.equal(codes, expected_codes)
    dense, expected = (module.dequantize(codes, scales, dtype, len(x)) for module in (triton, reference))
    assert torch.equal(dense.isnan(), expected.isnan())
    assert torch.equal(bits_of(dense.nan_to_num(0)), bits_of(expected.nan_to_num(0)))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("sections", "inner"), [(7, 64), (3, 32), (5, 49), (6, 1), (1, 100)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantization_of_what_is_normalized(dtype, sections, inner, bits, centered):
    x = torch.randn(2 * sections * inner).to(dtype).to(DEVICE)
    wide = torch.promote_types(dtype, torch.float32)
    mean, rstd = torch.randn(sections, 1).to(wide).to(DEVICE), torch.rand(sections, 1).to(wide).to(DEVICE)
    statistics = ops.Statistics(mean if centered else None, rstd, inner)
    steps, scales = triton.quantize(x, bits, None, statistics)
    expected_steps, expected_scales = reference.quantize(reference.normalize(x, statistics), bits)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(steps, expected_steps)


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's, in the interpreter
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantization_over_the_whole_range_and_of_what_is_not_finite(dtype, bits):
    x = scattered_groups(np.random.default_rng(bits), dtype, 100).flatten()[:-5].to(DEVICE)
    if dtype is torch.bfloat16 and DEVICE == "cpu":
        x[x.abs() < torch.finfo(dtype).tiny] = 0  # which Triton's interpreter converts to other numbers
    x[5::70] = torch.tensor([float("nan"), float("inf"), -float("inf")]).to(x).repeat(20)[: len(x[5::70])]
    steps, scales = triton.quantize(x, bits)
    expected_steps, expected_scales = reference.quantize(x, bits)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(steps, expected_steps)
    dense = triton.dequantize(steps, scales, dtype, len(x))
    expected = reference.dequantize(steps, scales, dtype, len(x))
    assert torch.equal(dense.isnan(), ~x.isfinite())
    assert torch.equal(bits_of(dense), bits_of(expected))


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize(("sections", "inner"), [(1, 50), (7, 1), (128, 1), (3, 64), (5, 49)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_restored_and_rescaled(dtype, bits, sections, inner):
    x = torch.randn(3 * sections * inner).to(dtype).to(DEVICE)
    x[:1] = float("nan")
    codes, scales = reference.quantize(x, bits)
    if scales.dtype is not torch.bfloat16 and dtype is not torch.float64:
        pytest.skip("takes no less")
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.randn(sections, device=DEVICE) for _ in range(2))
    for by in (
        Rescaling(weight, bias, inner),
        Rescaling(weight.to(dtype), None, inner, 0.0),
        Rescaling(None, bias, inner, -0.5, 0.75),
        Rescaling(weight.to(wide), bias.to(wide), inner, 0.0, dtype=torch.bfloat16),
    ):
        dense, expected = (module.dequantize(codes, scales, dtype, len(x), by) for module in (triton, reference))
        assert dense.dtype is expected.dtype
        assert torch.equal(dense.isnan(), expected.isnan())
        if DEVICE == "cpu":
            assert torch.equal(dense.nan_to_num(0), expected.nan_to_num(0))
        else:  # where product and sum are rounded once
            rounding = 4 * torch.finfo(dense.dtype).eps
            torch.testing.assert_close(dense, expected, rtol=rounding, atol=4 * rounding, equal_nan=True)


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_nothing_may_be_quantized(bits):
    steps, scales = triton.quantize(torch.empty(0, 3, device=DEVICE), bits)
    assert steps.numel() == scales.numel() == 0
    assert triton.dequantize(steps, scales, torch.float32, 0).numel() == 0


def test_training_is_the_same(monkeypatch):
    curves = []
    for module in (triton, reference):
        monkeypatch.setattr(ops, "backend", lambda x, module=module: module)
        monkeypatch.setattr(ops, "_has_kernels", lambda x, module=module: module is triton)
        torch.manual_seed(0)
        layers = [nn.Linear(600, 600), nn.LayerNorm(600), nn.GELU(), nn.Linear(600, 10)]
        model = dropit.to_dropit(nn.Sequential(*layers), gamma=0.9, compress="int8").to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x, y = torch.randn(30, 600, device=DEVICE), torch.randint(10, (30,), device=DEVICE)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
