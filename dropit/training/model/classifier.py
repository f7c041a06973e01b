"""The LightningModule: an image classifier, its loss and its accuracies."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from dropit.training.solver.optimizer import build_optimizer
from dropit.training.solver.recipe import Recipe
from dropit.training.solver.schedule import build_schedule

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """Trains ``model`` (images (N, 3, H, W) -> logits (N, num_classes)) with cross-entropy.

    Labels are class numbers (N,) or, where images are mixed, probabilities (N, num_classes).
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        recipe: Recipe,
        *,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model
        self.recipe = recipe
        self.channels_last = channels_last
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.val_criterion = nn.CrossEntropyLoss()
        self.val_loss = MeanMetric()  # Lightning's mean rounds the numbers of samples of several processes
        self.accuracy = MetricCollection(
            {f"val/acc{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro") for k in (1, 5)}
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of (N, 3, H, W) images."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        images, labels = batch
        loss: Tensor = self.criterion(self(images), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update loss and accuracies over the validation set and all processes; each sample counts once."""
        images, labels = batch
        logits = self(images)
        self.accuracy.update(logits, labels)
        self.val_loss.update(self.val_criterion(logits, labels), len(images))
        self.log("val/loss", self.val_loss)
        self.log_dict(self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimizer and schedule; the schedule steps once an epoch."""
        optimizer = build_optimizer(self.model, self.recipe)
        return {"optimizer": optimizer, "lr_scheduler": build_schedule(optimizer, self.recipe)}
