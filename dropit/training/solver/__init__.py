"""The optimizer, its parameter groups, and the learning rate of each epoch."""
