import math

import numpy as np
import pytest
import torch

from dropit import ops
from dropit.ops import reference
from dropit.packed import flatten

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def first_largest(score: np.ndarray, k: int) -> np.ndarray:
    """The specification, by a stable sort: the k largest of a row, the first of equal ones."""
    mask = np.zeros(len(score), dtype=bool)
    mask[np.argsort(-score, kind="stable")[:k]] = True
    return mask


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_magnitudes_order_as_the_floats_do(dtype):
    x = torch.tensor([0.0, -0.0, 1e-7, -1.0, 1.5, -65504.0, float("inf"), -float("inf"), float("nan")]).to(dtype)
    score = ops.magnitude(x)
    assert score.tolist() == sorted(score.tolist())
    assert score[0] == score[1]
    assert score[6] == score[7] < score[8]


def test_topk_mask_is_the_stable_sort_with_ties_everywhere():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, n = rng.integers(1, 5), rng.integers(1, 70)
        k = int(rng.integers(1, n + 1))
        score = rng.integers(0, rng.integers(1, 2 * n), size=(rows, n)).astype(np.int32)
        expected = np.stack([first_largest(row.astype(np.int64), k) for row in score])
        assert np.array_equal(ops.topk_mask(torch.from_numpy(score), k).numpy(), expected)


def test_a_thousand_arrays_with_ties_nan_and_inf_against_a_stable_sort():
    rng = np.random.default_rng(1)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0], dtype=np.float32)
    for _ in range(1000):
        n = int(rng.integers(1, 100))
        k = int(rng.integers(1, n + 1))
        x = rng.standard_normal(n).astype(np.float32)
        where = rng.random(n) < 0.4
        x[where] = rng.choice(special, where.sum())
        score = np.where(np.isnan(x), np.inf, np.abs(x.astype(np.float64)))
        score = np.where(np.isinf(x), 1e300, score)  # NaN above Inf above the rest
        got = ops.topk_mask(ops.magnitude(torch.from_numpy(x))[None], k)[0]
        assert np.array_equal(got.numpy(), first_largest(score, k))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unpack_puts_the_kept_back_and_zeros_elsewhere(n, dtype):
    x = torch.randn(n).to(dtype)
    mask = torch.rand(n) < 0.3
    packed = ops.pack(x, mask, int(mask.sum()), flatten(x)[1])
    assert torch.equal(ops.unpack(packed), torch.where(mask, x, 0))
    assert packed.values.dtype == dtype


def test_positions_are_a_bit_per_element_lowest_bit_first():
    mask = torch.rand(77) < 0.5
    x, layout = flatten(torch.randn(77))
    positions = ops.pack(x, mask, int(mask.sum()), layout).positions
    assert np.array_equal(positions.numpy(), np.packbits(mask.numpy(), bitorder="little"))


def test_unpack_keeps_channels_last():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    flat, layout = flatten(x)
    dense = ops.unpack(ops.pack(flat, flat > 0, int((flat > 0).sum()), layout))
    assert dense.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dense, x.clamp(min=0))


def test_nan_and_inf_survive():
    x, layout = flatten(torch.tensor([1.0, float("nan"), 2.0, -float("inf")]))
    mask = ops.topk_mask(ops.magnitude(x)[None], 2)[0]
    dense = ops.unpack(ops.pack(x, mask, int(mask.sum()), layout))
    assert dense.isnan().tolist() == [False, True, False, False]
    assert dense[3] == -float("inf")


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000, 70_000])
def test_positions_take_the_smaller_of_bits_and_offsets(n):
    for count in sorted({1, n // 50, n // 10, n // 8, n // 3} - {0}):
        mask = torch.zeros(n, dtype=torch.bool)
        mask[torch.randperm(n)[:count]] = True
        x, layout = flatten(torch.randn(n))
        packed = ops.pack(x, mask, count, layout)
        bits, offsets = -(-n // 8), 2 * -(-n // 256) + count
        assert packed.positions.numel() == min(bits, offsets)
        assert torch.equal(ops.unpack(packed), torch.where(mask, x, 0))


def test_offsets_by_hand():
    mask = torch.zeros(600, dtype=torch.bool)
    mask[[3, 255, 256, 599]] = True
    x, layout = flatten(torch.arange(600.0))
    packed = ops.pack(x, mask, 4, layout)
    assert packed.values.tolist() == [3, 255, 256, 599]
    assert packed.positions.tolist() == [2, 0, 1, 0, 1, 0, 3, 255, 0, 87]


def test_a_whole_block_may_be_kept_where_others_are_empty():
    mask = torch.zeros(256 * 40, dtype=torch.bool)
    mask[256 * 7 : 256 * 8] = True
    x, layout = flatten(torch.randn(256 * 40))
    packed = ops.pack(x, mask, 256, layout)
    assert packed.positions.numel() == 80 + 256
    assert torch.equal(ops.unpack(packed), torch.where(mask, x, 0))


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9, 16, 17, 256])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 100])
def test_small_numbers_come_back_from_the_fewest_bits(limit, n):
    numbers = torch.randint(limit, (n,), dtype=torch.uint8)
    stored = ops.pack_subbyte(numbers, limit)
    bits = next(bits for bits in (1, 2, 4, 8) if limit <= 2**bits)
    assert stored.numel() == -(-n * bits // 8)
    assert torch.equal(ops.unpack_subbyte(stored, limit, n), numbers)


def quantized(x, bits=8, noise=None):
    """x after being stored in so many bits."""
    return ops.dequantize(*ops.quantize(x, bits, noise), x.dtype, x.numel()).view(x.shape)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (127,), (128,), (1000,), (5, 7, 9)], ids=str)
def test_quantized_values_are_within_half_a_step(dtype, shape, bits):
    if bits == 16 and dtype.itemsize == 2:
        pytest.skip("takes no less")
    x = (torch.randn(shape) * 10).to(dtype)
    steps, scales = ops.quantize(x, bits)
    assert steps.nbytes == -(-x.numel() * bits // 8)
    assert scales.shape == (-(-x.numel() // 32),)
    back = ops.dequantize(steps, scales, dtype, x.numel())
    assert back.dtype == dtype
    flat = x.double().flatten()
    half = torch.cat(
        [torch.full_like(group, group.abs().max() / (2 ** (bits - 1) - 1) / 2) for group in flat.split(32)]
    )
    rounding = torch.finfo(dtype).eps * flat.abs()  # of the product, in the tensor's own precision
    # A bfloat16 scale is up to 0.4 % larger than the largest element asks for, a double's up to 3.1 %.
    larger = 1.032 if dtype is torch.float64 else 1.01
    assert ((back.double() - flat).abs() <= half * larger + rounding).all()


def test_quantization_by_hand():
    x = torch.tensor([127.0, -64.0, 0.4, 0.6, -0.5, 1.5] + [0.0] * 26 + [254.0, -3.0])
    steps, scales = ops.quantize(x)
    assert scales.tolist() == [1.0, 2.0]
    assert steps[:6].tolist() == [127, -64, 0, 1, 0, 2]  # ties go to the even step
    assert steps[-2:].tolist() == [127, -2]
    assert ops.dequantize(steps, scales, torch.float32, 34)[-2:].tolist() == [254.0, -4.0]


def test_four_bits_by_hand():
    x = torch.tensor([7.0, -7.0, 0.4, 3.0, -1.0])
    steps, scales = ops.quantize(x, 4)
    assert scales.tolist() == [1.0]
    assert steps.tolist() == [15 + 16 * 1, 8 + 16 * 11, 7]  # 8 steps up, two in a byte, the first one low
    assert ops.dequantize(steps, scales, torch.float32, 5).tolist() == [7.0, -7.0, 0.0, 3.0, -1.0]


def test_sixteen_bits_by_hand():
    x = torch.tensor([32640.0, -32640.0, 0.4, 1000.6] + [0.0] * 28 + [65000.0, 1.0])
    steps, scales = ops.quantize(x, 16)
    assert (steps.dtype, scales.tolist()) == (torch.int16, [1.0, 1.9921875])  # 65000 / 32640, to eight digits
    assert steps[:4].tolist() == [32640, -32640, 0, 1001]
    assert steps[-2:].tolist() == [32627, 1]


def test_two_bits_by_hand():
    """Four levels, evenly spread, are exact; a fifth value goes to the nearest of them."""
    x = torch.tensor([-1.0, 0.5, 2.0, 3.5]).repeat(16)
    codes, scales = ops.quantize(x, 2)
    assert codes.tolist() == [0b11100100] * 16
    assert scales.tolist() == [[-1.0, 1.5]]
    assert torch.equal(quantized(x, 2), x)
    x[0] = -0.9
    assert quantized(x, 2)[0] == pytest.approx(-1.0, abs=0.01)


@pytest.mark.parametrize("n", [1, 5, 64, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_two_bits_take_two_and_a_half_with_offset_and_scale(dtype, n):
    codes, scales = ops.quantize(torch.randn(n, dtype=dtype), 2)
    assert codes.numel() == -(-n // 4)
    assert scales.shape == (-(-n // 64), 2)
    assert scales.dtype is (torch.float64 if dtype is torch.float64 else torch.bfloat16)


@pytest.mark.parametrize(
    "draw",
    [torch.randn, lambda n: torch.randn(n).relu(), lambda n: torch.rand(n) + 5],
    ids=["normal", "behind ReLU", "uniform"],
)
def test_levels_are_nearer_than_those_that_are_evenly_spread_over_the_range(draw):
    x = draw(6400)
    groups = x.view(-1, 64)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    evenly = ((groups - low) / (high - low) * 3).round() / 3 * (high - low) + low
    assert (quantized(x, 2) - x).norm() < 0.99 * (evenly.flatten() - x).norm()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_in_two_bits_each_element_stays_in_its_groups_range(dtype):
    for seed in range(5):
        x = scattered_groups(np.random.default_rng(seed), dtype, 800)
        back = quantized(x, 2)
        assert back.isfinite().all()
        span = x.view(-1, 64).double().aminmax(dim=1)
        off = (back.double() / 2 - x.double() / 2).abs() * 2
        allowed = (span.max / 2 - span.min / 2) * 2 + 0.01 * torch.maximum(span.max.abs(), span.min.abs())
        assert (off.view(-1, 64) <= allowed[:, None] + 2 * torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("looking", [True, False], ids=["", "without looking"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_in_two_bits_a_group_with_an_element_that_is_not_finite_comes_back_as_nan(dtype, looking, monkeypatch):
    if not looking:
        monkeypatch.setattr(reference, "_can_look", lambda x: False)
    x = torch.randn(320).to(dtype)
    x[torch.tensor([3, 130, 319])] = torch.tensor([math.inf, math.nan, -math.inf]).to(dtype)
    back = quantized(x, 2)
    assert back.view(5, 64).isnan().all(dim=1).tolist() == [True, False, True, False, True]
    assert torch.equal(back[64:128], quantized(x[64:128], 2))


def test_two_bits_are_not_rounded_stochastically():
    with pytest.raises(ValueError, match="noise must be None"):
        ops.quantize(torch.randn(64), 2, torch.rand(64))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_stochastic_rounding_is_right_on_average(bits):
    x = torch.linspace(-1, 1, 128)
    mean = torch.stack([quantized(x, bits, torch.rand(128)) for _ in range(2000)]).mean(dim=0)
    step = 1 / (2 ** (bits - 1) - 1)
    torch.testing.assert_close(mean, x, rtol=0, atol=step * 0.08)  # of the mean: step / 2 / sqrt(2000), seven times
    assert (quantized(x, bits, torch.rand(128)) - x).abs().max() <= step * 1.01


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 3e38], ids=str)
def test_quantized_extremes_stay_finite(value, bits):
    x = torch.full((130,), value)
    back = quantized(x, bits)
    assert back.isfinite().all()
    torch.testing.assert_close(back, x, rtol=0.01, atol=1e-36)


def half_steps(x, bits):
    """What each element of groups (g, 32) may be off by, rounded to the nearest step, but for its dtype's rounding."""
    wide = torch.promote_types(x.dtype, torch.float32)
    largest = x.double().abs().amax(dim=1, keepdim=True)
    half = (largest / reference.CODES[bits][0]).clamp(min=torch.finfo(wide).tiny) / 2
    scale_rounding = 1.032 if wide is torch.float64 else 1.004
    return half * scale_rounding + 2 * torch.finfo(wide).eps * largest


def scattered_groups(rng, dtype, count):
    """Groups of 32 whose magnitudes are anywhere in the range of ``dtype``, some with an outlier, zeros or extremes."""
    info = torch.finfo(dtype)
    low, high = np.log2(info.smallest_normal) + np.log2(info.eps), np.log2(info.max)
    top = rng.uniform(low, high, (count, 1)) - rng.choice([0, 0, 1, 20], (count, 32)) * rng.random((count, 32))
    groups = torch.from_numpy(rng.uniform(-1, 1, (count, 32)) * 2.0**top)
    groups[::7, 5] = torch.from_numpy(rng.choice([info.max, -info.max, info.tiny, info.max / 3], len(groups[::7])))
    groups[::11] *= 0
    groups[::13, ::2] = info.max
    return groups.clamp(info.min, info.max).to(dtype)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_each_element_is_within_half_a_step_of_its_group_over_the_whole_range(dtype, bits, stochastic):
    info = torch.finfo(dtype)
    for seed in range(5):
        x = scattered_groups(np.random.default_rng(seed), dtype, 800)
        back = quantized(x, bits, torch.rand(x.shape) if stochastic else None)
        assert back.isfinite().all()
        off = (back.double() / 2 - x.double() / 2).abs() * 2  # the difference itself may be beyond double's range
        allowed = half_steps(x, bits) * (2 if stochastic else 1)
        rounding = info.eps / 2 * (x.double().abs() + allowed) + info.tiny * info.eps
        assert (off <= allowed + rounding).all()


@pytest.mark.parametrize("looking", [True, False], ids=["", "without looking"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_comes_back_as_nan_alone(dtype, bits, looking, monkeypatch):
    if not looking:
        monkeypatch.setattr(reference, "_can_look", lambda x: False)
    x = torch.randn(300).to(dtype)
    odd = torch.tensor([3, 64, 70, 95, 299])
    x[odd] = torch.tensor([math.inf, math.nan, -math.inf, math.nan, math.inf]).to(dtype)
    x[160:192] = math.nan  # nothing else in the group
    back = quantized(x, bits)
    assert torch.equal(back.isnan(), ~x.isfinite())
    assert torch.equal(back.nan_to_num(0), quantized(torch.where(x.isfinite(), x, 0), bits))


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_looking_changes_no_bit(dtype, bits, monkeypatch):
    x = scattered_groups(np.random.default_rng(0), dtype, 500)
    x[::3, 7] = math.inf
    steps, scales = ops.quantize(x, bits)
    back = ops.dequantize(steps, scales, dtype, x.numel())
    monkeypatch.setattr(reference, "_can_look", lambda x: False)
    blind_steps, blind_scales = reference.quantize(x, bits)
    assert torch.equal(blind_steps, steps)
    assert torch.equal(blind_scales.nan_to_num(1), scales.nan_to_num(1))
    blind = reference.dequantize(steps, scales, dtype, x.numel())
    assert torch.equal(magnitude_and_sign(blind), magnitude_and_sign(back))


def magnitude_and_sign(x):
    """The bits, with one NaN for all."""
    return x.masked_fill(x.isnan(), math.nan).view(reference.INTEGER_OF_SIZE[x.element_size()])


def test_the_largest_half_precision_number_comes_back_finite():
    x = torch.full((32,), 65504.0, dtype=torch.float16)
    assert torch.equal(quantized(x), x)  # 127 scales are 65532


def test_small_half_precision_numbers_keep_their_precision():
    x = torch.linspace(-1e-5, 1e-5, 32).half()  # a scale below the least normal number
    assert (quantized(x) - x).abs().max() <= 1e-5 / 127 / 2 * 1.01 + 6e-8


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_restored_bfloat16_is_the_nearest_to_the_step(bits):
    x = torch.randn(3200).bfloat16()
    steps, scales = ops.quantize(x, bits)
    exact = ops.dequantize(steps, scales, torch.float32, 3200)
    assert torch.equal(ops.dequantize(steps, scales, torch.bfloat16, 3200), exact.bfloat16())


def test_doubles_beyond_the_range_of_single_precision():
    x = torch.tensor([1e300, -1e300, 3e299] + [0.0] * 29 + [1e-200, 5e-201], dtype=torch.float64)
    torch.testing.assert_close(quantized(x, 16), x, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_may_be_packed(dtype, bits):
    x = torch.empty(0, 5, dtype=dtype)
    assert quantized(x, bits).shape == x.shape
    assert quantized(x, bits, torch.rand(0, 5)).dtype == dtype
    flat, layout = flatten(x)
    for mask in (None, torch.empty(0, dtype=torch.bool)):
        for value_dtype in (None, torch.int8, torch.bfloat16):
            assert ops.unpack(ops.pack(flat, mask, 0, layout, value_dtype)).numel() == 0
    packed = ops.backend(flat).pack_largest(flat, 256, 26, 0, layout._replace(per_block=26), torch.int8)
    assert ops.unpack(packed).shape == x.shape
    assert ops.pack_bits(torch.empty(0, dtype=torch.bool)).numel() == 0
    assert ops.unpack_bits(torch.empty(0, dtype=torch.uint8), 0).numel() == 0
    assert ops.apply_bitmask(flat, ops.range_bitmask(flat, 0.0, 1.0)).numel() == 0


def test_the_sign_of_a_view_that_negates_is_kept():
    x = torch.randn(4, 8)
    flat, layout = flatten(torch._neg_view(x))
    assert torch.equal(ops.unpack(ops.backend(flat).pack_largest(flat, 32, 32, 0, layout)), -x)
    assert torch.equal(ops.dequantize(*ops.quantize(flat), x.dtype, 32), quantized(-x.flatten()))
    assert torch.equal(ops.apply_bitmask(flat, ops.range_bitmask(flat, 0.0, math.inf)), (-x).clamp(min=0).flatten())
    assert not flatten(torch.randn(4, dtype=torch.complex64).conj())[0].is_conj()


@pytest.mark.parametrize("n", [1000, 1, 130])
def test_all_that_is_kept_needs_no_positions(n):
    x = torch.randn(n)
    packed = ops.pack(x, None, n, flatten(x)[1], torch.bfloat16)
    assert packed.positions is None
    assert packed.nbytes == 2 * n
    assert torch.equal(ops.unpack(packed), x.bfloat16().float())


def test_marks_say_what_is_inside_and_keep_it():
    x = torch.tensor([-1.0, 0.0, 0.5, 6.0, 7.0, float("nan"), float("inf"), -0.0, 3.0])
    assert ops.unpack_bits(ops.range_bitmask(x, 0.0, float("inf")), 9).tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 1]
    bits = ops.range_bitmask(x, 0.0, 6.0)
    assert ops.unpack_bits(bits, 9).tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert ops.apply_bitmask(torch.arange(1.0, 10), bits).tolist() == [0, 0, 3, 0, 0, 6, 0, 0, 9]
