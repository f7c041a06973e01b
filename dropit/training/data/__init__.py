"""The data: data sets, transforms, and how the samples reach the model."""
