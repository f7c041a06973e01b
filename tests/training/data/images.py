"""What the tests of data share: images of noise, and their samples and keys."""

import numpy as np
from PIL import Image

from dropit.training.data.sampler import SharedBatches
from dropit.training.data.samples import Samples
from dropit.training.data.transforms import eval_transform, train_transform

HALF = ([0.5] * 3, [0.5] * 3)
PLAIN = ([0.0] * 3, [1.0] * 3)


def transform(size=32, values=PLAIN, *, crop="none", flip=False, **options):
    return train_transform(size, *values, crop=crop, crop_scale=(0.05, 0.1), flip=flip, **options)


class Photos:
    """``count`` images of noise; the label is the index."""

    def __init__(self, count, size=16):
        self.classes = tuple(map(str, range(count)))
        self.size = size

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index


def samples(count=20, *, seed=1, random=True, **options):
    augment = train_transform(16, *HALF, crop="pad", crop_scale=(1, 1), flip=True)
    return Samples(Photos(count), augment if random else eval_transform(16, *HALF, resize=0), seed=seed, **options)


def keys(count, batch_size, *, epoch=0, **options):
    batches = SharedBatches(samples(count, seed=options.pop("seed", 1)), batch_size, **{"train": True, **options})
    batches.set_epoch(epoch)
    taken = list(batches)
    assert len(taken) == len(batches)
    return taken


def flat(batches):
    return [key for batch in batches for key in batch]
