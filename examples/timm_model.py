"""DropIT with timm: its model, mixup, loss, optimizer and schedule, in a loop like that of timm's train.py.

python examples/timm_model.py [epochs]
"""

import sys

import torch
from sklearn.datasets import load_digits
from timm import create_model
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch.utils.data import DataLoader, TensorDataset, random_split

import dropit

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 8
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # (1797, 1, 8, 8)
train, val = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])

# timm's ViT, smaller still, for images of 8 x 8.
size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
model = create_model("vit_tiny_patch16_224", embed_dim=96, depth=3, **size)
mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=10)
loss_fn = SoftTargetCrossEntropy()
optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=1e-3)

with dropit.CacheMeter(model, retain=False) as plain:
    loss = loss_fn(model(images[:64]), torch.full((64, 10), 0.1))
dropit.to_dropit(model, "fastmink", gamma=0.9)
with dropit.CacheMeter(model, retain=False) as meter:
    loss = loss_fn(model(images[:64]), torch.full((64, 10), 0.1))
mib = 2**20
print(f"cache     {meter.total_bytes / mib:.2f} MiB saved for backward, {plain.total_bytes / mib:.2f} plain")

for epoch in range(EPOCHS):
    model.train()
    losses = AverageMeter()
    for samples, labels in DataLoader(train, batch_size=64, shuffle=True, drop_last=True):
        samples, targets = mixup(samples, labels)
        loss = loss_fn(model(samples), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(samples))
    scheduler.step(epoch + 1)
    print(f"loss      {losses.avg:.4f} in epoch {epoch + 1}")

model.eval()
top1 = AverageMeter()
with torch.no_grad():
    for samples, labels in DataLoader(val, batch_size=128):
        top1.update(accuracy(model(samples), labels)[0].item() / 100, len(labels))
print(f"accuracy  {top1.avg:.4f}")
