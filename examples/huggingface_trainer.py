"""DropIT under transformers.Trainer, which needs no change: a small ViT on scikit-learn's digits.

python examples/huggingface_trainer.py [epochs]
"""

import sys
import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import dropit

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
set_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # (1797, 1, 8, 8)
rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, digits.target, strict=True)]
train, val = [row for i, row in enumerate(rows) if i % 5], rows[::5]


def cache_mib(model: ViTForImageClassification) -> float:
    """What a training step of 64 images saves for backward."""
    model.train()
    with dropit.CacheMeter(model, retain=False) as meter:
        output = model(images[:64], labels=torch.tensor(digits.target[:64]))
    del output
    return meter.total_bytes / 2**20


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The part of the images that is classified right."""
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


size = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
width = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 3}
model = ViTForImageClassification(ViTConfig(**size, **width))
plain = cache_mib(model)
dropit.to_dropit(model, "fastmink", gamma=0.9)
print(f"cache     {cache_mib(model):.2f} MiB saved for backward, {plain:.2f} plain")

with tempfile.TemporaryDirectory() as output_dir:
    options = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "epoch"}
    arguments = TrainingArguments(
        output_dir, num_train_epochs=EPOCHS, per_device_train_batch_size=64, learning_rate=2e-3, **options
    )
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=val, compute_metrics=compute_metrics)
    trainer.train()
    for line in trainer.state.log_history:
        if "loss" in line:
            print(f"loss      {line['loss']:.4f} in epoch {line['epoch']:.0f}")
    print(f"accuracy  {trainer.evaluate()['eval_accuracy']:.4f}")
