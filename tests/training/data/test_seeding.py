import contextlib

import torch

from dropit.training.data.seeding import derive_seed, preserved_generator


def test_an_own_generator_leaves_torchs_where_it_was():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with contextlib.suppress(ValueError), preserved_generator() as generator:
        generator.manual_seed(9)
        torch.rand(2)
        raise ValueError
    assert torch.equal(torch.rand(4), expected)


def test_seeds_depend_on_every_part_and_its_place():
    parts = [(1, 2, 3), (1, 3, 2), (1, 2), (1, 2, 0), (12, 3), (0, 1, 2, 3)]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert seeds == [derive_seed(*part) for part in parts]
    assert all(0 <= seed < 2**32 for seed in seeds)
