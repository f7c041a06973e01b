"""What must go on working around the layers: replays, checkpointing, torch.func, compilation, several processes."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropit


def mlp(gamma=0.5, **options):
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    return dropit.to_dropit(nn.Sequential(*layers), gamma=gamma, **options)


def gradients_of(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def equal(first, second):
    return all(map(torch.equal, first, second))


@pytest.fixture
def x():
    return torch.randn(8, 16)


@pytest.fixture
def expected(x):
    model = mlp()
    model(x).sum().backward()
    return gradients_of(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(x, expected, reentrant):
    model = mlp()
    checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert equal(gradients_of(model), expected)


@pytest.mark.parametrize("strategy", ["fastmink", "random"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_random_choice_is_the_same(x, strategy, reentrant):
    results = []
    for wrapped in (False, True):
        model = mlp(strategy=strategy)
        torch.manual_seed(7)
        inputs = x.clone().requires_grad_()
        output = checkpoint(model, inputs, use_reentrant=reentrant) if wrapped else model(inputs)
        output.sum().backward()
        results.append(gradients_of(model))
    assert equal(*results)


def test_backward_twice_and_two_losses(x, expected):
    model = mlp()
    y = model(x)
    y.sum().backward(retain_graph=True)
    assert equal(gradients_of(model), expected)
    model.zero_grad()
    y.sum().backward()
    assert equal(gradients_of(model), expected)

    model.zero_grad()
    hidden = model[:3](x)
    (hidden.sum() + model[3:](hidden).sum()).backward()
    together = gradients_of(model)
    model.zero_grad()
    hidden = model[:3](x)
    hidden.sum().backward(retain_graph=True)
    model[3:](hidden).sum().backward()
    for a, b in zip(together, gradients_of(model), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_accumulation_per_sample_is_the_whole_batch(parts):
    """Chosen within each sample, the kept elements do not depend on how the batch is cut."""
    x = torch.randn(8, 16, dtype=torch.float64)
    results = []
    for count in (1, parts):
        model = mlp(per_sample=True).double()
        for part in x.chunk(count):
            model(part).sum().backward()
        results.append(gradients_of(model))
    for whole, accumulated in zip(*results, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-12, atol=1e-12)


def test_functional_call_and_func_grad(x, expected):
    model = mlp()
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    assert equal(torch.autograd.grad(loss(parameters, x), list(parameters.values())), expected)
    assert equal(torch.func.grad(loss)(parameters, x).values(), expected)


def test_per_sample_gradients_by_vmap_are_exact(x):
    """Under vmap nothing can be packed, as a sample's choice would have a shape of its own: all is kept."""
    model, plain = mlp(), dropit.from_dropit(mlp())

    def loss_of(module):
        return lambda parameters, x: torch.func.functional_call(module, parameters, (x,)).sum()

    ours, exact = (
        torch.func.vmap(torch.func.grad(loss_of(module)), (None, 0))(dict(module.named_parameters()), x)
        for module in (model, plain)
    )
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name])


def test_forward_mode_is_refused_clearly(x):
    model = mlp()
    with pytest.raises(NotImplementedError, match=r"jvp function for custom autograd.Function"):
        torch.func.jvp(model, (x,), (x,))


def test_an_averaged_copy_keeps_its_own_parameters(x):
    model = mlp()
    average = torch.optim.swa_utils.AveragedModel(model)
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    average.update_parameters(model)
    assert equal(average.eval()(x), model.eval()(x))


COMPILED = {
    "mlp": (mlp, (8, 16)),
    "resnet18": (lambda: dropit.to_dropit(torchvision.models.resnet18(num_classes=10)), (2, 3, 64, 64)),
    "vit": (
        lambda: dropit.to_dropit(torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 128, num_classes=10)),
        (2, 3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_whole_to_the_same_gradients(name):
    make, shape = COMPILED[name]
    x = torch.randn(shape)
    model = make()
    eager = copy.deepcopy(model)
    with dropit.CacheMeter(eager) as meter:
        y = eager(x)
    y.sum().backward()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with dropit.CacheMeter(model) as of_graph:
        z = compiled(x)
    z.sum().backward()
    assert torch.equal(z, y)
    for ours, exact in zip(gradients_of(model), gradients_of(eager), strict=True):
        torch.testing.assert_close(ours, exact)
    assert of_graph.total_bytes <= 1.05 * meter.total_bytes


@pytest.mark.slow
def test_inductor_gives_the_same_gradients():
    for name in COMPILED:
        make, shape = COMPILED[name]
        x = torch.randn(shape)
        model = make()
        eager = copy.deepcopy(model)
        eager(x).sum().backward()
        torch.compiler.reset()
        torch.compile(model, fullgraph=True)(x).sum().backward()
        for ours, exact in zip(gradients_of(model), gradients_of(eager), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())
