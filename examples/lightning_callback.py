"""DropIT in somebody's own LightningModule: one callback converts it for the fit, and measures.

python examples/lightning_callback.py [epochs]
"""

import sys

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import dropit

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 5


class Digits(LightningModule):
    """A TransformerEncoder over the rows of an image; it knows nothing of DropIT."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.embed = nn.Linear(8, 64)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.place = nn.Parameter(torch.randn(8, 64) / 8)
        self.head = nn.Linear(8 * 64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of (N, 8, 8) images."""
        return self.head(self.encoder(self.embed(images) + self.place).flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Print the epoch's mean."""
        print(f"loss      {self.trainer.callback_metrics['loss_epoch']:.4f} in epoch {self.current_epoch + 1}")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The accuracy, over all batches."""
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


seed_everything(0, verbose=False)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target))
train, val = random_split(data, [0.8, 0.2])
callback = dropit.DropITCallback("fastmink", gamma=0.9)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = Trainer(max_epochs=EPOCHS, accelerator="auto", devices=1, callbacks=[callback], **quiet)
trainer.fit(Digits(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=128))
print(f"cache     {callback.cache_mb:.2f} MiB saved for backward, {callback.dense_mb:.2f} plain")
print(f"accuracy  {trainer.callback_metrics['accuracy']:.4f}")
