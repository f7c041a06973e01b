"""What taking the calls of functions adds to a forward pass in which nothing stands in for them.

    python benchmarks/calls.py [--quick] [--output DIRECTORY]

All layers are converted, to int8 with nothing dropped, and the table of functions is empty: all that is left is to
enter and leave the mode that takes calls, and to hand each on. What that adds does not depend on the sizes of tensors;
so it is measured on a model of the same modules that is as narrow as it can be, with the mode and without in turns, and
given beside the time of a forward pass of the plain model at its full width. Times are the processor's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import report
import torch
from torch import nn
from torchvision.models import VisionTransformer
from zoo import causal

import dropit
from dropit.layers.callers import DropITCaller
from dropit.layers.functions import FUNCTIONS

HEADER = ["model", "plain, ms", "modules whose calls are taken", "added, ms", "added"]
Run = tuple[nn.Module, Callable[[], Any]]


def vit(width: int, size: int, patch: int, batch: int) -> Run:
    """torchvision's ViT of 12 blocks, and a forward pass."""
    model = VisionTransformer(
        size, patch, num_layers=12, num_heads=width // 64 or 1, hidden_dim=width, mlp_dim=4 * width
    )
    images = torch.randn(batch, 3, size, size)
    return model, lambda: model(images)


def llama(width: int) -> Run:
    """Hugging Face's Llama of two blocks, and a forward pass."""
    heads = width // 64 or 1
    shape = {"intermediate_size": 43 * width // 16, "num_attention_heads": heads, "num_key_value_heads": heads}
    model, loss = causal("llama", hidden_size=width, **shape)
    return model, lambda: loss(model)


CASES: dict[str, tuple[Callable[[], Run], Callable[[], Run]]] = {  # at full width, and as narrow as it can be
    "ViT-B/16, 2 images": (lambda: vit(768, 224, 16, 2), lambda: vit(16, 16, 8, 1)),
    "Llama, width 1024, 2 blocks, 256 tokens": (lambda: llama(1024), lambda: llama(16)),
}


def milliseconds(run: Callable[[], Any], times: int) -> float:
    """Time of the processor that ``run`` takes."""
    start = time.process_time()
    for _ in range(times):
        run()
    return 1000 * (time.process_time() - start) / times


def without_mode(self: DropITCaller, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a caller by which no calls are taken."""
    return super(DropITCaller, self).forward(*args, **kwargs)


def measure(name: str, turns: int) -> dict[str, Any]:
    """Return the row of a model."""
    torch.manual_seed(0)
    full, narrow = CASES[name]
    model, run = full()
    model.train()
    plain = statistics.median(milliseconds(run, 1) for _ in range(turns))
    model, run = narrow()
    dropit.to_dropit(model.train(), gamma=0, compress="int8")
    added = []
    with mock.patch.dict(FUNCTIONS, clear=True):
        for _ in range(turns):
            with mock.patch.object(DropITCaller, "forward", without_mode):
                without = milliseconds(run, turns)
            added.append(milliseconds(run, turns) - without)
    callers = sum(isinstance(module, DropITCaller) for module in model.modules())
    return {"model": name, "plain": plain, "callers": callers, "added": statistics.median(added)}


def cells(row: dict[str, Any]) -> list[str]:
    """Return the row as text."""
    share = row["added"] / row["plain"]
    return [row["model"], f"{row['plain']:.0f}", str(row["callers"]), f"{row['added']:.2f}", f"{share:+.1%}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="a pass each, to see that it runs")
    args = parser.parse_args()
    rows = [measure(name, 1 if args.quick else 20) for name in CASES]
    markdown = report.table(HEADER, [cells(row) for row in rows])
    print(markdown)
    report.write(args.output, "calls", rows, markdown)


if __name__ == "__main__":
    main()
