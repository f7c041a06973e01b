import math

import pytest
import torch

from dropit.training.optim import Recipe, build_optimizer, build_schedule


def rates(recipe):
    """The learning rate of each epoch."""
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], recipe)
    schedule = build_schedule(optimizer, recipe)
    out = []
    for _ in range(recipe.max_epochs):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


@pytest.mark.parametrize(("warmup", "epochs"), [(10, 100), (1, 8), (2, 20), (5, 6)])
def test_warmup_and_cosine_are_lightning_bolts_epoch_for_epoch(warmup, epochs):
    """By the closed form: linear from 0.1 lr, lr in epoch W - 1 and W, then half a cosine that ends at E."""
    lr = 0.03

    def expected(epoch):
        if epoch < warmup:
            return 0.1 * lr + 0.9 * lr * epoch / max(1, warmup - 1)
        return lr * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2

    got = rates(Recipe(lr, epochs, schedule="cosine", warmup_epochs=warmup))
    assert got == pytest.approx([expected(epoch) for epoch in range(epochs)], abs=1e-12)


def test_cosine_without_warmup_starts_at_the_rate():
    got = rates(Recipe(1.0, 4, schedule="cosine"))
    assert got == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_may_end_within_its_warmup(epochs):
    assert rates(Recipe(1.0, epochs, schedule="cosine", warmup_epochs=3)) == pytest.approx([0.1, 0.55, 1.0][:epochs])


def test_multistep_multiplies_at_each_milestone():
    got = rates(Recipe(0.1, 200, milestones=(60, 120, 160), gamma=0.2))
    assert [got[0], got[59], got[60], got[120], got[160]] == pytest.approx([0.1, 0.1, 0.02, 0.004, 0.0008])


def test_multistep_may_warm_up():
    got = rates(Recipe(0.1, 6, milestones=(4,), warmup_epochs=3))
    assert got == pytest.approx([0.01, 0.055, 0.1, 0.1, 0.01, 0.01])


def test_sgd_has_the_recipes_momentum_and_weight_decay():
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], Recipe(0.1, 1, momentum=0.8, weight_decay=5e-4))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.1, 0.8, 5e-4, False)
