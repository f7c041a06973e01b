"""Seventy-one architectures train a step: at gamma 0 with plain gradients, and never holding more than plain."""

import copy
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import dropit
from benchmarks.zoo import ARCHITECTURES


@pytest.fixture(autouse=True)
def one_thread():
    """Several add what an index picks twice in no fixed order, in plain models as in ours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def step(model, loss_of):
    """Loss, bytes held and gradients of a step with the same random numbers and buffers each time."""
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    with dropit.CacheMeter(model) as meter, counted_calls(model) as calls:
        loss = loss_of(model)
    nodes = dropping_nodes(loss)
    model.zero_grad()
    loss.backward()
    if calls:
        check_coverage(model, meter, calls, nodes)
    model.load_state_dict(before)
    return loss.detach(), meter.total_bytes, {name: p.grad for name, p in model.named_parameters()}


@contextmanager
def counted_calls(model):
    """How often each layer was called that packs its input."""
    calls = Counter()
    handles = [
        module.register_forward_hook(lambda *_, fqn=fqn: calls.update([fqn]))
        for fqn, module in model.named_modules()
        if getattr(module, "drops_input", False)
    ]
    yield calls
    for handle in handles:
        handle.remove()


def dropping_nodes(loss):
    """How many nodes of the graph hold a packed input."""
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
    return sum(node.name().startswith(("DropITLinear", "DropITConv")) for node in seen)


def check_coverage(model, meter, calls, nodes):
    """The report names the layers that drop: those that were called, and whose gradient the loss asks for."""
    report = dropit.coverage(model, meter)
    layers = {row.fqn: model.get_submodule(row.fqn) for row in report if row.status.startswith("converted")}
    packing = {fqn: layer for fqn, layer in layers.items() if layer.drops_input}
    assert {row.fqn for row in report if row.fqn in packing and "not called" not in row.note} == calls.keys()
    attentions = sum(isinstance(layer, nn.MultiheadAttention) for layer in packing.values())
    others = [fqn for fqn in calls if not isinstance(packing[fqn], nn.MultiheadAttention)]
    expected = sum(calls[fqn] for fqn in others if packing[fqn].weight.grad is not None)
    if all(layer.strategy.gamma == 0 for layer in packing.values()):
        assert nodes == 0  # what is stored as it is, is left to PyTorch
        return
    assert expected + attentions <= nodes
    if not any(layer.calls_functions for layer in layers.values()):  # whose calls of F.linear drop as well
        assert nodes <= expected + 2 * attentions


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_it_trains_a_step_and_holds_no_more_than_plain(make):
    torch.manual_seed(0)
    model, loss_of = make()
    model.train()
    keys = list(model.state_dict())
    loss, plain_bytes, plain_grads = step(model, loss_of)

    dropit.to_dropit(model, gamma=0.0)
    same_loss, _, grads = step(model, loss_of)
    assert torch.equal(same_loss, loss)
    assert not [name for name, grad in plain_grads.items() if not equal(grads[name], grad)]

    dropit.to_dropit(model, gamma=0.9)
    loss, ours, grads = step(model, loss_of)
    assert torch.equal(loss, same_loss)
    assert ours < plain_bytes
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)

    dropit.to_dropit(model, gamma=0.9, compress="int8")
    loss, quantized, grads = step(model, loss_of)
    assert torch.equal(loss, same_loss)
    assert quantized <= ours
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)

    dropit.from_dropit(model)
    again, restored, grads = step(model, loss_of)
    assert torch.equal(again, loss)
    assert restored == plain_bytes
    assert list(model.state_dict()) == keys
    assert not [name for name, grad in plain_grads.items() if not equal(grads[name], grad)]


def equal(ours, theirs):
    return ours is None if theirs is None else torch.equal(ours, theirs)


def small_resnet():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 2])


class DilatedResNet(nn.Module):
    """A segmentation network: a ResNet whose last stages are dilated after construction, and a convolution on top."""

    def __init__(self):
        super().__init__()
        self.backbone = small_resnet()
        self.head = nn.Conv2d(512, 3, 1)
        for stage, dilation in ((self.backbone.layer3, 2), (self.backbone.layer4, 4)):
            self.dilate(stage, dilation)

    @staticmethod
    def dilate(stage, dilation):
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                module.dilation = (dilation, dilation)
                module.padding = tuple(size // 2 * dilation for size in module.kernel_size)

    def forward(self, x):
        backbone = self.backbone
        x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(x))))
        x = backbone.layer4(backbone.layer3(backbone.layer2(backbone.layer1(x))))
        return F.interpolate(self.head(x), scale_factor=8, mode="bilinear")


@pytest.mark.parametrize("converted_first", [False, True])
def test_a_resnet_that_is_dilated_after_construction_equals_plain_at_gamma_zero(converted_first):
    torch.manual_seed(0)
    plain = DilatedResNet()
    ours = copy.deepcopy(plain)
    if converted_first:
        ours.backbone = dropit.to_dropit(small_resnet(), gamma=0.0)
        ours.backbone.load_state_dict(plain.backbone.state_dict())
        ours.dilate(ours.backbone.layer3, 2)
        ours.dilate(ours.backbone.layer4, 4)
    dropit.to_dropit(ours, gamma=0.0)
    x, labels = torch.randn(2, 3, 64, 48), torch.randint(3, (2, 64, 48))
    outputs = []
    for model in (ours, plain):
        outputs.append(model(x))
        F.cross_entropy(outputs[-1], labels).backward()
    assert torch.equal(*outputs)
    for got, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad) if expected.grad is not None else got.grad is None
