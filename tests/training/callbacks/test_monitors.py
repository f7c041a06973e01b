import copy

import pytest
import torch
from pytorch_lightning import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dropit
from dropit.training.callbacks.monitors import CacheMonitor, SpeedMonitor
from dropit.training.model.classifier import Classifier
from dropit.training.solver.recipe import Recipe

MIB = 2**20


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


def fit(model, callbacks, epochs=2):
    seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(40, 3, 8, 8), torch.randint(10, (40,)))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    classifier = Classifier(model, 10, Recipe(lr=0.1, max_epochs=epochs))
    trainer.fit(classifier, DataLoader(data, batch_size=20), DataLoader(data, batch_size=20))
    return trainer, classifier


def test_it_measures_what_the_meter_measures_of_a_step():
    model = dropit.to_dropit(network(), gamma=0.8)
    monitor = CacheMonitor()
    fit(model, [monitor])
    x, y = torch.randn(20, 3, 8, 8), torch.randint(10, (20,))
    with dropit.CacheMeter(model) as ours:
        loss = nn.functional.cross_entropy(model(x), y)
    plain = dropit.from_dropit(copy.deepcopy(model))
    with dropit.CacheMeter(plain) as dense:
        plain_loss = nn.functional.cross_entropy(plain(x), y)
    assert monitor.cache_mb == ours.total_bytes / MIB
    assert monitor.dense_mb == dense.total_bytes / MIB
    assert monitor.cache_ratio < 0.9
    del loss, plain_loss


def test_the_plain_model_is_its_own_reference():
    monitor = CacheMonitor()
    fit(network(), [monitor])
    assert monitor.cache_mb == monitor.dense_mb > 0


def test_measuring_changes_neither_weights_nor_buffers_nor_random_numbers():
    torch.manual_seed(0)
    first = dropit.to_dropit(network())
    second = copy.deepcopy(first)
    fit(first, [CacheMonitor()])
    fit(second, [])
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_failing_step_leaves_no_hook():
    class FailingLoss(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, input, target):
            self.calls += 1
            if self.calls == 2:  # the first is the plain model's
                raise RuntimeError("in the step")
            return super().forward(input, target)

    class WithFailingLoss(CacheMonitor):
        def on_fit_start(self, trainer, pl_module):
            pl_module.criterion = FailingLoss()

    model = network()
    with pytest.raises(RuntimeError, match="in the step"):
        fit(model, [WithFailingLoss()])
    assert not any(module._forward_hooks for module in model.modules())
    y = torch.ones(2, requires_grad=True).exp()
    assert torch.equal(y.grad_fn._saved_result, y)  # a hook that were left would have packed it


def test_speed_is_measured_over_steps_of_all_epochs_but_the_first():
    monitor = SpeedMonitor()
    trainer, _ = fit(network(), [monitor], epochs=3)
    assert trainer.global_step == 6
    assert len(monitor._epochs) == 3
    assert monitor.step_seconds == pytest.approx(sum(monitor._epochs[1:]) / 2)
