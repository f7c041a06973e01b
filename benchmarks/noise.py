"""The error that each arm of a study adds to the gradients, beside what batches differ by: why accuracy falls, or not.

    python benchmarks/noise.py benchmarks/studies/cifar100_resnet20.yaml [--data DIR] [--moments 0.1 0.5 1]
                               [--batches 32] [--output DIRECTORY] [--quick]

The plain arm is trained; at each moment, a part of its steps, the gradients of some more batches are computed as each
arm does and exactly. For each weight g is the exact gradient of a batch, e what an arm's differs from it by:

- noise: the mean of |e|^2 over the batches, by the variance of g between batches (the mean of |g - mean g|^2). SGD
  cannot tell from the noise that it has anyway what is small beside 1.
- bias: |mean e| / |mean g|, over all weights together: what stays however many batches are averaged. Both squares are
  estimated without what the mean of so few batches adds to them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accuracy import PLAIN, RESULTS, Study
from pytorch_lightning import Callback, LightningModule, Trainer
from report import environment, table
from torch import Tensor
from yacs.config import CfgNode

from dropit.training.builders.data import build_data
from dropit.training.builders.machine import autocast
from dropit.training.builders.model import build_module
from dropit.training.builders.trainer import build_trainer
from dropit.training.data.loading import ImageData
from dropit.training.data.samples import Key
from dropit.training.model.classifier import Batch, Classifier
from dropit.training.run.start import start

ROOT = Path(__file__).resolve().parent.parent
HARMLESS = 0.01  # of the noise


@dataclass
class Moments:
    """The sum of vectors, and of their squares, by weight; and the square of the sum after each vector."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    running: list[float] = field(default_factory=list)

    def add(self, vectors: dict[str, Tensor]) -> None:
        """Count one vector of each weight."""
        for name, vector in vectors.items():
            self.sums[name] = self.sums.get(name, 0) + vector.double()
            self.squares[name] = self.squares.get(name, 0.0) + vector.double().square().sum().item()
        self.running.append(sum(total.square().sum().item() for total in self.sums.values()))

    def mean_square(self, name: str) -> float:
        """Return the mean of |v|^2."""
        return self.squares[name] / len(self.running)

    def variance(self, name: str) -> float:
        """Return the mean of |v - mean v|^2, without bias."""
        n = len(self.running)
        return (self.squares[name] - self.sums[name].square().sum().item() / n) / (n - 1)

    def square_of_mean(self) -> float:
        """Return |mean v|^2 of all weights together, without bias."""
        n = len(self.running)
        return self.running[-1] / n**2 - sum(map(self.variance, self.squares)) / n


def batches(data: ImageData, count: int) -> Iterator[Batch]:
    """Yield batches of training images without replacement, augmented as in an epoch that training never reaches."""
    places = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).tolist()
    size = min(data.batch_size, len(places) // count)
    for first in range(0, count * size, size):
        yield data.train.finish(data.train.load([Key(1_000_000, place, 0) for place in places[first : first + size]]))


def gradients(classifier: Classifier, batch: Batch, cfg: CfgNode) -> dict[str, Tensor]:
    """Return those of the weights that are matrices or kernels, by name."""
    classifier.zero_grad()
    with autocast(cfg):
        loss = classifier.criterion(classifier(batch[0]), batch[1])
    loss.backward()
    return {name: p.grad for name, p in classifier.model.named_parameters() if p.dim() > 1 and p.grad is not None}


def measure(arms: dict[str, Classifier], trained: Classifier, data: ImageData, count: int, cfg: CfgNode) -> Any:
    """Return, by arm, the noise of each weight, the bias, and the bias that is seen in 1, 2, ... batches."""
    for classifier in arms.values():
        classifier.load_state_dict(trained.state_dict())
        classifier.to(trained.device).train()
    exact, errors = Moments(), {arm: Moments() for arm in arms if arm != PLAIN}
    for images, labels in batches(data, count):
        batch = images.to(trained.device), labels.to(trained.device)
        plain = {name: grad.clone() for name, grad in gradients(arms[PLAIN], batch, cfg).items()}
        exact.add(plain)
        for arm, error in errors.items():
            grads = gradients(arms[arm], batch, cfg)
            error.add({name: grads[name] - plain[name] for name in plain})
    of = exact.square_of_mean()
    of = of if of > 0 else float("nan")  # too few batches to tell the gradient from noise
    between = sum(map(exact.variance, exact.squares))
    found = {
        arm: {
            "noise": {name: error.mean_square(name) / exact.variance(name) for name in error.squares},
            "bias": (max(error.square_of_mean(), 0.0) / of) ** 0.5,
            "mean of n": [(square / of) ** 0.5 / n for n, square in enumerate(error.running, 1)],
        }
        for arm, error in errors.items()
    }
    return found | {PLAIN: {"mean of n": [(between / n / of) ** 0.5 for n in range(1, count + 1)]}}


class Watch(Callback):
    """Measures at parts of the training, and ends it after the last one."""

    def __init__(self, arms: dict[str, Classifier], cfg: CfgNode, moments: list[float], count: int) -> None:
        self._arms, self._cfg, self._count = arms, cfg, count
        self._waiting = sorted(moments)
        self.found: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure if it is time."""
        steps = trainer.estimated_stepping_batches
        while self._waiting and trainer.global_step >= round(self._waiting[0] * steps):
            moment = self._waiting.pop(0)
            arms = measure(self._arms, pl_module, trainer.datamodule, self._count, self._cfg)
            self.found.append({"moment": moment, "step": trainer.global_step, "arms": arms})
            print(f"measured after {trainer.global_step} of {steps} steps", flush=True)
        trainer.should_stop = not self._waiting


def report(found: list[dict[str, Any]]) -> str:
    """Return the table: of each arm and moment the noise of the median weight and of the worst, and the bias."""
    header = ["arm", *(f"{each['moment']:.0%}: noise, worst, bias" for each in found)]
    rows = []
    for arm in (arm for arm in found[0]["arms"] if arm != PLAIN):
        cells = []
        for each in found:
            noise = list(each["arms"][arm]["noise"].values())
            cells.append(f"{statistics.median(noise):.2g}, {max(noise):.2g}, {each['arms'][arm]['bias']:.1%}")
        rows.append([arm, *cells])
    return table(header, rows)


def draw(path: Path, title: str, found: list[dict[str, Any]]) -> None:
    """Draw the noise of each weight at each moment, and at the last the bias that batches do not average out."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dropit"
    from matplotlib import pyplot as plt

    panels = len(found) + 1
    figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 4.5), layout="constrained")
    arms = [arm for arm in found[0]["arms"] if arm != PLAIN]
    for axis, each in zip(axes, found, strict=False):
        for arm in arms:
            noise = [value or float("nan") for value in each["arms"][arm]["noise"].values()]  # none of exact ones
            axis.plot(noise, ".-", label=arm)
        axis.axhline(HARMLESS, color="0.6", linestyle=":")
        axis.set(yscale="log", ylim=(1e-7, 1e2), xlabel="weight, in the order of the layers")
        axis.set_title(f"after {each['moment']:.0%} of the steps", fontsize=10)
    axes[0].set_ylabel("squared error / variance between batches")
    axes[0].legend(fontsize=7)
    last = found[-1]["arms"]
    for arm in [*arms, PLAIN]:
        values = last[arm]["mean of n"]
        style = {"color": "0.3", "linestyle": "--", "label": "what exact ones differ by"} if arm == PLAIN else {}
        axes[-1].plot(range(1, len(values) + 1), values, **style)
    axes[-1].set(xscale="log", yscale="log", xlabel="batches in the mean", ylabel="error of the mean gradient")
    axes[-1].set_title("does it average out?", fontsize=10)
    axes[-1].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Train, measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a file of benchmarks/studies")
    parser.add_argument("--data", type=Path, help="directory of the image folders train/ and val/")
    parser.add_argument("--moments", nargs="+", type=float, default=[0.1, 0.5, 1.0], help="parts of the training")
    parser.add_argument("--batches", type=int, default=32, help="to take the gradients of")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results go to a directory in it")
    parser.add_argument("--quick", action="store_true", help="two moments and batches, to see that it runs")
    args = parser.parse_args()
    moments, count = ([0.02, 0.04], 2) if args.quick else (args.moments, args.batches)
    study = Study.read(args.study)
    where = [] if args.data is None else ["TRAIN.PATH", str(args.data / "train"), "VAL.PATH", str(args.data / "val")]
    configs = {
        run.arm: start(study.config, [*(word for pair in run.overrides for word in pair), *where])
        for run in study.runs(seeds=study.seeds[:1])
    }
    cfg = configs[PLAIN]
    data = build_data(cfg)
    arms = {
        arm: build_module(config, convert=config.MODEL.DROPIT, sample=data.sample()) for arm, config in configs.items()
    }
    watch = Watch(arms, cfg, moments, count)
    build_trainer(cfg, callbacks=[watch]).fit(build_module(cfg, convert=False), data)
    text = report(watch.found)
    print(text)
    directory = args.output / study.name
    directory.mkdir(parents=True, exist_ok=True)
    facts = {**environment(), "batches": count, "batch size": data.batch_size}
    (directory / "noise.json").write_text(json.dumps({"environment": facts, "moments": watch.found}, indent=1) + "\n")
    lines = [
        f"# {study.title}: error beside noise",
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
        text,
    ]
    (directory / "noise.md").write_text("\n\n".join(lines) + "\n")
    draw(directory / "noise.svg", study.title, watch.found)


if __name__ == "__main__":
    main()
