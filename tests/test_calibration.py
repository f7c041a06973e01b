import copy

import pytest
import torch
from torch import nn

import dropit
from dropit.calibration import Calibration


def held(model, x):
    with dropit.CacheMeter(model, retain=False) as meter:
        y = model(x)
    del y
    return meter.total_bytes


def gammas(model):
    return {fqn: module.strategy.gamma for fqn, module in model.named_modules() if hasattr(module, "strategy")}


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
    dropit.to_dropit(model, budget="1 GiB", example_input=torch.randint(50, (16, 32)))
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
        dropit.to_dropit(model, budget="1 GiB", example_input=example, filter_fn=lambda module, fqn: fqn != "4")
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
        dropit.to_dropit(model, budget="1 GiB", example_input=torch.ones(64, 64), seed=seed, **options)
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
    dropit.to_dropit(model, budget=int(0.16 * held(model, x)), example_input=x, loss_fn=loss_fn)
    for name, gradient in gradients(model).items():
        assert (gradient - exact[name]).norm() < 0.02 * exact[name].norm(), name


def test_after_an_error_the_model_is_plain():
    model, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), torch.randn(64, 64)
    with pytest.raises(ValueError, match="cannot be met"):
        dropit.to_dropit(model, budget=100, example_input=x)
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
