import copy

import pytest
import torch
from torch import nn

import dropit

E, HEADS = 32, 4
LAYERS = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}


def arguments(kind):
    x = torch.randn(3, 7, E, dtype=torch.float64)
    return (x,) if kind == "encoder" else (x, torch.randn(3, 5, E, dtype=torch.float64))


def gradients(module, inputs):
    torch.manual_seed(1)
    y = module(*inputs)
    return y, torch.autograd.grad(y.square().sum(), list(module.parameters()))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_at_gamma_zero_it_is_pytorchs(kind, norm_first, activation):
    plain = LAYERS[kind](E, HEADS, 64, 0.1, activation, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0)
    inputs = arguments(kind)
    (y, grads), (exact, exact_grads) = gradients(ours, inputs), gradients(plain, inputs)
    assert torch.equal(y, exact)
    for got, expected in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_its_relu_keeps_a_bit_per_element(kind):
    layer = dropit.to_dropit(LAYERS[kind](E, HEADS, 64, dropout=0.0, batch_first=True))
    inputs = [x.float() for x in arguments(kind)]
    with dropit.CacheMeter(layer) as meter:
        y = layer(*inputs)
    assert meter.by_operator()["DropITReLU"] == 3 * 7 * 64 / 8
    assert "Relu" not in " ".join(meter.by_operator())
    y.sum().backward()


def test_a_subclass_with_another_feed_forward_is_left_as_it_is():
    class Other(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return x

    model = dropit.to_dropit(nn.Sequential(Other(E, HEADS, 64)))
    assert type(model[0]) is Other
    assert dropit.coverage(model)[0].status == "not converted: its forward is not TransformerEncoderLayer's"
