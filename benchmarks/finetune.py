"""Fine-tune a small Llama on real text: the loss by step with DropIT and without, over several seeds.

    python benchmarks/finetune.py [--steps 300] [--seeds 1 2 3] [--output DIRECTORY] [--quick]

The model reads bytes. It is trained on the source code of Python's standard library first, which gives the weights that
all arms start from, and then fine-tuned on English prose, Python's language reference, of which the last tenth is held
out. A seed decides which windows of the text make a batch; with the same seed all arms see the same ones.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report
import torch
import torch.nn.functional as F
from rate import library_source
from torch import Tensor, nn

import dropit

TOKENS, BATCH = 128, 16
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"gamma": 0, "compress": "int8"},
    "int4": {"gamma": 0, "compress": "int4"},
    "int8, dropping 0.9": {"gamma": 0.9, "compress": "int8"},
    "dropping 0.9": {"gamma": 0.9},
}
SMOOTHING = 20  # steps in the mean that is drawn


def llama() -> nn.Module:
    """Return a Llama of four layers, for bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 256}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": TOKENS}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, use_cache=False, bos_token_id=0, eos_token_id=0))


def prose() -> tuple[Tensor, Tensor]:
    """Return the bytes to train on, and those that are held out."""
    text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    return text.tensor_split([len(text) // 10 * 9])


def windows(text: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield batches of a byte more than the model reads: (BATCH, TOKENS + 1)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - TOKENS, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(TOKENS + 1)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the cross-entropy of each next byte."""
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(model: nn.Module, batches: Iterator[Tensor], steps: int, lr: float) -> list[float]:
    """Train by AdamW along a half cosine. Returns the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def finetune(start: dict[str, Tensor], arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Return the losses of a run, on the held-out text as well, and the bytes that its first step holds."""
    model = llama()
    model.load_state_dict(start)
    if ARMS[arm]:
        dropit.to_dropit(model, **ARMS[arm])
    text, held_out = prose()
    with dropit.CacheMeter(model) as meter:
        loss = loss_of(model, next(windows(text, seed)))
    del loss
    losses = train(model, windows(text, seed), steps, 5e-4)
    model.eval()
    batches = windows(held_out, 0)
    with torch.no_grad():
        held = sum(loss_of(model, next(batches)).item() for _ in range(20)) / 20
    return {"arm": arm, "seed": seed, "bytes": meter.total_bytes, "held out": held, "losses": losses}


def compare(records: list[dict[str, Any]]) -> str:
    """Return the table: each arm's losses and, with several seeds, what they differ by from plain's in the mean."""
    runs = {(record["arm"], record["seed"]): record for record in records}
    plain_bytes = records[0]["bytes"]
    rows = []
    for arm in ARMS:
        own = [record for record in records if record["arm"] == arm]
        last = [_last(record) for record in own]
        cells = [arm, f"{sum(last) / len(last):.3f}", f"{sum(record['held out'] for record in own) / len(own):.3f}"]
        if arm != "plain" and len(own) > 1:
            off = [record["held out"] - runs["plain", record["seed"]]["held out"] for record in own]
            mean, half = report.interval(off)
            cells.append(f"{mean:+.3f} ± {half:.3f}")
        rows.append([*cells, *[""] * (4 - len(cells)), f"{own[0]['bytes'] / plain_bytes - 1:+.0%}"])
    return report.table(["arm", "loss, last tenth", "held out", "paired difference", "bytes held"], rows)


def _last(record: dict[str, Any]) -> float:
    tail = record["losses"][-max(1, len(record["losses"]) // 10) :]
    return sum(tail) / len(tail)


def draw(path: Path, records: list[dict[str, Any]]) -> None:
    """Draw the loss of each run, and what it differs by from plain's with the same seed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dropit"
    from matplotlib import pyplot as plt

    plain = {record["seed"]: torch.tensor(record["losses"]) for record in records if record["arm"] == "plain"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for index, arm in enumerate(ARMS):
        for record in (record for record in records if record["arm"] == arm):
            losses = torch.tensor(record["losses"])
            style = {"color": f"C{index}", "lw": 1, "label": arm if record["seed"] == min(plain) else None}
            left.plot(_smooth(losses), **style)
            if arm != "plain":
                right.plot(_smooth(losses - plain[record["seed"]]), **style)
    left.set(xlabel="step", ylabel="loss", title=f"fine-tuning, mean of {SMOOTHING} steps")
    right.set(xlabel="step", ylabel="loss - plain's on the same batches", title="difference")
    left.legend(fontsize=8)
    right.axhline(0, color="0.6", lw=0.8)
    figure.savefig(path, metadata={"Date": None})


def _smooth(values: Tensor) -> Tensor:
    size = min(SMOOTHING, len(values))
    return F.avg_pool1d(values.view(1, 1, -1), size, stride=1).flatten()


def main() -> None:
    """Train, fine-tune each arm with each seed, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="three steps, to see that it runs")
    args = parser.parse_args()
    steps, seeds = (3, [1]) if args.quick else (args.steps, args.seeds)
    torch.manual_seed(0)
    model = llama()
    first = train(model, windows(library_source(), 0), steps, 2e-3)
    print(f"trained on source code: loss {first[0]:.2f} -> {first[-1]:.2f}", flush=True)
    records = []
    for arm in ARMS:
        for seed in seeds:
            records.append(finetune(model.state_dict(), arm, seed, steps))
            print(f"{arm}, seed {seed}: {_last(records[-1]):.3f}, held out {records[-1]['held out']:.3f}", flush=True)
    text = compare(records)
    print(text)
    report.write(args.output, "finetune", records, text)
    if args.output:
        draw(Path(args.output, f"{report.environment()['date']}-finetune.svg"), records)


if __name__ == "__main__":
    main()
