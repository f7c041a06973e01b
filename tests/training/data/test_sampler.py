import pytest

from dropit.training.data.sampler import SharedBatches
from dropit.training.data.samples import Key
from dropit.training.errors import SetupError
from tests.training.data.images import flat, keys, samples


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own():
    first, again, second = keys(20, 8), keys(20, 8), keys(20, 8, epoch=1)
    assert first == again
    assert [len(batch) for batch in first] == [8, 8, 4]
    assert [key.sample for key in flat(first)] != [key.sample for key in flat(second)]
    for epoch, batches in enumerate((first, second)):
        assert {key.epoch for key in flat(batches)} == {epoch}
        assert sorted(key.sample for key in flat(batches)) == list(range(20))
    assert flat(keys(20, 8, seed=2)) != flat(first)


def test_validation_is_in_order():
    assert flat(keys(20, 8, train=False, epoch=3)) == [Key(3, index, 0) for index in range(20)]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("count", [24, 25, 47])
def test_processes_see_together_what_one_alone_would_see(world, train, count):
    alone = keys(count, 12, train=train)
    together = [keys(count, 12 // world, train=train, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in together}) == 1  # or one would wait for the others forever
    joined = [sorted(key for share in shares for key in share) for shares in zip(*together, strict=True)]
    if train:
        assert all(len({len(share) for share in shares}) == 1 for shares in zip(*together, strict=True))
        missing = [len(mixed) - len(whole) for mixed, whole in zip(joined, alone, strict=True)]
        filling = flat(alone)[: missing[-1]]
        assert joined == [sorted(whole) for whole in [*alone[:-1], alone[-1] + filling]]
        assert missing[:-1] == [0] * (len(alone) - 1)
    else:
        assert sorted(flat(joined)) == flat(alone)
        assert all(share for batches in together for share in batches)


def test_a_batch_of_one_in_validation_is_shared_out_whole():
    shares = [keys(5, 1, train=False, rank=rank, world=2) for rank in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[1, 2], [1, 1]]


def test_too_few_samples_for_the_processes_are_refused():
    with pytest.raises(SetupError, match="NUM_GPUS 3: the 2 validation images cannot be shared"):
        keys(2, 4, train=False, world=3)
    with pytest.raises(SetupError, match="NUM_GPUS 2: the 1 training image cannot be shared"):
        keys(1, 4, world=2)


def test_repeats_draw_an_image_several_times_in_a_row_in_an_epoch_of_the_same_length():
    drawn = flat(keys(20, 8, repeats=3))
    assert len(drawn) == 20
    assert [key.repeat for key in drawn] == ([0, 1, 2] * 7)[:20]
    rows = [{key.sample for key in drawn[start : start + 3]} for start in range(0, 18, 3)]
    assert [len(row) for row in rows] == [1] * 6
    assert len(set.union(*rows)) == 6


def test_start_leaves_out_what_was_taken_and_only_in_its_epoch():
    batches = SharedBatches(samples(), 4, train=True)
    batches.set_epoch(1)
    whole = list(batches)
    batches.start = 2
    batches.set_epoch(1)
    assert list(batches) == whole[2:]
    assert len(batches) == 5
    batches.set_epoch(2)
    assert len(list(batches)) == 5
