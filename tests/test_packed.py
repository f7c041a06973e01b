import pytest
import torch

from dropit.packed import (
    Layout,
    Packed,
    dense_nbytes,
    flatten,
    index_in,
    keep_dense,
    memory_order,
    packed_nbytes,
    unflatten,
)

LAYOUTS = {
    "contiguous": torch.arange(120.0).view(2, 3, 4, 5),
    "channels_last": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.arange(120.0).view(2, 3, 4, 5).transpose(0, 3),
    "sliced": torch.arange(240.0).view(2, 6, 4, 5)[:, ::2],
    "expanded": torch.arange(5.0).expand(2, 3, 4, 5),
    "one channel": torch.arange(40.0).view(2, 1, 4, 5),
    "1-D": torch.arange(7.0),
    "scalar": torch.tensor(3.0),
}


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
def test_unflatten_undoes_flatten_in_any_layout(x):
    flat, layout = flatten(x)
    assert flat.shape == (x.numel(),)
    assert torch.equal(unflatten(flat, layout), x)


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "transposed"])
def test_flatten_copies_nothing_where_the_tensor_has_no_gaps(name):
    x = LAYOUTS[name]
    flat, layout = flatten(x)
    assert flat.data_ptr() == x.data_ptr()
    assert unflatten(flat, layout).stride() == x.stride()


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
def test_of_dimensions_of_equal_strides_the_first_is_the_outermost(x):
    assert memory_order(x) == tuple(sorted(range(x.dim()), key=lambda dim: -x.stride(dim)))


def test_packed_counts_what_it_stores():
    packed = Packed(
        torch.zeros(3), torch.zeros(2, dtype=torch.uint8), None, Layout(torch.Size((2, 5)), torch.float32, (0, 1))
    )
    assert packed.nbytes == packed_nbytes(10, 3, torch.float32) == 3 * 4 + 2
    assert not packed.is_dense


def test_a_dense_tensor_is_kept_by_reference():
    x = torch.zeros(2, 3)
    assert keep_dense(x).values.data_ptr() == x.data_ptr()
    assert keep_dense(x).is_dense
    assert keep_dense(x).nbytes == 24


def test_dense_bytes_count_an_expanded_element_once():
    assert dense_nbytes(torch.zeros(4, 5)) == 80
    assert dense_nbytes(torch.zeros(5).expand(4, 5)) == 20


def test_the_arithmetic_of_more_than_two_to_the_31_elements():
    n = 2**33
    x = torch.empty(n, device="meta")
    assert dense_nbytes(x) == 4 * n
    assert packed_nbytes(n, n // 10, torch.float32) == 5 * (n // 10) + n // 128  # offsets
    assert packed_nbytes(n, n // 2, torch.float32) == 2 * n + n // 8  # bits


PARTS = {
    "an integer": lambda x: x[1],
    "an inner one": lambda x: x[:, :, 2],
    "slices": lambda x: x[1:, :2, 1:3],
    "both": lambda x: x[0, 1:, 3, 2:4],
    "of chunks": lambda x: x.chunk(2, dim=1)[1],
    "all": lambda x: x,
    "one element": lambda x: x[1, 2, 3, 4],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_the_index_of_a_part(part):
    x = torch.arange(240.0)[120:].view(2, 3, 4, 5)
    assert torch.equal(x[index_in(x, part(x))], part(x))


@pytest.mark.parametrize("part", [lambda x: x[:, ::2], lambda x: x.mT, lambda x: x.flatten(1)[:, 2:30]])
def test_a_part_that_no_index_gives(part):
    x = torch.arange(120.0).view(2, 3, 4, 5)
    assert index_in(x, part(x)) is None
    assert index_in(x.mT, x.mT[1]) is None
