"""Bits per element against error, for many ways to store an activation: the table and the plot in docs/benchmarks.md.

    python benchmarks/rate.py [--data DIR] [--models resnet20 vit_conv gpt2] [--output DIRECTORY] [--quick]

Each model is first trained for some steps, on images of ``--data`` (image folders train/ and val/; without it the
digits) or on the source code of Python's standard library. Then the input of each Linear and convolution in a batch is
stored and restored in each way, and the gradient of the layer's weight is computed from what came back. Errors are
relative, of all inputs and of all gradients together. The bound is that of rate-distortion theory for independent
normally distributed numbers: no code of b bits errs by less than 2^-b.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit import STRATEGIES, ops
from dropit.training.builders.data import build_data
from dropit.training.config.load import load
from dropit.training.data.samples import Key
from dropit.training.model.architectures import build_model

Way = Callable[[Tensor], tuple[Tensor, float]]  # what comes back, and the bits per element
ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("ast", "argparse", "inspect", "typing", "socket", "tarfile", "subprocess", "datetime", "pickle", "threading")
TOKENS = 128
# Levels of least squared error for a standard normal distribution (Max 1960, tables I and II), right of zero.
NORMAL_LEVELS = {1: (0.798,), 2: (0.4528, 1.510), 3: (0.2451, 0.7560, 1.344, 2.152)}


class Layer(NamedTuple):
    """A layer, its input, and the gradient of its output."""

    module: nn.Module
    x: Tensor
    grad_output: Tensor

    def grad_weight(self, x: Tensor) -> Tensor:
        """The gradient of the weight, were ``x`` the input."""
        weight = self.module.weight
        return torch.autograd.grad(self.module(x), weight, self.grad_output)[0]


def dropped(gamma: float, value_dtype: torch.dtype | None = None) -> Way:
    """The library's fastmink."""

    def way(x: Tensor) -> tuple[Tensor, float]:
        packed = STRATEGIES["fastmink"](gamma=gamma).pack(x, value_dtype=value_dtype)
        return ops.unpack(packed), 8 * packed.nbytes / x.numel()

    return way


def quantized(bits: int) -> Way:
    """The library's codes."""

    def way(x: Tensor) -> tuple[Tensor, float]:
        codes, scales = ops.quantize(x.reshape(-1), bits)
        back = ops.dequantize(codes, scales, x.dtype, x.numel())
        return back.view(x.shape), 8 * (codes.nbytes + scales.nbytes) / x.numel()

    return way


def by_group(size: int, bits: float, restore: Callable[[Tensor], Tensor]) -> Way:
    """``restore`` of (groups, size); ``bits`` per element, with what each group stores besides."""

    def way(x: Tensor) -> tuple[Tensor, float]:
        flat = x.reshape(-1)
        groups = F.pad(flat, (0, -flat.numel() % size)).view(-1, size)
        return restore(groups).reshape(-1)[: x.numel()].view(x.shape), bits

    return way


def around_zero(bits: int, *, stochastic: bool = False) -> Way:
    """Evenly spread levels around zero, to the largest element of each 32."""

    def restore(groups: Tensor) -> Tensor:
        top = 2 ** (bits - 1) - 1
        scale = (groups.abs().amax(dim=1, keepdim=True) / top).clamp(min=1e-30)
        codes = groups / scale
        codes = (codes + torch.rand_like(codes)).floor() if stochastic else codes.round()
        return codes.clamp(-top, top) * scale

    return by_group(32, bits + 16 / 32, restore)


def over_the_range(bits: int) -> Way:
    """Evenly spread levels from the least to the largest element of each 64."""

    def restore(groups: Tensor) -> Tensor:
        low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
        return ((groups - low) / step).round() * step + low

    return by_group(64, bits + 32 / 64, restore)


def normal_levels(bits: int, *, centered: bool = False, rotated: bool = False) -> Way:
    """Levels for a normal distribution, scaled to each 64; ``rotated``: after a Hadamard transform."""
    outer = torch.tensor(NORMAL_LEVELS[bits])
    levels = torch.cat([-outer.flip(0), outer])
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 64:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]) / 2**0.5

    def restore(groups: Tensor) -> Tensor:
        if rotated:
            groups = groups @ hadamard
        mean = groups.mean(dim=1, keepdim=True) if centered else torch.zeros(1)
        scale = (groups - mean).square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-30)
        for _ in range(3):
            chosen = levels[torch.bucketize((groups - mean) / scale, (levels[1:] + levels[:-1]) / 2)]
            scale = ((groups - mean) * chosen).sum(1, keepdim=True) / chosen.square().sum(1, keepdim=True)
            scale = scale.clamp(min=1e-30)
        back = chosen * scale + mean
        return back @ hadamard if rotated else back

    return by_group(64, bits + (32 if centered else 16) / 64, restore)


def largest_and_signs(gamma: float) -> Way:
    """The largest of each 256 in bfloat16, with their places; of the others the sign, and one magnitude for all."""
    kept = max(1, round(256 * (1 - gamma)))

    def restore(groups: Tensor) -> Tensor:
        largest = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(kept, 1).indices, True)
        rest = torch.where(largest, 0, groups)
        magnitude = rest.abs().sum(dim=1, keepdim=True) / (256 - kept)
        return torch.where(largest, groups.bfloat16().to(groups.dtype), rest.sign() * magnitude)

    return by_group(256, (kept * (16 + 8) + (256 - kept) + 16) / 256, restore)


WAYS: dict[str, Way] = {
    "dropping 0.5": dropped(0.5),
    "dropping 0.8": dropped(0.8),
    "dropping 0.9": dropped(0.9),
    "dropping 0.9, values in int8": dropped(0.9, torch.int8),
    "dropping 0.95": dropped(0.95),
    "int8": quantized(8),
    "int4": quantized(4),
    "int2": quantized(2),
    "4 bits around zero, stochastic": around_zero(4, stochastic=True),
    "3 bits around zero": around_zero(3),
    "3 levels around zero": around_zero(2),
    "4 bits over the range": over_the_range(4),
    "3 bits over the range": over_the_range(3),
    "2 bits over the range": over_the_range(2),
    "3 bits, levels for a normal": normal_levels(3),
    "2 bits, levels for a normal": normal_levels(2),
    "2 bits, the same around the mean": normal_levels(2, centered=True),
    "2 bits, the same after a rotation": normal_levels(2, rotated=True),
    "1 bit around the mean": normal_levels(1, centered=True),
    "largest 5 % whole, signs of the rest": largest_and_signs(0.95),
}


def images(data: Path | None, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of 32 x 32 training images, of ``data`` or the digits, augmented as the config says."""
    config = ROOT / "configs" / "cifar100" / "resnet20.yaml"
    where = (
        ["TRAIN.PATH", f"{data}/train", "VAL.PATH", f"{data}/val"]
        if data
        else ["DATASET", "digits", "TRAIN.CROP", "none"]
    )
    train = build_data(load(config, where)).train
    generator = torch.Generator().manual_seed(0)
    while True:
        places = torch.randint(len(train), (batch,), generator=generator).tolist()
        yield train.finish(train.load([Key(0, place, 0) for place in places]))


def text(batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of bytes of Python's source code, and what follows each."""
    source = library_source()
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(source) - TOKENS - 1, (batch, 1), generator=generator)
        window = source[starts + torch.arange(TOKENS + 1)]
        yield window[:, :-1], window[:, 1:]


def library_source() -> Tensor:
    """The bytes of some modules of Python's standard library."""
    directory = Path(sysconfig.get_paths()["stdlib"])
    return torch.tensor(list(b"".join((directory / f"{name}.py").read_bytes() for name in LIBRARY)))


def gpt2() -> nn.Module:
    """GPT-2 of four layers, for bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 256, "n_positions": TOKENS, "n_embd": 192, "n_layer": 4, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


def layers(name: str, data: Path | None, steps: int) -> list[Layer]:
    """Train a model; returns what its layers read and what their gradients are in one batch more, but for the first."""
    torch.manual_seed(0)
    model = gpt2() if name == "gpt2" else build_model(name, 100, 32)
    batches = text(16) if name == "gpt2" else images(data, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, *next(batches)).backward()
        optimizer.step()
    inputs: dict[nn.Module, Tensor] = {}
    grads: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, arguments: Any, output: Tensor) -> None:
        inputs[module] = arguments[0].detach()
        output.register_hook(lambda grad: grads.update({module: grad}))

    kinds = (nn.Linear, nn.Conv2d, *((type(model.transformer.h[0].mlp.c_fc),) if name == "gpt2" else ()))
    hooks = [module.register_forward_hook(watch) for module in model.modules() if isinstance(module, kinds)]
    loss_of(model, *next(batches)).backward()
    for hook in hooks:
        hook.remove()
    return [Layer(module, inputs[module], grads[module]) for module in list(inputs)[1:] if module in grads]


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy."""
    output = model(inputs)
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def errors(found: list[Layer], way: Way) -> tuple[float, float, float]:
    """Bits per element, and the relative errors of inputs and gradients."""
    torch.manual_seed(0)
    bits = elements = off = of = grads_off = grads_of = 0.0
    for layer in found:
        back, each = way(layer.x)
        exact = layer.grad_weight(layer.x)
        bits, elements = bits + each * layer.x.numel(), elements + layer.x.numel()
        off, of = off + float((back - layer.x).square().sum()), of + float(layer.x.square().sum())
        grads_off += float((layer.grad_weight(back) - exact).square().sum())
        grads_of += float(exact.square().sum())
    return bits / elements, (off / of) ** 0.5, (grads_off / grads_of) ** 0.5


def draw(path: Path, records: list[dict[str, Any]]) -> None:
    """A panel for each model: the gradients' error by bits, and the bound."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dropit"
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(record["model"] for record in records))
    figure, panels = plt.subplots(1, len(models), figsize=(5 * len(models), 5), squeeze=False, layout="constrained")
    for panel, model in zip(panels[0], models, strict=True):
        for record in (record for record in records if record["model"] == model):
            ours = record["way"].startswith(("dropping", "int"))
            panel.plot(record["bits"], record["gradient"], "o" if ours else "x", color="C0" if ours else "0.6")
            if ours:
                at = (record["bits"], record["gradient"])
                panel.annotate(record["way"], at, textcoords="offset points", xytext=(5, 3), fontsize=7)
        bits = [1 + step / 8 for step in range(65)]
        panel.plot(bits, [2**-b for b in bits], color="C1", label="bound for a normal distribution, of the input")
        panel.set(xlabel="bits per element", yscale="log", ylim=(2e-3, 1.3), title=model)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0][0].set_ylabel("relative error of the gradients")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of the image folders train/ and val/")
    parser.add_argument("--models", nargs="+", choices=("resnet20", "vit_conv", "gpt2"))
    parser.add_argument("--steps", type=int, default=100, help="of training, before")
    parser.add_argument("--output", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="one small model, to see that it runs")
    args = parser.parse_args()
    models = ["resnet20"] if args.quick else args.models or ["resnet20", "vit_conv", "gpt2"]
    found = {name: layers(name, args.data, 1 if args.quick else args.steps) for name in models}
    header = ["stored as", *(f"{name}: bits, input, gradient" for name in models)]
    print(report.table(header, []), flush=True)
    records, rows = [], []
    for way, store in WAYS.items():
        cells = []
        for name in models:
            bits, of_input, of_gradient = errors(found[name], store)
            records.append({"model": name, "way": way, "bits": bits, "input": of_input, "gradient": of_gradient})
            cells.append(f"{bits:.2f}, {of_input:.1%}, {of_gradient:.1%}")
        rows.append([way, *cells])
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    report.write(args.output, "rate", records, report.table(header, rows))
    if args.output:
        draw(Path(args.output, f"{report.environment()['date']}-rate.svg"), records)


if __name__ == "__main__":
    main()
