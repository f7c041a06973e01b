"""The order in which samples are drawn, and their batches, shared between processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from dropit.training.data.samples import Key, Samples
from dropit.training.data.seeding import ORDER, derive_seed
from dropit.training.errors import SetupError


class SharedBatches(DistributedSampler[list[Key]]):
    """Yields the keys of each batch of one process in an epoch; ``batch_size`` is that of one process.

    Process ``rank`` of ``world`` takes every world-th sample of each global batch, so that the processes together see
    what one process would see in batches ``world`` times as large. DDP needs the same number of non-empty batches in
    each process: in training the last batch is filled up from the epoch's beginning; in validation, where nothing may
    be seen twice, a remainder of fewer than ``world`` samples joins the batch before. ``repeats``: each image is drawn
    so many times in a row, while the length of an epoch stays. ``start``: batches that the next iteration skips;
    ``taken``: batches that the loader has yielded.

    A DistributedSampler, so that Lightning neither replaces nor wraps it.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        *,
        train: bool,
        rank: int = 0,
        world: int = 1,
        repeats: int = 1,
    ) -> None:
        super().__init__(samples, num_replicas=world, rank=rank, shuffle=train, seed=samples.seed)
        self.count, self.repeats = len(samples), repeats
        self.start = self.taken = 0
        self.global_batch = batch_size * world
        if self.count < world:
            kind = "training" if train else "validation"
            raise SetupError(
                f"NUM_GPUS {world}: the {self.count} {kind} image{'s' * (self.count > 1)} cannot be shared between "
                f"so many processes"
            )

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.global_batch)
        if not self.shuffle and whole and rest < self.num_replicas:
            return whole
        return whole + (rest > 0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; another one starts at its beginning."""
        if epoch != self.epoch:
            self.start = self.taken = 0
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self._order()
        self.taken = self.start
        end = self.count + (-self.count % self.num_replicas if self.shuffle else 0)
        for number in range(self.start, len(self)):
            first = number * self.global_batch
            last = end if number == len(self) - 1 else first + self.global_batch
            places = torch.arange(first + self.rank, last, self.num_replicas) % self.count
            repeat = places % self.repeats
            yield [Key(epoch, *pair) for pair in zip(order[places].tolist(), repeat.tolist(), strict=True)]

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.count)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, self.epoch))
        return torch.randperm(self.count, generator=generator).repeat_interleave(self.repeats)[: self.count]
