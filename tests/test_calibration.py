import copy
import random

import numpy
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import dropit
from dropit.calibration import Calibration


def saved_bytes(model, x):
    with dropit.CacheMeter(model, retain=False) as meter:
        y = model(x)
    del y
    return meter.total_bytes


def gammas(model):
    return {
        fqn: module.strategy.gamma for fqn, module in model.named_modules() if getattr(module, "drops_input", False)
    }


class Tied(nn.Module):
    """A head that reads the embedding's weight, as a language model's."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)).relu())


def test_dropping_costs_something_where_weights_are_shared():
    """With bytes to spare all is kept; what seemed to cost nothing would be dropped."""
    torch.manual_seed(0)
    model = Tied()
    dropit.fit_budget(model, "1 GiB", torch.randint(50, (16, 32)))
    assert gammas(model) == {"body": 0.0, "head": 0.0}


def test_each_parameters_gradient_counts_once():
    model = dropit.to_dropit(nn.TransformerEncoderLayer(32, 4, 64), compress="int8")
    options = {"gammas": [0.9], "value_dtype": torch.int8, "levels": [8, 16, 4]}
    calibration = Calibration(model, lambda setting: None, lambda: model(torch.ones(4, 2, 32)), torch.sum, **options)
    found = calibration._step()
    assert sum(map(len, found.values())) == len(list(model.parameters()))
    assert len(found["self_attn"]) == 4  # its output projection's, too


def test_a_head_that_starts_at_zero_hides_nothing_under_autocast():
    """Which keeps copies of weights, of what they were."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    nn.init.zeros_(model[4].weight)
    with torch.autocast("cpu", torch.bfloat16):
        example = torch.randn(64, 64)
        dropit.fit_budget(model, "1 GiB", example, filter_fn=lambda module, fqn: fqn != "4")
    assert gammas(model) == {"0": 0.0, "2": 0.0}


@pytest.mark.parametrize("options", [{"strategy": "random"}, {"stochastic": True}])
def test_random_numbers_of_layers_leave_dropouts_as_they_are(options, monkeypatch):
    """Or the steps would differ in what dropout takes, and not only in what layers keep."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.3), nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 9)
    )
    seen = []

    class Seen(dropit.budget.Plan):
        def __init__(self, items, *options):
            seen.append(items)
            super().__init__(items, *options)

    monkeypatch.setattr(dropit.budget, "Plan", Seen)
    for seed in (None, 0):
        dropit.fit_budget(model, "1 GiB", torch.ones(64, 64), seed=seed, **options)
    assert seen[0] == seen[1]


class Scaled(nn.Module):
    """Residual blocks, scaled down at first, as a ConvNeXt's."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(3))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        for block in self.blocks:
            x = x + 1e-6 * block(x)
        return self.head(x)


def test_layers_whose_gradients_are_small_are_not_given_up():
    torch.manual_seed(0)
    model, x, y = Scaled(), torch.randn(128, 64), torch.randint(10, (128,))

    def loss_fn(output):
        return nn.functional.cross_entropy(output, y)

    def gradients(net):
        net.zero_grad()
        loss_fn(net(x)).backward()
        return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.dim() > 1}

    exact = gradients(copy.deepcopy(model))
    dropit.fit_budget(model, int(0.16 * saved_bytes(model, x)), x, loss_fn=loss_fn)
    for name, gradient in gradients(model).items():
        assert (gradient - exact[name]).norm() < 0.02 * exact[name].norm(), name


def test_after_an_error_the_model_is_plain():
    model, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), torch.randn(64, 64)
    with pytest.raises(ValueError, match="cannot be met"):
        dropit.fit_budget(model, 100, x)
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]


def observed(model):
    """Everything of a model and of the generators that could be told apart afterwards."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "versions": [parameter._version for parameter in model.parameters()],
        "grads": [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "attributes": {
            fqn: {k: v for k, v in vars(m).items() if isinstance(v, (int, str))} for fqn, m in model.named_modules()
        },
        "numbers": (torch.get_rng_state(), random.getstate()[1], numpy.random.get_state()[1]),  # noqa: NPY002
    }


def assert_same(before, after):
    torch.testing.assert_close(after["tensors"], before["tensors"], rtol=0, atol=0)
    for name in ("buffers", "versions", "attributes"):
        assert after[name] == before[name], name
    for (i, grad), (j, other) in zip(before["grads"], after["grads"], strict=True):
        assert i == j
        assert grad is None or torch.equal(grad, other)
    numbers, others = before["numbers"], after["numbers"]
    assert torch.equal(numbers[0], others[0])
    assert numbers[1] == others[1]
    assert (numbers[2] == others[2]).all()


class Busy(nn.Module):
    """Counts its calls, fills a cache, replaces a buffer, and draws from generators of all kinds."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 4)
        self.calls, self.numbers = 0, torch.Generator().manual_seed(3)
        self.register_buffer("average", torch.zeros(64))
        self.register_buffer("ones", torch.ones(1).expand(64))

    def forward(self, x):
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(dim=0)
        if self.calls > 0 and not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(len(x), 1))
        noise = torch.rand(64, generator=self.numbers) + random.random() + float(numpy.random.rand())  # noqa: NPY002
        x = self.norm(self.body(x.mul_(1.1))) * self.mask * self.ones
        return self.head(nn.functional.dropout(x.relu() * noise, 0.1))


def test_it_leaves_no_trace_in_modules_that_change_as_they_run():
    torch.manual_seed(0)
    model, x = Busy(), torch.randn(64, 64)
    model.body.weight.grad = torch.ones(64, 64)
    before, kept, numbers = observed(model), x.clone(), model.numbers.get_state()
    dropit.fit_budget(model, "1 GiB", x)
    assert_same(before, observed(model))
    assert torch.equal(x, kept)
    assert torch.equal(model.numbers.get_state(), numbers)


def test_the_example_gets_no_gradient_and_may_come_out_of_another_graph():
    torch.manual_seed(0)
    model, leaf = nn.Linear(64, 64), torch.randn(32, 64, requires_grad=True)
    for example in (leaf, leaf * 2):
        dropit.fit_budget(model, "1 GiB", example)
    assert leaf.grad is None


def test_a_tensor_that_is_given_twice_is_one_in_the_measurement():
    model = nn.MultiheadAttention(64, 4)
    x = torch.randn(16, 4, 64)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] is inputs[1] is inputs[2]))
    dropit.fit_budget(model, "1 GiB", (x, x, x))
    assert seen
    assert all(seen)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("fails", [False, True], ids=["", "with an error"])
def test_hooks_of_parameters_do_not_run(reentrant, fails):
    """One that steps an optimizer as soon as a gradient is there would change the weights."""
    torch.manual_seed(0)
    model, scale = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), nn.Parameter(torch.ones(()))
    leaves = [*model.parameters(), scale]
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in leaves}
    calls = []

    def step(p):
        calls.append(p)
        optimizers[p].step()

    handles = [p.register_post_accumulate_grad_hook(step) for p in leaves]
    handles += [p.register_hook(lambda grad: calls.append(grad)) for p in leaves]

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            if reentrant is None:
                return self.inner(x)
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

    def loss_fn(output):
        if fails and len(steps) == 3:
            output.register_hook(lambda grad: 1 / 0)
        return (output * scale).square().mean()

    before, steps = [p.detach().clone() for p in leaves], []
    x = torch.randn(32, 64, requires_grad=True)
    options = {"loss_fn": loss_fn, "on_step": lambda *step: steps.append(step)}
    if fails:
        with pytest.raises(ZeroDivisionError):
            dropit.fit_budget(Checkpointed(), "1 GiB", x, **options)
    else:
        dropit.fit_budget(Checkpointed(), "1 GiB", x, **options)
    assert calls == []
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(leaves, before, strict=True))
    assert not any(optimizer.state for optimizer in optimizers.values())

    loss_fn(model(x)).backward() if not fails else (model(x) * scale).sum().backward()
    assert len(calls) == 2 * len(leaves)
    for handle in handles:
        handle.remove()
    (model(x) * scale).sum().backward()
    assert len(calls) == 2 * len(leaves)


def test_a_model_in_eval_mode_is_measured_in_training_mode():
    """As a pretrained one comes: in eval mode nothing is dropped or quantized, and all settings would cost alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 10)).eval()
    x = torch.randn(256, 64)
    plain = saved_bytes(copy.deepcopy(model).train(), x)
    statistics = model[1].running_mean.clone()
    dropit.fit_budget(model, "1 GiB", x)
    assert gammas(model) == {"0": 0.0, "3": 0.0}
    assert not any(module.training for module in model.modules())
    assert torch.equal(model[1].running_mean, statistics)
    dropit.fit_budget(model, int(0.4 * plain), x)
    assert not any(module.training for module in model.modules())
    assert saved_bytes(model.train(), x) <= 0.4 * plain


def test_parts_in_eval_mode_stay_in_it():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 10))
    model[1].eval()
    seen = []
    model[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    dropit.fit_budget(model, "1 GiB", torch.randn(64, 64))
    assert seen
    assert not any(seen)
    assert [module.training for module in model] == [True, False, True, True]


def test_what_a_models_train_freezes_is_free_again():
    class Freezing(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].requires_grad_(not mode)
            return self

    model = Freezing(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    dropit.fit_budget(model, "1 GiB", torch.randn(32, 64))
    assert not model.training
    assert not model[0].training
    assert model[0].weight.requires_grad


def test_it_measures_gradients_where_none_are_wanted():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():
        dropit.fit_budget(model, "1 GiB", torch.randn(32, 64))
    assert gammas(model) == {"0": 0.0, "2": 0.0}


def test_a_weight_that_starts_at_zero_is_the_same_afterwards():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    nn.init.constant_(model[2].weight, -0.0)
    x = torch.randn(32, 64)
    before, address = observed(model), model[2].weight.data_ptr()
    dropit.fit_budget(model, "1 GiB", x)
    assert_same(before, observed(model))
    assert model[2].weight.data_ptr() == address
    assert model[2].weight.signbit().all()


def test_a_budget_that_cannot_be_met_leaves_a_converted_model_as_it_was():
    model = dropit.to_dropit(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), gamma=0.7)
    before = repr(model)
    with pytest.raises(ValueError, match="cannot be met"):
        dropit.fit_budget(model, 100, torch.randn(64, 64))
    assert repr(model) == before
