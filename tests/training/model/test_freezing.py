import copy
import pickle

import pytest
import torch
from torch import nn

import dropit
from dropit.training.errors import ConfigError
from dropit.training.model.architectures import build_model
from dropit.training.model.freezing import freeze


@pytest.fixture
def model():
    return build_model("resnet_tiny", 10, stem="cifar").train()


def frozen(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["conv1"], {"conv1.weight"}),
        (["fc.bias"], {"fc.bias"}),
        (["conv*", "fc.*"], {"conv1.weight", "fc.weight", "fc.bias"}),
        (["layer1.0.bn?"], {f"layer1.0.bn{n}.{own}" for n in (1, 2) for own in ("weight", "bias")}),
        ([], set()),
    ],
)
def test_patterns_name_parameters_or_whole_modules(model, patterns, expected):
    count = freeze(model, patterns)
    assert frozen(model) == expected
    assert count == sum(model.get_parameter(name).numel() for name in expected)


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(torch.randn(8, 3, 8, 8)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_what_is_frozen_stays_as_it_is_statistics_included(model, change):
    freeze(model, ["conv1", "bn1", "layer1"])
    model = change(model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        step(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    still = {name for name in before if name.startswith(("conv1", "bn1", "layer1"))}
    assert not changed & still
    assert {"fc.weight", "layer2.0.bn1.running_mean", "layer2.0.bn1.num_batches_tracked"} <= changed


def test_a_frozen_batchnorm_normalizes_by_its_statistics_in_training(model):
    x = torch.randn(4, 64, 8, 8)
    expected = copy.deepcopy(model.bn1).eval()(x)
    freeze(model, ["bn1"])
    assert torch.equal(model.train().bn1(x), expected)


def test_a_batchnorm_that_is_frozen_in_part_goes_on(model):
    before = statistics(model)
    freeze(model, ["*.weight"])
    step(model)
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_a_batchnorm_without_parameters_is_frozen_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1))
    before = statistics(model)
    freeze(model, ["0", "1"])
    model.train()(torch.randn(2, 3, 4, 4))
    assert torch.equal(model[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("compress", ["lossless", "int8"])
def test_dropping_layers_stay_frozen(model, compress):
    freeze(model, ["bn1", "layer1"])
    dropit.to_dropit(model, compress=compress)
    before = statistics(model)
    step(model)
    assert torch.equal(model.layer1[0].bn2.running_var, before["layer1.0.bn2.running_var"])
    assert model.layer1[0].conv1.weight.grad is None
    assert model.conv1.weight.grad is not None


def test_a_pattern_that_names_nothing_is_refused_with_the_nearest_names(model):
    with pytest.raises(ConfigError, match=r"MODEL.FREEZE 'layr1' names no parameter; did you mean layer1, "):
        freeze(model, ["conv1", "layr1"])
    assert not frozen(model)


def test_something_must_be_left_to_train(model):
    with pytest.raises(ConfigError, match=r"MODEL.FREEZE \['\*'\] leaves nothing to train"):
        freeze(model, ["*"])
