"""Each key of the config reaches what it is for: seen in what a run does, not in what it was told."""

import copy
from functools import partialmethod

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn
from torch._dynamo.utils import counters

import train
from dropit.training.builders.data import build_data
from dropit.training.builders.model import build_module, build_network
from dropit.training.builders.trainer import build_averaging, build_trainer
from dropit.training.config.load import load

PLAIN = ["MODEL.DROPIT", "false"]


class Watch(Callback):
    """What the training steps are given, and the weights after each."""

    def __init__(self):
        self.batches, self.weights = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append(batch)
        self.weights.append(copy.deepcopy(module.model.state_dict()))


@pytest.fixture
def run(config):
    """Train for an epoch; the classifier, what was watched, and the weights before."""

    def run(*overrides, callbacks=()):
        cfg = load(config, ["SOLVER.MAX_EPOCHS", "1", "SOLVER.WARMUP_EPOCHS", "0", *overrides])
        data = build_data(cfg)
        classifier = build_module(cfg, convert=cfg.MODEL.DROPIT, pretrained=True)
        before = copy.deepcopy(classifier.model.state_dict())
        watch, trainer = Watch(), build_trainer(cfg)
        trainer.callbacks += [watch, *callbacks, *build_averaging(cfg)]
        trainer.fit(classifier, data)
        return classifier, watch, before

    return run


def close(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], msg=name, **tolerance)


class Outputs(Callback):
    """The dtype of the logits, and how the images lie in memory, in training."""

    def on_train_start(self, trainer, module):
        module.model.register_forward_hook(self.note)

    def note(self, model, args, output):
        self.dtype = output.dtype
        self.channels_last = args[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("precision", "dtype"), [("32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_the_logits(run, precision, dtype):
    outputs = Outputs()
    run("TRAIN.PRECISION", precision, callbacks=[outputs])
    assert outputs.dtype is dtype


@pytest.mark.parametrize(
    "override", [("TRAIN.PRECISION", "tf32"), ("TRAIN.PRECISION", "fp16"), ("MODEL.SYNC_BN", "true")]
)
def test_what_a_cpu_cannot_do_is_refused_and_not_replaced(config, capsys, override):
    assert train.main(["--cfg", config, "ACCELERATOR", "cpu", *override]) == 1
    key, value = override
    assert (
        capsys.readouterr().err
        == f"train.py: {key} {value.replace('true', 'True')} needs a GPU, and this run is on the CPU\n"
    )


def test_batches_that_accumulate_are_one_batch(run):
    whole, _, _ = run(*PLAIN)
    parts, watch, _ = run(*PLAIN, "SOLVER.ACCUMULATE", "2")
    assert [len(images) for images, _ in watch.batches] == [10] * 4
    close(parts.model.state_dict(), whole.model.state_dict(), rtol=1e-4, atol=1e-6)


def test_gradients_are_scaled_down_to_their_largest_norm(run):
    _, watch, before = run(*PLAIN, "SOLVER.CLIP_NORM", "0.001", "SOLVER.LR", "0.5", "SOLVER.MOMENTUM", "0")
    moved = torch.cat([(watch.weights[0][name] - before[name]).flatten() for name in before])
    assert moved.norm().item() == pytest.approx(0.5 * 0.001, rel=1e-3)


def test_labels_are_smoothed_in_training_alone(run):
    classifier, _, _ = run(*PLAIN, "SOLVER.LABEL_SMOOTHING", "0.1")
    logits, labels = torch.randn(4, 10), torch.arange(4)
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.equal(classifier.criterion(logits, labels), expected)
    assert torch.equal(classifier.val_criterion(logits, labels), nn.functional.cross_entropy(logits, labels))


def test_the_average_of_the_weights_is_what_remains(run):
    classifier, watch, _ = run(*PLAIN, "SOLVER.EMA", "0.6")
    average = watch.weights[0]
    for weights in watch.weights[1:]:
        average = {name: 0.6 * average[name] + 0.4 * weights[name] for name in average}
    close(classifier.model.state_dict(), average)
    assert any(not torch.equal(watch.weights[-1][name], average[name]) for name in average)


def test_a_checkpoint_keeps_the_average_and_a_resumed_run_goes_on_from_the_weights(config):
    arguments = ["--cfg", config, "SOLVER.EMA", "0.9", "SOLVER.SCHEDULE", "multistep"]
    assert train.main([*arguments, "SOLVER.MAX_EPOCHS", "2"]) == 0
    assert train.main([*arguments, "OUTPUT_DIR", "other", "SOLVER.MAX_EPOCHS", "1"]) == 0
    assert train.main([*arguments, "OUTPUT_DIR", "other", "SOLVER.MAX_EPOCHS", "2", "--resume"]) == 0
    paths = [f"{output}/few/vit/version_0/checkpoints/last.ckpt" for output in ("outputs", "other")]
    whole, resumed = (torch.load(path, weights_only=True) for path in paths)
    for part in ("state_dict", "current_model_state"):
        close(resumed[part], whole[part], rtol=0, atol=0)
    assert not torch.equal(*(whole[part]["model.conv_proj.weight"] for part in ("state_dict", "current_model_state")))


def test_images_and_labels_are_mixed(run):
    _, watch, _ = run("TRAIN.MIXUP", "0.8", "TRAIN.CUTMIX", "1.0")
    for _, labels in watch.batches:
        assert labels.shape == (20, 10)
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(20))
    assert any((labels.max(dim=1).values < 1).any() for _, labels in watch.batches)


def test_the_model_is_compiled(run, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    counters.clear()
    run()
    assert not counters["stats"]
    compiled, _, _ = run("TRAIN.COMPILE", "true")
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    eager, _, _ = run()
    close(compiled.model.state_dict(), eager.model.state_dict(), rtol=1e-3, atol=1e-5)


def test_channels_lie_innermost(run):
    for wanted in (False, True):
        outputs = Outputs()
        classifier, _, _ = run("TRAIN.CHANNELS_LAST", str(wanted), "MODEL.ARCH", "resnet_tiny", callbacks=[outputs])
        weight = classifier.model.layer1[0].conv1.weight
        assert outputs.channels_last == weight.is_contiguous(memory_format=torch.channels_last) == wanted


def test_what_is_frozen_does_not_move(run):
    classifier, _, before = run("MODEL.FREEZE", "[encoder.layers.encoder_layer_0, conv_proj]")
    moved = {name for name, tensor in classifier.model.state_dict().items() if not torch.equal(tensor, before[name])}
    frozen = {name for name in before if name.startswith(("encoder.layers.encoder_layer_0.", "conv_proj."))}
    assert frozen
    assert not moved & frozen
    assert "encoder.layers.encoder_layer_1.mlp.0.weight" in moved


def test_a_run_starts_from_a_local_file_with_a_new_head(run, tmp_path, capsys):
    first, _, _ = run(*PLAIN)
    state = first.model.state_dict()
    state["heads.head.weight"], state["heads.head.bias"] = torch.zeros(7, 96), torch.zeros(7)
    torch.save({"model": state}, tmp_path / "weights.pth")
    _, _, before = run(*PLAIN, "MODEL.PRETRAINED", str(tmp_path / "weights.pth"), "SEED", "3")
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("heads.")}
    close({name: before[name] for name in rest}, rest, rtol=0, atol=0)
    assert f"pretrained   {tmp_path / 'weights.pth'} (model): {len(rest)} tensors loaded" in capsys.readouterr().out


def test_the_optimizer_is_the_recipes(run):
    solver = ["SOLVER.OPTIMIZER", "adamw", "SOLVER.WEIGHT_DECAY", "0.05", "SOLVER.NO_DECAY", "[norm, bias]"]
    classifier, _, _ = run(*solver, "SOLVER.LAYER_DECAY", "0.5", "SOLVER.BETAS", "[0.8, 0.95]")
    optimizer = classifier.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert len({group["lr"] for group in optimizer.param_groups}) == 1 + 4 + 1  # before, of and after four blocks
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)


def test_the_ways_to_load_reach_the_data(config):
    options = ["DATALOADER.CACHE", "true", "DATALOADER.ON_DEVICE", "true", "TRAIN.REPEATS", "2", "TRAIN.FLIP", "true"]
    data = build_data(load(config, [*options, "DATALOADER.UNREADABLE", "skip", "SEED", "5"]))
    batch = next(iter(data.train_dataloader()))
    assert batch.images.dtype == torch.uint8
    assert sorted(batch.labels.bincount().tolist())[-1] >= 2
    assert data.train.seed == 5
    assert type(data.train.source).__name__ == "Cached"


def test_augmentations_change_what_is_seen(config):
    def first(*overrides):
        data = build_data(load(config, ["TRAIN.CROP", "none", *overrides]))
        return data.train.finish(next(iter(data.train_dataloader())))[0]

    plain = first()
    assert torch.equal(first(), plain)
    for override in (
        ["TRAIN.FLIP", "true"],
        ["TRAIN.AUTO_AUGMENT", "randaugment"],
        ["TRAIN.AUTO_AUGMENT", "trivialaugment"],
        ["TRAIN.ERASING", "1"],
    ):
        assert not torch.equal(first(*override), plain), override
    assert not torch.equal(
        first("TRAIN.AUTO_AUGMENT", "randaugment", "TRAIN.MAGNITUDE", "30"), first("TRAIN.AUTO_AUGMENT", "randaugment")
    )


def test_rates_of_dropout_reach_the_model(config):
    rates = ["MODEL.DROPOUT", "0.2", "MODEL.ATTENTION_DROPOUT", "0.1"]
    block = build_network(load(config, rates)).encoder.layers[0]
    assert (block.dropout.p, block.self_attention.dropout) == (0.2, 0.1)


def test_a_model_of_another_library_trains(run):
    classifier, _, _ = run("MODEL.ARCH", "timm/vit_tiny_patch16_224", "MODEL.DROP_PATH", "0.1")
    assert type(classifier.model).__name__ == "VisionTransformer"
    assert type(classifier.model.blocks[3].drop_path1).__name__ == "DropPath"
