"""Compare the gradients of the dropping layers with the exact ones, on sampled steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.optim import Optimizer

from dropit import DropITLayer, from_dropit


class GradientProbe(Callback):
    """Computes the exact gradients of every ``every``-th step in a plain copy of the model, and compares.

    Logs histograms over the layers' weights, probe/cosine and probe/relative_error, with the worst of each as
    probe/worst_cosine and probe/worst_relative_error, and the name of the worst weight as text. A probed step takes
    the time of two and the memory of a plain one.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._exact: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compute the exact gradients, with the random numbers that the step itself will draw."""
        if trainer.global_step % self.every:
            return
        images, labels = batch
        with _plain_copy(trainer, pl_module) as plain:
            loss: Tensor = pl_module.criterion(plain(images), labels)  # type: ignore[operator]
        plain.zero_grad()
        loss.backward()
        dropping = set(_weights(pl_module.model))  # type: ignore[arg-type]
        self._exact = {
            name: trainer.strategy.reduce(parameter.grad, reduce_op="mean")  # type: ignore[misc]
            for name, parameter in plain.named_parameters()
            if name in dropping and parameter.grad is not None and parameter.grad.any()  # all 0 before a head of zeros
        }

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compare the step's gradients with the exact ones, and log."""
        if not self._exact:
            return
        ours = dict(pl_module.model.named_parameters())  # type: ignore[operator, arg-type, union-attr]
        names = [name for name in self._exact if ours[name].grad is not None]
        pairs = [(ours[name].grad.double().flatten(), self._exact[name].double().flatten()) for name in names]
        self._exact = {}
        if not trainer.is_global_zero or trainer.logger is None or not pairs:
            return
        cosine = torch.stack([cosine_similarity(grad, exact, dim=0) for grad, exact in pairs])
        error = torch.stack([(grad - exact).norm() / exact.norm().clamp(min=1e-30) for grad, exact in pairs])
        board, step = trainer.logger.experiment, trainer.global_step  # type: ignore[attr-defined]
        board.add_histogram("probe/cosine", cosine, step)
        board.add_histogram("probe/relative_error", error, step)
        board.add_scalar("probe/worst_cosine", cosine.min(), step)
        board.add_scalar("probe/worst_relative_error", error.max(), step)
        board.add_text("probe/worst_layer", names[int(error.argmax())], step)


@contextmanager
def _plain_copy(trainer: Trainer, pl_module: LightningModule) -> Iterator[nn.Module]:
    """Yield a plain copy of the model, in the trainer's precision; random states are restored afterwards."""
    plain = from_dropit(copy.deepcopy(pl_module.model))  # type: ignore[arg-type]
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
        yield plain


def _weights(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradients dropping approximates."""
    return [
        f"{fqn}.{name}" if fqn else name
        for fqn, module in model.named_modules()
        if isinstance(module, DropITLayer) and module.drops_input
        for name, parameter in module.named_parameters()
        if parameter.dim() > 1
    ]
