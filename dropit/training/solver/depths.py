"""How deep each parameter of a model lies, counted in blocks."""

from __future__ import annotations

from collections import Counter

from torch import nn


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Return the depth of each parameter: 0 before the first block, k from the k-th block on, n + 1 after the last.

    A block is one of several modules of the same type with children, not within another such; in a model without any,
    each layer with parameters is one. Modules are assumed to be defined in the order of their calls.
    """
    blocks = _blocks(model)
    names = [name for name, _ in model.named_parameters()]
    owners = [next((block for block in blocks if name.startswith(f"{block}.")), None) for name in names]
    order = {owner: depth for depth, owner in enumerate(dict.fromkeys(filter(None, owners)), 1)}
    end = max(index for index, owner in enumerate(owners) if owner is not None)
    depths, depth = {}, 0
    for index, (name, owner) in enumerate(zip(names, owners, strict=True)):
        depth = order[owner] if owner is not None else depth
        depths[name] = depth if index <= end else len(order) + 1
    return depths


def _blocks(model: nn.Module) -> list[str]:
    """Return the names of the blocks, or those of all layers with parameters."""
    composite = {
        fqn: type(module)
        for fqn, module in model.named_modules()
        if any(True for child in module.children() for _ in child.parameters())
        and type(module) not in (nn.Sequential, nn.ModuleList)
        and "stage" not in type(module).__name__.lower()  # a stage is made of blocks
    }
    counts = Counter(composite.values())
    repeated = [fqn for fqn, kind in composite.items() if counts[kind] > 1]
    outer = [fqn for fqn in repeated if not any(fqn.startswith(f"{other}.") for other in repeated)]
    return outer or [fqn for fqn, module in model.named_modules() if list(module.parameters(recurse=False))]
