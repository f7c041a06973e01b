"""The callbacks in somebody's own LightningModule, which knows nothing of DropIT."""

import copy
import csv
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import dropit
from dropit import CacheMonitor, DropITCallback
from tests import processes

MIB = 2**20


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


class Net(LightningModule):
    """A model, its loss inside training_step, a metric, a list that grows, and random numbers of three libraries."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = network()
        self.accuracy = MulticlassAccuracy(10)
        self.seen = []
        self.types = []

    def training_step(self, batch, batch_idx):
        images, labels = batch["images"], batch["labels"]
        self.seen.append((self.current_epoch, batch_idx))
        self.types.append(type(self.model[0]).__name__)
        images.mul_(1 + 0.1 * (random.random() + np.random.rand()))  # noqa: NPY002
        logits = self.model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("loss", loss)
        self.log("accuracy", self.accuracy(logits, labels), on_step=False, on_epoch=True)
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch, batch_idx):
        self.types.append(type(self.model[0]).__name__)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class DictData(TensorDataset):
    def __getitem__(self, index):
        return dict(zip(("images", "labels"), super().__getitem__(index), strict=True))


def loader():
    generator = torch.Generator().manual_seed(1)
    data = DictData(torch.randn(40, 3, 8, 8, generator=generator), torch.randint(10, (40,), generator=generator))
    return DataLoader(data, batch_size=20)


def make_trainer(callbacks, epochs=2, logger=False, **options):
    seed_everything(0, verbose=False)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "max_epochs": epochs, "logger": logger, **quiet, **options}
    return Trainer(callbacks=callbacks, **options)


def fit(module, callbacks, **options):
    trainer = make_trainer(callbacks, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "dropit/dense_mb")
        trainer.fit(module, loader())
    return trainer


def by_hand(module):
    """MiB that CacheMeter measures of a step."""
    images, labels = next(iter(loader())).values()
    with dropit.CacheMeter(module) as meter:
        loss = nn.functional.cross_entropy(module.model(images), labels)
    del loss
    return meter.total_bytes / MIB


def logged(logger):
    """The rows of a CSVLogger's file that tell the cache."""
    logger.save()
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["dropit/cache_mb"]]


def no_hook_is_left(module):
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    y = torch.ones(2, requires_grad=True).exp()
    return torch.equal(y.grad_fn._saved_result, y)  # a hook that were left would have packed it


# --- converting -------------------------------------------------------------------------------------------------------


def test_the_fit_drops_and_the_module_is_plain_before_and_after():
    module = Net()
    fit(module, [DropITCallback("mink", 0.8)])
    assert set(module.types) == {"DropITConv2d"}
    assert dropit.coverage(module).converted == 0
    assert type(module.model[0]) is nn.Conv2d
    assert no_hook_is_left(module)


def test_it_trains_as_a_model_converted_by_hand():
    ours, theirs, plain = Net(), Net(), Net()
    fit(ours, [DropITCallback("mink", 0.8)])
    fit(dropit.to_dropit(theirs, "mink", 0.8), [])
    fit(plain, [])
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(ours.model[0].weight, plain.model[0].weight)


@pytest.mark.parametrize("callback", [CacheMonitor(), DropITCallback(gamma=0.0)], ids=["monitor", "gamma 0"])
def test_measuring_changes_nothing(callback):
    ours, theirs = Net(), Net()
    trainer, other = fit(ours, [callback]), fit(theirs, [])
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if type(callback) is CacheMonitor else 1e-5, msg=name)
    assert ours.seen == theirs.seen == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert trainer.callback_metrics["accuracy"] == other.callback_metrics["accuracy"]


def test_only_the_named_submodule_is_converted():
    class TwoParts(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(10, 10)

        def training_step(self, batch, batch_idx):
            self.types.append(type(self.head).__name__)
            return {"loss": self.head(self.model(batch["images"])).mean()}

    module = TwoParts()
    fit(module, [DropITCallback(module="head")])
    assert set(module.types) == {"DropITLinear"}
    seen = TwoParts()
    seen.training_step = lambda batch, batch_idx: seen.types.append(type(seen.model[0]).__name__)
    fit(seen, [DropITCallback(module="head")])
    assert set(seen.types) == {"Conv2d"}


def test_options_reach_to_dropit():
    module, monitor = Net(), DropITCallback("fastmink", 0.9, compress="int8", filter_fn=lambda layer, fqn: True)
    fit(module, [monitor])
    assert monitor.cache_mb == by_hand(dropit.to_dropit(module, compress="int8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 7.0}, r"gamma must be in \[0, 1\)"),
        ({"strategy": "mostmink"}, "mostmink"),
        ({"module": "modle"}, r"DropITCallback\(module='modle'\): Net has model, accuracy"),
        ({"module": "accuracy"}, "converted no layer"),
    ],
)
def test_wrong_arguments_end_the_fit_at_its_start(arguments, message):
    module = Net()
    with pytest.raises(ValueError, match=message):
        fit(module, [DropITCallback(**arguments)])
    assert module.seen == []


def test_validation_alone_converts_nothing():
    module = Net()
    make_trainer([DropITCallback()]).validate(module, loader(), verbose=False)
    assert set(module.types) == {"Conv2d"}
    dropit.to_dropit(module)
    make_trainer([DropITCallback()]).validate(module, loader(), verbose=False)
    assert module.types[-1] == "DropITConv2d"  # somebody's own conversion stays


def test_layers_made_in_configure_model_are_converted():
    class Late(Net):
        def configure_model(self):
            self.later = nn.Linear(10, 10)

        def training_step(self, batch, batch_idx):
            self.types.append(type(self.later).__name__)
            return super().training_step(batch, batch_idx)

    module = Late()
    fit(module, [DropITCallback()], epochs=1)
    assert set(module.types) == {"DropITLinear", "DropITConv2d"}
    named = Late()
    fit(named, [DropITCallback(module="later")], epochs=1)
    assert set(named.types) == {"DropITLinear", "Conv2d"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_plain_layers_and_no_hook(error):
    class Failing(Net):
        def on_before_zero_grad(self, optimizer):
            raise error("in the step")

    module = Failing()
    with pytest.raises((RuntimeError, SystemExit)):
        fit(module, [DropITCallback()])
    assert module.types == ["DropITConv2d"]
    assert dropit.coverage(module).converted == 0
    assert no_hook_is_left(module)


def test_checkpoints_have_the_plain_keys_and_a_fit_is_taken_up_again(tmp_path):
    whole, first, second = Net(), Net(), Net()
    fit(whole, [DropITCallback()], epochs=3)
    trainer = fit(first, [DropITCallback()], epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys() == Net().state_dict().keys()
    taken_up, monitor = make_trainer([callback := DropITCallback()], epochs=3), callback
    taken_up.fit(second, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert second.seen[0] == (2, 0)
    assert set(second.types) == {"DropITConv2d"}
    assert monitor.cache_ratio < 0.9


def test_a_checkpoint_from_the_middle_of_an_epoch_is_measured_too(tmp_path):
    class Saving(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "middle.ckpt")
            trainer.should_stop = True

    trainer = make_trainer([DropITCallback(), Saving()], epochs=1, max_steps=1)
    trainer.fit(Net(), loader())
    monitor, module = DropITCallback(), Net()
    make_trainer([monitor], epochs=1).fit(module, loader(), ckpt_path=tmp_path / "middle.ckpt")
    assert module.seen == [(0, 1)]
    assert monitor.cache_ratio < 0.9


# --- measuring --------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_meter_and_reach_every_logger(tmp_path):
    module, monitor = Net(), DropITCallback("mink", 0.8)
    loggers = [CSVLogger(tmp_path, name=name) for name in ("a", "b")]
    trainer = fit(module, [monitor], epochs=3, logger=loggers)
    assert monitor.dense_mb == by_hand(module)
    assert monitor.cache_mb == by_hand(dropit.to_dropit(module, "mink", 0.8))
    assert monitor.cache_ratio == monitor.cache_mb / monitor.dense_mb < 0.8
    assert trainer.callback_metrics["dropit/cache_ratio"].item() == pytest.approx(monitor.cache_ratio)
    for logger in loggers:
        rows = logged(logger)
        assert [row["step"] for row in rows] == ["0", "2", "4"]
        assert {float(row["dropit/dense_mb"]) for row in rows} == {monitor.dense_mb}


def test_a_plain_module_holds_what_a_plain_module_holds():
    monitor = CacheMonitor()
    fit(Net(), [monitor])
    assert monitor.cache_mb == monitor.dense_mb > 0


def test_batches_of_changing_shape_are_compared_with_themselves():
    class Growing(Net):
        def training_step(self, batch, batch_idx):
            batch = {name: value[: 10 * (1 + self.current_epoch)].clone() for name, value in batch.items()}
            return super().training_step(batch, batch_idx)

    ratios = []

    class Keeping(DropITCallback):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            ratios.append((self.dense_mb, self.cache_ratio))

    fit(Growing(), [Keeping()])
    assert ratios[1][0] == pytest.approx(2 * ratios[0][0], rel=0.01)
    assert ratios[1][1] == pytest.approx(ratios[0][1], rel=0.05)


def test_under_autocast_both_are_of_its_dtype():
    full, half = DropITCallback(), DropITCallback()
    fit(Net(), [full])
    fit(Net(), [half], precision="bf16-mixed")
    assert half.dense_mb < full.dense_mb
    assert half.cache_ratio < 0.95


@pytest.mark.parametrize("backward", ["manual_backward", "backward", "toggled"])
def test_manual_optimization_is_measured_up_to_its_first_backward(backward):
    class TwoOptimizers(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.types.append(type(self.model[0]).__name__)
            for optimizer, layer in zip(self.optimizers(), (self.model[0], self.model[5]), strict=True):
                if backward == "toggled":
                    self.toggle_optimizer(optimizer)
                loss = nn.functional.cross_entropy(self.model(batch["images"]), batch["labels"])
                optimizer.zero_grad()
                loss.backward() if backward == "backward" else self.manual_backward(loss)
                assert layer.weight.grad is not None
                optimizer.step()
                if backward == "toggled":
                    assert not self.model[5 if layer is self.model[0] else 0].weight.requires_grad
                    self.untoggle_optimizer(optimizer)
                    assert all(p.requires_grad for p in self.parameters())

        def configure_optimizers(self):
            return [torch.optim.SGD(self.model[i].parameters(), lr=0.1) for i in (0, 5)]

    module, other, monitor = TwoOptimizers(), TwoOptimizers(), DropITCallback("mink", 0.8)
    trainer = fit(module, [monitor])
    fit(dropit.to_dropit(other, "mink", 0.8), [])
    assert trainer.global_step == 8
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    if backward != "toggled":  # with everything trained, an ordinary step's
        assert monitor.dense_mb == by_hand(module)
        assert monitor.cache_mb == by_hand(dropit.to_dropit(module, "mink", 0.8))
    assert monitor.cache_ratio < 0.9


def test_a_gradient_penalty_is_measured_up_to_its_gradient():
    class Penalized(Net):
        def training_step(self, batch, batch_idx):
            images = batch["images"].requires_grad_()
            logits = self.model(images)
            (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
            return {"loss": nn.functional.cross_entropy(logits, batch["labels"]) + grad.square().mean()}

    monitor = CacheMonitor()
    fit(Penalized(), [monitor])
    assert monitor.cache_mb == monitor.dense_mb > 0


def test_a_compiled_module_is_measured_against_the_eager_plain_one():
    module, monitor = Net(), DropITCallback()
    fit(torch.compile(module, backend="eager"), [monitor])
    assert monitor.dense_mb == by_hand(module)
    assert monitor.cache_ratio < 0.9
    assert module.seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_step_that_cannot_be_taken_twice_is_a_warning_and_no_number(tmp_path):
    class Unwilling(Net):
        def __deepcopy__(self, memo):
            raise TypeError("not to be copied")

    monitor = DropITCallback()
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="dropit/dense_mb is not known.*not to be copied"):
        make_trainer([monitor], logger=logger).fit(Unwilling(), loader())
    assert logged(logger)[0].keys() & {"dropit/cache_mb", "dropit/dense_mb", "dropit/cache_ratio"} == {
        "dropit/cache_mb"
    }


@pytest.mark.parametrize("hook", ["training_step", "on_train_batch_start"])
def test_batches_left_out_are_not_measured(hook):
    module, monitor = Net(), DropITCallback()
    setattr(module, hook, lambda batch, batch_idx: None if hook == "training_step" else -1)
    trainer = fit(module, [monitor])
    assert "dropit/cache_mb" not in trainer.callback_metrics
    assert no_hook_is_left(module)


def test_a_data_set_that_the_module_holds_is_not_copied():
    class Data(DictData):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    module, monitor = Net(), DropITCallback()
    module.data = Data(*loader().dataset.tensors)
    fit(module, [monitor])
    assert monitor.dense_mb == by_hand(module)


@pytest.mark.ddp
def test_two_processes_train_alike(tmp_path):
    processes.run([sys.executable, "-m", "tests.test_lightning", str(tmp_path)], cwd=processes.ROOT, check=True)
    records = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for record in records:
        assert record["types"] == {"DropITConv2d"}
        assert record["dense_mb"] == by_hand(Net())
        assert record["cache_mb"] < 0.8 * record["dense_mb"]
        assert record["steps"] == 2  # a batch of 20 of each process's 20
    assert all(torch.equal(a, b) for a, b in zip(records[0]["weights"], records[1]["weights"], strict=True))


def train_in_two_processes(directory):
    """What this file does when run by itself; Lightning then runs it a second time."""
    callbacks = [DropITCallback("mink", 0.8, per_sample=True), Recorder(directory)]
    make_trainer(callbacks, strategy="ddp", devices=2, epochs=2).fit(Net(), loader())


class Recorder(Callback):
    """What each process came to, in a file of its own."""

    def __init__(self, directory):
        self.directory = directory

    def on_train_end(self, trainer, pl_module):
        monitor = next(callback for callback in trainer.callbacks if isinstance(callback, DropITCallback))
        record = {"dense_mb": monitor.dense_mb, "cache_mb": monitor.cache_mb, "steps": trainer.global_step}
        weights = [parameter.detach() for parameter in pl_module.parameters()]
        torch.save(
            record | {"types": set(pl_module.types), "weights": weights}, self.directory / f"{trainer.global_rank}.pt"
        )


# --- importing --------------------------------------------------------------------------------------------------------


def run(code):
    return processes.run([sys.executable, "-c", code])


def test_without_lightning_all_else_works_and_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules |= {'pytorch_lightning': None, 'lightning': None, 'lightning.pytorch': None};"
        "from dropit import *; import dropit; dropit.DropITCallback"
    )
    done = run(code)
    assert (
        done.stderr.splitlines()[-1] == "ImportError: dropit's callbacks need Lightning: pip install pytorch-lightning"
    )
    assert run(code.replace("dropit.DropITCallback", "to_dropit, CacheMeter")).returncode == 0


def test_the_package_that_the_process_uses_is_the_one_it_extends():
    """lightning.pytorch is pytorch_lightning under another name, whose classes are others."""
    code = (
        "import sys, pytorch_lightning;"
        "names = [name for name in sys.modules if name.partition('.')[0] == 'pytorch_lightning'];"
        "new = 'lightning.pytorch';"
        "sys.modules |= {name.replace('pytorch_lightning', new): sys.modules.pop(name) for name in names};"
        "import dropit; assert issubclass(dropit.DropITCallback, sys.modules[new].Callback);"
        "assert 'pytorch_lightning' not in sys.modules"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_still_an_attribute_error():
    assert {"DropITCallback", "CacheMonitor", "to_dropit"} <= set(dir(dropit))
    with pytest.raises(AttributeError, match="module 'dropit' has no attribute 'DropIt'"):
        _ = dropit.DropIt


def test_the_callback_can_be_copied():
    assert copy.deepcopy(DropITCallback("random", 0.5))._gamma == 0.5


if __name__ == "__main__":
    train_in_two_processes(Path(sys.argv[1]))
