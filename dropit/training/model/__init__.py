"""The model: architectures, pretrained weights, frozen and sharded parts, and the LightningModule."""
