"""Shard the weights over the processes by FSDP2, block by block."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard

from dropit.training.model.classifier import Classifier


class ShardedClassifier(Classifier):
    """A Classifier of whose weights each process keeps a part; they are gathered one block at a time."""

    def configure_model(self) -> None:
        """Shard the model, once; Lightning calls this when the processes are connected."""
        if not getattr(self, "_sharded", False):
            shard(self.model, self.device_mesh["data_parallel"])  # type: ignore[index]
            self._sharded = True


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard each block of ``model``, and the rest with the model itself. Returns the model."""
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules with children in each Sequential or ModuleList."""
    found: list[nn.Module] = []
    for child in model.children():
        is_row = isinstance(child, (nn.Sequential, nn.ModuleList))
        if isinstance(model, (nn.Sequential, nn.ModuleList)) and not is_row and list(child.children()):
            found.append(child)
        else:
            found += blocks(child)
    return found
