import copy

import pytest
import torch
from torch import nn

import dropit
from dropit.packed import keep_dense
from dropit.policy import SavePolicy, quantize
from dropit.rematerialize import Memo, Published
from dropit.saved import Saved
from dropit.saver import Saver
from dropit.strategies import MinK


@pytest.fixture
def memo():
    return Memo()


def of(x):
    """What is published where ``x`` is saved as it is."""
    return Published(Saved.of(keep_dense(x)), 8)


def test_a_tensor_is_published_by_itself(memo):
    x = torch.randn(2, 3)
    assert memo.published(x) is None
    assert memo.publish(x, of(x * 2)) is x
    assert torch.equal(memo.published(x).saved.restore(), x * 2)
    assert memo.published(x.clone()) is None
    assert memo.published(x[:1]) is None
    assert memo.publish(x, None) is x


VIEWS = {
    "transposed": lambda x: x.transpose(0, 1),
    "flat": lambda x: x.flatten(1),
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "a dimension more": lambda x: x.unsqueeze(2),
    "a view of a view": lambda x: x.permute(0, 2, 3, 1).flatten(1, 2),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_and_so_are_all_views_of_the_whole(memo, name, order):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=order)
    memo.publish(x, of(x * 2))
    try:
        view = VIEWS[name](x)
    except RuntimeError:
        pytest.skip("no view in this order")
    if view._base is None:
        pytest.skip("a copy")
    got = memo.published(view).saved.restore()
    assert torch.equal(got, view * 2)
    assert got.stride() == (view * 2).stride()


@pytest.mark.parametrize("change", [lambda x: x.add_(1), lambda x: x.view(-1)[:2].zero_(), lambda x: x.relu_()])
def test_a_change_in_place_ends_the_publication(memo, change):
    x = torch.randn(2, 3)
    memo.publish(x, of(x.clone()))
    view = x.view(6)
    change(x)
    assert memo.published(x) is None
    assert memo.published(view) is None


def test_a_publication_dies_with_its_tensor(memo):
    x = torch.randn(2, 3)
    memo.publish(x, of(x.clone()))
    assert len(memo._publications) == 1
    del x
    assert len(memo._publications) == 0


def test_a_reader_saves_nothing_more(memo):
    x = torch.randn(8, 100)
    saver = Saver(SavePolicy(MinK(0.9), bits=8), memo)
    published = of(x.clone())
    memo.publish(x, published)
    assert saver.save(x, x).tensors == saver.save_whole(x).tensors == published.saved.tensors
    cast = saver.save(x.bfloat16(), x)
    assert cast.tensors == published.saved.tensors
    assert cast.restore().dtype is torch.bfloat16


CHAINS = {
    "BatchNorm, ReLU": ([nn.BatchNorm2d(8), nn.ReLU()], nn.Conv2d(8, 4, 3)),
    "BatchNorm, ReLU in place": ([nn.BatchNorm2d(8), nn.ReLU(inplace=True)], nn.Conv2d(8, 4, 3)),
    "BatchNorm, ReLU6": ([nn.BatchNorm2d(8), nn.ReLU6()], nn.Conv2d(8, 4, 3)),
    "BatchNorm, leaky ReLU": ([nn.BatchNorm2d(8), nn.LeakyReLU(0.1)], nn.Conv2d(8, 4, 3)),
    "BatchNorm, ReLU, pool": ([nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)], nn.Conv2d(8, 4, 3)),
    "BatchNorm, SiLU": ([nn.BatchNorm2d(8), nn.SiLU()], nn.Conv2d(8, 4, 3)),
    "BatchNorm, SiLU in place": ([nn.BatchNorm2d(8), nn.SiLU(inplace=True)], nn.Conv2d(8, 4, 3)),
    "BatchNorm": ([nn.BatchNorm2d(8, affine=False)], nn.Conv2d(8, 4, 3)),
    "GroupNorm": ([nn.GroupNorm(2, 8)], nn.Conv2d(8, 4, 3)),
    "LayerNorm": ([nn.LayerNorm([12, 12])], nn.Conv2d(8, 4, 3)),
    "LayerNorm, no bias": ([nn.LayerNorm(12, bias=False)], nn.Linear(12, 4)),
    "RMSNorm": ([nn.RMSNorm(12)], nn.Linear(12, 4)),
    "LayerNorm, dropout of nothing": ([nn.LayerNorm(12), nn.Dropout(0.0)], nn.Linear(12, 4)),
    "LayerNorm, flat": ([nn.LayerNorm(12), nn.Flatten()], nn.Linear(8 * 144, 4)),
    "Linear, GELU": ([nn.Linear(12, 12), nn.GELU()], nn.Linear(12, 4)),
}
QUANTIZED = {"int8": 0.02, "int4": 0.25, "int2": 0.8}


def randomized(name):
    torch.manual_seed(0)
    before, last = copy.deepcopy(CHAINS[name])
    model = nn.Sequential(*before, last)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def step(model, x, dtype):
    model.zero_grad()
    x = x.detach().requires_grad_()
    with dropit.CacheMeter(model) as meter, torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        y = model(x * 1)
    y.float().square().sum().backward()
    return y.detach(), [x.grad, *(parameter.grad for parameter in model.parameters())], meter.by_module()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compress", QUANTIZED)
@pytest.mark.parametrize("name", CHAINS)
def test_a_layer_reads_what_the_one_before_it_keeps(name, compress, dtype):
    plain = randomized(name)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress=compress)
    x = torch.randn(16, 8, 12, 12)
    sizes = []
    ours[-1].register_forward_pre_hook(lambda module, args: sizes.append(args[0].nbytes))
    (y, grads, _), (our_y, our_grads, held) = (step(model, x, dtype) for model in (plain, ours))
    assert torch.equal(y, our_y)
    # Copies of the normalization's weights, and under autocast of its own.
    assert held.get(str(len(plain) - 1), 0) < 0.1 * sizes[0] + ours[-1].weight.nbytes
    for got, exact in zip(our_grads, grads, strict=True):
        assert (got - exact).norm() < QUANTIZED[compress] * exact.norm() + 1e-2 * (dtype is torch.bfloat16)


def test_a_change_in_place_between_two_layers_is_noticed():
    """A residual connection adds to the normalization's output, in place: the convolution reads another tensor."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            y = self.norm(x)
            y += x
            return self.conv(y)

    torch.manual_seed(0)
    plain, x = Block(), torch.randn(4, 8, 12, 12)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int8")
    (y, grads, _), (our_y, our_grads, held) = (step(model, x, torch.float32) for model in (plain, ours))
    assert torch.equal(y, our_y)
    assert held["conv"] == quantize(x, 8).nbytes
    assert (our_grads[3] - grads[3]).norm() < 0.01 * grads[3].norm()


def test_weights_may_change_before_backward():
    model = dropit.to_dropit(nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 4)), compress="int8")
    x = torch.randn(64, 12)
    grads = []
    for change in (False, True):
        model.zero_grad()
        y = model(x)
        (grad_through,) = torch.autograd.grad(y.sum(), model[1].weight, retain_graph=True)
        if change:
            with torch.no_grad():
                model[0].bias.add_(1)
            (grad_through,) = torch.autograd.grad(y.sum(), model[1].weight)
        grads.append(grad_through)
    assert torch.equal(*grads)


UNSEEN = {
    "through .data": lambda x: x.data.mul_(2),
    "through NumPy": lambda x: x.detach().numpy().__imul__(2),
    "through DLPack": lambda x: torch.from_dlpack(x.detach()).mul_(2),
}


@pytest.mark.parametrize("between", [nn.Identity(), nn.ReLU()], ids=["", "ReLU"])
@pytest.mark.parametrize("name", UNSEEN)
def test_a_change_that_no_version_tells_ends_the_publication(name, between):
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(64), nn.Linear(64, 8)
    dropit.to_dropit(nn.Sequential(norm, between, linear), gamma=0.0, compress="int8")
    y = between(norm(torch.randn(40, 64)))
    UNSEEN[name](y)
    grad_output = torch.randn(40, 8)
    linear(y).backward(grad_output)
    exact = grad_output.t() @ y.detach()
    assert (linear.weight.grad - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_stored_by_reference_may_change_before_it_is_read(dtype):
    """In half precision 16 bits save nothing: the activation keeps its input as it is, for its own backward pass."""
    act, linear = nn.GELU(), nn.Linear(64, 8, dtype=dtype)
    dropit.to_dropit(nn.Sequential(act, linear), gamma=0.0, compress="int16")
    x = torch.randn(40, 64, dtype=dtype, requires_grad=True)
    hidden = x * 1
    y = act(hidden)
    before = y.detach().clone()
    with torch.no_grad():
        hidden.add_(1)
    grad_output = torch.randn(40, 8, dtype=dtype)
    (grad,) = torch.autograd.grad(linear(y), linear.weight, grad_output)
    exact = grad_output.t() @ before
    assert (grad - exact).norm() < 0.02 * exact.norm()


def test_a_change_of_a_parameter_after_publication_does_not_reach_the_reader():
    norm, linear = nn.LayerNorm(64), nn.Linear(64, 8)
    dropit.to_dropit(nn.Sequential(norm, linear), gamma=0.0, compress="int8")
    y = norm(torch.randn(40, 64))
    with torch.no_grad():
        norm.weight.mul_(3)
    grad_output = torch.randn(40, 8)
    (grad,) = torch.autograd.grad(linear(y), linear.weight, grad_output)
    exact = grad_output.t() @ y.detach()
    assert (grad - exact).norm() < 0.01 * exact.norm()


def test_layers_of_a_model_that_is_converted_in_two_calls_share():
    plain, x, sizes = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 8)), torch.randn(40, 64), []
    for calls in (["012"], ["02", "1"], ["1", "02"]):
        model = copy.deepcopy(plain)
        for names in calls:
            dropit.to_dropit(model, compress="int8", filter_fn=lambda _, fqn, names=names: fqn in names)
        with dropit.CacheMeter(model) as meter:
            y = model(x)
        sizes.append(meter.total_bytes)
        del y
    assert len(set(sizes)) == 1


def saved_bytes(model, x):
    with dropit.CacheMeter(model) as meter:
        y = model(x)
    del y
    return meter.total_bytes


def chain():
    layers = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*copy.deepcopy(layers), *copy.deepcopy(layers), nn.Conv2d(8, 4, 1))


def test_layers_still_share_after_a_part_was_converted_again_or_a_budget_was_not_met():
    model, x = dropit.to_dropit(chain(), compress="int8"), torch.randn(2, 8, 8, 8)
    before = saved_bytes(model, x)
    with pytest.raises(ValueError, match="cannot be met"):
        dropit.fit_budget(model, 10, x, filter_fn=lambda layer, _: isinstance(layer, nn.Conv2d))
    assert saved_bytes(model, x) == before
    dropit.to_dropit(model[3], compress="int8")
    assert saved_bytes(model, x) == before


def test_layers_that_are_copied_one_by_one_still_share():
    model, x = dropit.to_dropit(chain(), compress="int8"), torch.randn(2, 8, 8, 8)
    assert saved_bytes(nn.Sequential(*map(copy.deepcopy, model)), x) == saved_bytes(model, x)


def test_a_layer_in_two_models_stays_with_the_first():
    first, second, x = chain(), chain(), torch.randn(2, 8, 8, 8)
    second[3] = first[3]
    before = saved_bytes(dropit.to_dropit(first, compress="int8"), x)
    dropit.to_dropit(second, compress="int8", filter_fn=lambda _, fqn: fqn != "3")
    assert saved_bytes(first, x) == before


def test_what_is_restored_has_the_dtype_of_the_tensor_that_is_read():
    norm, linear = nn.BatchNorm1d(64), nn.Linear(64, 8, dtype=torch.bfloat16)  # weights in float32 make it float32
    dropit.to_dropit(nn.Sequential(norm, linear), compress="int8")
    y = norm(torch.randn(40, 64, dtype=torch.bfloat16))
    grad_output = torch.randn(40, 8, dtype=torch.bfloat16)
    linear(y).backward(grad_output)
    exact = grad_output.t() @ y.detach()
    assert (linear.weight.grad - exact).norm() < 0.02 * exact.norm()
