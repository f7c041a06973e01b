"""DropIT in a loop of your own: a small convnet on scikit-learn's digits. One line of it is DropIT's.

python examples/plain_loop.py [epochs]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import dropit

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 4
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)
held_out = torch.arange(len(labels)) % 5 == 0


def block(inside: int, outside: int) -> nn.Sequential:
    """Convolution, normalization, ReLU."""
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())


def cache_mib(model: nn.Module) -> float:
    """What a training step of 64 images saves for backward."""
    with dropit.CacheMeter(model, retain=False) as meter:
        loss = cross_entropy(model(images[:64]), labels[:64])
    del loss
    return meter.total_bytes / 2**20


model = nn.Sequential(block(1, 32), block(32, 64), nn.MaxPool2d(2), block(64, 64), nn.Flatten(), nn.Linear(1024, 10))
plain = cache_mib(model)
dropit.to_dropit(model, "fastmink", gamma=0.9, compress="int8")
print(f"cache     {cache_mib(model):.2f} MiB saved for backward, {plain:.2f} plain")

optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for epoch in range(EPOCHS):
    losses = []
    for batch in torch.randperm(len(labels))[~held_out].split(64):
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss      {sum(losses) / len(losses):.4f} in epoch {epoch + 1}")

model.eval()
with torch.no_grad():
    right = model(images[held_out]).argmax(1) == labels[held_out]
print(f"accuracy  {right.float().mean():.4f}")
