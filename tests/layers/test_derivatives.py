"""Second derivatives are exact where the packed input has no place in the formula, and an error where it has."""

import copy
from functools import partial, partialmethod

import pytest
import torch
from torch import nn

import dropit
from dropit.saved import Recipe

LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "conv transposed": (nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 5)),
    "conv, one dimension": (nn.Conv1d(3, 4, 3), (2, 3, 9)),
}


def pair(name, gamma=0.9, strategy="fastmink"):
    plain, shape = LAYERS[name]
    plain = copy.deepcopy(plain).double()
    return dropit.to_dropit(copy.deepcopy(plain), strategy, gamma), plain, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("strategy", ["fastmink", "mink_c"])
@pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_alone_is_computed_alone(name, wanted, strategy, monkeypatch):
    """As by PyTorch's operators, and not all for which there is a graph: for adversarial examples, or a penalty."""
    ours, plain, x = pair(name, strategy=strategy)
    restored = []
    for restore in (Recipe.restore, Recipe.restore_channels):
        noted = partial(lambda restore, self, *saved: restored.append(1) or restore(self, *saved), restore)
        monkeypatch.setattr(Recipe, restore.__name__, partialmethod(noted))
    grads = []
    for module in (plain, ours):
        leaves = {"input": x.clone().requires_grad_(), "weight": module.weight, "bias": module.bias}
        grads.append(torch.autograd.grad(module(leaves["input"] * 1).tanh().sum(), leaves[wanted])[0])
    assert torch.equal(*grads) or wanted == "weight"
    assert len(restored) == (wanted == "weight")


@pytest.mark.parametrize("linear_loss", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_penalty_is_exact(name, linear_loss):
    """Of a network with smooth activations, the norm of the input's gradient, as in WGAN-GP."""
    ours, plain, x = pair(name)
    results = []
    for module in (ours, plain):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        loss = y.sum() if linear_loss else y.tanh().sum()
        (grad,) = torch.autograd.grad(loss, inputs, create_graph=True)
        parameters = [module.weight] if linear_loss else [module.weight, module.bias]
        results.append(torch.autograd.grad(grad.square().sum(), parameters))
    if linear_loss:
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    else:
        # Back through the forward pass the weight's gradient is once more the packed input's; the bias's is exact.
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_differentiating_the_weights_gradient_is_a_clear_error(name, needs_input):
    ours, _, x = pair(name)
    y = ours(x.requires_grad_(needs_input))
    (grad,) = torch.autograd.grad(y.square().sum(), ours.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again; dropit\.from_dropit"):
        grad.sum().backward()


def test_even_where_the_loss_is_linear():
    """The derivative by the input of grad_output^T input would be missing without a word."""
    ours, _, x = pair("linear")
    (grad,) = torch.autograd.grad(ours(x.requires_grad_()).sum(), ours.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (grad.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("name", LAYERS)
def test_gradgradcheck_of_the_input_with_a_frozen_weight(name):
    ours, _, x = pair(name)
    ours.weight.requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda x: ours(x).tanh(), x.requires_grad_())


QUANTIZED = {
    "layer norm": nn.LayerNorm(6),
    "batch norm": nn.BatchNorm1d(6, track_running_stats=False),
    "group norm": nn.GroupNorm(2, 6),
    "RMS norm": nn.RMSNorm(6),
    "GELU": nn.GELU(),
    "sigmoid": nn.Sigmoid(),
    "attention": nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("linear_loss", [True, False])
@pytest.mark.parametrize("name", QUANTIZED)
def test_second_derivatives_by_torch_func_are_a_clear_error(name, linear_loss):
    plain = nn.Sequential(nn.Linear(6, 6), copy.deepcopy(QUANTIZED[name])).double()
    ours = dropit.to_dropit(plain, gamma=0.0, compress="int8")
    x = torch.randn(4, 6, dtype=torch.float64)

    def loss(x):
        y = ours(x)
        return (y * torch.arange(y.numel()).view_as(y)).sum() if linear_loss else y.square().sum()

    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.jacrev(torch.func.jacrev(loss))(x)


def test_at_gamma_zero_second_derivatives_by_torch_func_are_exact():
    plain = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0)
    x = torch.randn(3, 6, dtype=torch.float64)
    hessians = [torch.func.hessian(lambda x, m=module: m(x).square().sum())(x) for module in (ours, plain)]
    torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("name", QUANTIZED)
def test_first_derivatives_by_torch_func_are_those_of_autograd(name):
    torch.manual_seed(0)
    ours = dropit.to_dropit(
        copy.deepcopy(nn.Sequential(nn.Linear(6, 6), QUANTIZED[name])).double(), gamma=0.0, compress="int16"
    )
    x = torch.randn(4, 6, dtype=torch.float64)
    by_func = torch.func.grad(lambda x: ours(x).square().sum())(x)
    (by_autograd,) = torch.autograd.grad(ours(x.requires_grad_()).square().sum(), x)
    assert (by_func - by_autograd).norm() < 1e-3 * by_autograd.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_by_torch_func_the_weights_gradient_does_not_hide_that_it_depends_on_the_input(name):
    ours, _, x = pair(name)
    parameters = {key: parameter.detach() for key, parameter in ours.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(ours, parameters, (x,)).sum()

    def of_input(x):
        return torch.func.grad(loss)(parameters, x)["weight"].square().sum()

    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.grad(of_input)(x)


LOSSLESS = {
    "ReLU": (nn.ReLU(), (4, 6)),
    "ReLU in place": (nn.ReLU(inplace=True), (4, 6)),
    "ReLU6": (nn.ReLU6(), (4, 6)),
    "Hardtanh": (nn.Hardtanh(), (4, 6)),
    "LeakyReLU": (nn.LeakyReLU(), (4, 6)),
    "Dropout": (nn.Dropout(0.5), (4, 6)),
    "MaxPool1d": (nn.MaxPool1d(2), (2, 4, 6)),
    "MaxPool2d": (nn.MaxPool2d(2), (2, 3, 4, 6)),
    "AvgPool2d": (nn.AvgPool2d(2), (2, 3, 4, 6)),
    "AdaptiveAvgPool1d": (nn.AdaptiveAvgPool1d(2), (2, 4, 6)),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d(2), (2, 3, 4, 6)),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_gradient_penalty_gives_zeros_where_pytorch_does(name):
    """An optimizer with momentum or weight decay ignores a gradient of None, but not one of zeros."""
    layer, shape = LOSSLESS[name]
    plain = nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(3 if "Pool" in name and "Ad" not in name else 6, 1))
    if "Adaptive" in name:
        plain[2] = nn.Linear(2, 1)
    x = torch.randn(shape)
    results = []
    for module in (dropit.to_dropit(copy.deepcopy(plain), gamma=0.0), plain):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        (grad,) = torch.autograd.grad(module(leaf).sum(), leaf, create_graph=True)
        (again,) = torch.autograd.grad(grad.sum(), leaf, retain_graph=True, allow_unused=True)
        grad.square().sum().backward()
        results.append([again, leaf.grad, *(parameter.grad for parameter in module.parameters())])
    for ours, exact in zip(*results, strict=True):
        assert (ours is None) == (exact is None)
        assert ours is None or torch.equal(ours, exact)


@pytest.mark.parametrize("name", LOSSLESS)
def test_many_gradients_at_once(name):
    layer, shape = LOSSLESS[name]
    x, results = torch.randn(shape), []
    for module in (dropit.to_dropit(nn.Sequential(nn.Linear(6, 6), copy.deepcopy(layer)), gamma=0.0)[1], layer):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        output = module(leaf * 1)
        torch.manual_seed(0)
        grads = torch.randn(3, *output.shape)
        results.append(torch.autograd.grad(output, leaf, grads, is_grads_batched=True)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("name", LAYERS)
def test_many_gradients_at_once_where_whole_channels_are_dropped(name):
    ours, _, x = pair(name, gamma=0.5, strategy="mink_c")
    y = ours(x)
    grads = torch.randn(3, *y.shape, dtype=torch.float64)
    together = torch.autograd.grad(y, ours.weight, grads, is_grads_batched=True, retain_graph=True)[0]
    for grad, got in zip(grads, together, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(y, ours.weight, grad, retain_graph=True)[0])


def test_many_gradients_at_once_of_an_einsum():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return torch.einsum("btd,bsd->bts", self.left(x), self.right(x))

    plain, x, results = Scores().double(), torch.randn(4, 8, 16, dtype=torch.float64), []
    for module in (plain, dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int16")):
        grads = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        results += torch.autograd.grad(module(x), module.left.weight, grads, is_grads_batched=True)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3)], ids=str)
def test_a_second_derivative_of_few_elements(shape):
    x = torch.randn(shape, requires_grad=True)
    relu = dropit.to_dropit(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))[1]
    (grad,) = torch.autograd.grad(relu(x * 1).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(again, torch.zeros(shape))
