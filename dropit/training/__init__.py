"""The trainer: config, data, LightningModule and callbacks around torchvision models. Not imported by the library."""
