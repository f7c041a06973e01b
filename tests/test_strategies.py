import copy
import dataclasses
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dropit import STRATEGIES, ops
from dropit.strategies import FastMinK, MinK, MinKChannels, Random, RandomChannels, make_strategy


def kept(strategy, x, **dims):
    """What the strategy keeps of x, zeros elsewhere."""
    return ops.unpack(strategy.pack(x, **dims))


def largest(x, k):
    """By hand: x with all but its k largest magnitudes set to zero; the first of equal ones stay."""
    order = np.argsort(-np.abs(x.double().numpy()), kind="stable")[:k]
    out = torch.zeros_like(x)
    out[order] = x[order]
    return out


@pytest.mark.parametrize(
    ("n", "gamma", "count"),
    [(1000, 0.9, 100), (100, 0.9, 10), (10, 0.9, 1), (5, 0.9, 1), (1, 0.9, 1), (30, 0.7, 9), (1000, 0.3, 700)],
)
def test_the_count_is_rounded_and_never_zero(n, gamma, count):
    assert MinK(gamma).count(n) == count
    assert int(n * (1 - gamma)) <= count  # cutting instead of rounding loses one of these


@pytest.mark.parametrize("strategy", [MinK(0.9), FastMinK(0.9), FastMinK(0.9, block_size=64), Random(0.9)], ids=str)
@pytest.mark.parametrize("n", [40, 64, 100, 1000, 16384, 20000])
def test_exactly_count_elements_are_stored(strategy, n):
    packed = strategy.pack(torch.randn(n))
    assert packed.values.shape == (strategy.count(n),)
    assert packed.positions.numel() <= math.ceil(n / 8)
    assert packed.positions.dtype == torch.uint8


def test_mink_keeps_the_largest_by_magnitude_of_all():
    x = torch.randn(999)
    assert torch.equal(kept(MinK(0.9), x), largest(x, 100))
    assert (kept(MinK(0.9), x) < 0).any()


def test_fastmink_keeps_the_largest_of_each_block_and_of_the_rest():
    x = torch.randn(70)
    by_hand = torch.cat([largest(x[:32], 8), largest(x[32:64], 8), largest(x[64:], 2)])
    assert torch.equal(kept(FastMinK(0.75, block_size=32), x), by_hand)


def test_one_block_is_the_whole_tensor_when_it_is_small():
    x = torch.randn(500)
    assert torch.equal(kept(FastMinK(0.9), x), kept(MinK(0.9), x))


def test_of_equal_magnitudes_the_first_stay():
    x = torch.tensor([1.0, -1.0] * 50)
    assert torch.equal(kept(MinK(0.9), x)[:10], x[:10])
    assert kept(MinK(0.9), x)[10:].count_nonzero() == 0


def test_random_draws_without_replacement_from_pytorchs_generator():
    x = torch.ones(1000)
    torch.manual_seed(1)
    first = kept(Random(0.9), x)
    torch.manual_seed(1)
    assert torch.equal(first, kept(Random(0.9), x))
    assert not torch.equal(first, kept(Random(0.9), x))
    assert first.sum() == 100


def test_random_with_a_seed_leaves_pytorchs_generator_alone():
    x = torch.ones(1000)
    before = torch.get_rng_state()
    first = kept(Random(0.9, seed=3), x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, kept(Random(0.9, seed=3), x))
    assert not torch.equal(first, kept(Random(0.9, seed=4), x))


def test_a_copy_of_a_seeded_strategy_starts_again():
    strategy = Random(0.9, seed=3)
    x = torch.ones(1000)
    first = kept(strategy, x)
    assert torch.equal(first, kept(copy.deepcopy(strategy), x))
    assert torch.equal(first, kept(pickle.loads(pickle.dumps(strategy)), x))


def test_random_keeps_every_element_equally_often():
    counts = sum(kept(Random(0.5), torch.ones(64)) for _ in range(400))
    assert counts.min() > 140  # 200 expected, standard deviation 10
    assert counts.max() < 260


@pytest.mark.parametrize(
    "x",
    [torch.randn(100), torch.arange(100), torch.randn(0), torch.randn(4).expand(25, 4), torch.randn(1)],
    ids=["gamma 0", "integers", "empty", "expanded", "one element"],
)
def test_what_would_not_shrink_stays_dense(x):
    gamma = 0.0 if x.shape == (100,) and x.is_floating_point() else 0.9
    packed = MinK(gamma).pack(x)
    assert packed.values.data_ptr() == x.data_ptr()
    assert packed.is_dense


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_packed_is_always_smaller_than_dense(dtype):
    for n in range(1, 40):
        for gamma in (0.02, 0.05, 0.1, 0.5, 0.9):
            x = torch.randn(n).to(dtype)
            packed = MinK(gamma).pack(x)
            assert packed.is_dense or packed.nbytes < x.nbytes


@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_narrow_values_take_fewer_bytes_and_are_the_kept_ones_rounded(name, dtype, value_dtype, gamma):
    seed = {"seed": 1} if "random" in name else {}
    x = torch.randn(4, 40, 64).to(dtype)
    exact = make_strategy(name, gamma, **seed).pack(x, channel_dim=1)
    packed = make_strategy(name, gamma, **seed).pack(x, channel_dim=1, value_dtype=value_dtype)
    if value_dtype.itemsize >= dtype.itemsize:
        assert packed.values.dtype == dtype
        assert packed.nbytes == exact.nbytes
        return
    assert packed.values.dtype == value_dtype
    assert packed.nbytes < exact.nbytes
    assert packed.nbytes == make_strategy(name, gamma).nbytes(x, 1, 0, value_dtype) or gamma == 0.0
    got, kept_exactly = ops.unpack(packed), ops.unpack(exact)
    assert got.dtype == dtype
    step = x.abs().max().item() / (127 if value_dtype is torch.int8 else 256)
    torch.testing.assert_close(got, kept_exactly, rtol=0, atol=step)
    assert not got[kept_exactly == 0].any()


def test_packing_is_the_same_for_any_number_of_threads():
    x = torch.randn(200_000).round(decimals=1)  # many ties
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(kept(FastMinK(0.9), x))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_mink_c_keeps_the_channels_of_the_largest_norm():
    x = torch.randn(3, 10, 4, 5)
    x[:, 7] *= 10
    x[:, 2] *= 5
    got = kept(MinKChannels(0.8), x, channel_dim=1)
    expected = torch.zeros_like(x)
    expected[:, [2, 7]] = x[:, [2, 7]]
    assert torch.equal(got, expected)
    assert torch.equal(kept(MinKChannels(0.8), x.movedim(1, -1)), expected.movedim(1, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_of_channels_rank_as_in_double(dtype):
    x = (torch.randn(64, 40, 33) * torch.linspace(100, 400, 40).view(1, 40, 1)).to(dtype)  # squares beyond float16
    channels = kept(MinKChannels(0.8), x, channel_dim=1).any(2).all(0).nonzero().squeeze(1)
    assert channels.tolist() == sorted(x.double().norm(dim=(0, 2)).topk(8).indices.tolist())


def test_channels_are_stored_whole_with_a_bit_each():
    x = torch.randn(3, 20, 4, 5)
    packed = MinKChannels(0.9).pack(x, channel_dim=1)
    assert packed.values.shape == (3, 2, 4, 5)
    assert packed.positions.shape == (3,)
    assert packed.nbytes == MinKChannels(0.9).nbytes(x, 1, 0, x.dtype)


def test_of_channels_with_equal_norms_the_first_stays():
    x = torch.ones(2, 8, 3)
    assert kept(MinKChannels(0.9), x, channel_dim=1).sum(dim=(0, 2)).tolist() == [6, 0, 0, 0, 0, 0, 0, 0]


def test_random_channels_are_drawn_without_replacement():
    x = torch.ones(2, 50, 3)
    first = kept(RandomChannels(0.9, seed=1), x, channel_dim=1)
    assert first.sum(dim=(0, 2)).count_nonzero() == 5
    assert torch.equal(first, kept(RandomChannels(0.9, seed=1), x, channel_dim=1))


def test_channels_last_stays_so():
    x = torch.randn(3, 20, 4, 5).to(memory_format=torch.channels_last)
    assert kept(MinKChannels(0.9), x, channel_dim=1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", [MinK, FastMinK, Random])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_per_sample_a_large_sample_does_not_empty_the_others(kind, batch_dim):
    x = torch.randn(4, 5, 100)
    x.select(batch_dim, 2).mul_(1000)
    got = kept(kind(0.9, per_sample=True), x, batch_dim=batch_dim)
    each = x.numel() // x.shape[batch_dim] // 10
    others = [dim for dim in range(3) if dim != batch_dim]
    assert got.count_nonzero(dim=others).tolist() == [each] * x.shape[batch_dim]


def test_per_sample_is_each_samples_own_choice():
    x = torch.randn(4, 70)
    strategy = FastMinK(0.75, per_sample=True, block_size=32)
    by_hand = torch.stack([kept(FastMinK(0.75, block_size=32), row) for row in x])
    assert torch.equal(kept(strategy, x), by_hand)
    assert torch.equal(kept(strategy, x.t().contiguous().t()), by_hand)  # in any layout


@pytest.mark.parametrize("gamma", [7.0, 1.0, -0.1, float("nan"), float("inf")])
def test_a_gamma_out_of_range_is_refused(gamma):
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\), got"):
        make_strategy("mink", gamma)


@pytest.mark.parametrize("gamma", ["0.9", None, True])
def test_a_gamma_of_another_type_is_refused(gamma):
    with pytest.raises(TypeError, match="gamma must be a number"):
        make_strategy("mink", gamma)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "topk"}, "unknown strategy 'topk'; choose from fastmink, mink, random, mink_c, random_c"),
        ({"name": "mink", "block_size": 64}, "strategy 'mink' takes no block_size"),
        ({"name": "fastmink", "block_size": 0}, "block_size must be at least 1, got 0"),
        ({"name": "fastmink", "seed": 1}, "strategy 'fastmink' takes no seed"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_strategy(**arguments)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_are_made_by_name(name):
    assert make_strategy(name, 0.5) == STRATEGIES[name](gamma=0.5)
    assert {"fastmink", "mink", "random", "mink_c", "random_c"} == STRATEGIES.keys()


@pytest.mark.parametrize("gamma", [0.5, 0.9])
@pytest.mark.parametrize("name", STRATEGIES)
def test_more_than_two_to_the_31_elements_are_counted_right(name, gamma):
    """Shapes alone, on the meta device: nothing is allocated."""
    x = torch.empty(3, 2**20, 2**10 + 1, device="meta")
    strategy = make_strategy(name, gamma)
    packed = strategy.pack(x)
    assert packed.nbytes == strategy.nbytes(x, 2, 0, x.dtype)
    kept = x.numel() * (1 - gamma)
    assert 3.98 * kept < packed.nbytes < 4 * kept + x.numel() / 7
    assert ops.unpack(packed).shape == x.shape


def test_what_compilers_are_given_of_gamma_takes_no_part_in_what_a_strategy_is():
    strategy = MinK(0.25)
    assert repr(strategy) == "MinK(gamma=0.25, per_sample=False)"
    assert strategy == pickle.loads(pickle.dumps(strategy)) == dataclasses.replace(MinK(0.5), gamma=0.25)
    assert strategy.count(100) == pickle.loads(pickle.dumps(strategy)).count(100) == 75
    assert dataclasses.replace(strategy, gamma=0.5).count(100) == 50


def test_a_strategy_may_check_its_arguments_itself():
    @dataclass(frozen=True)
    class Own(MinK):
        def __post_init__(self):
            pass

    assert Own(0.25).count(100) == 75
