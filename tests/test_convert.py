import copy
import functools
import io
import pickle
import threading
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import dropit
from dropit.layers import DropITLayer
from dropit.strategies import FastMinK, MinK


class Subclass(nn.Linear):
    """Its forward is nn.Linear's."""


class Distance(nn.Linear):
    def forward(self, input):
        return torch.cdist(input, self.weight)


def small_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(8 * 6 * 6, 5)))


def converted(model):
    return [fqn for fqn, module in model.named_modules() if isinstance(module, DropITLayer)]


def test_layers_are_swapped_in_place_wherever_they_are():
    model = small_net()
    assert dropit.to_dropit(model) is model
    assert converted(model) == ["0", "1", "2.1"]
    root = nn.Linear(20, 10)
    assert dropit.to_dropit(root) is root
    assert converted(root) == [""]


def test_parameters_keys_and_hooks_stay():
    model = small_net()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    dropit.to_dropit(model)(torch.randn(2, 3, 8, 8))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert calls == [1]


def test_a_filter_chooses_by_module_and_name():
    model = dropit.to_dropit(small_net(), filter_fn=lambda module, fqn: fqn.startswith("2"))
    assert converted(model) == ["2.1"]


def test_a_shared_layer_is_swapped_once():
    linear = nn.Linear(8, 8)
    model = dropit.to_dropit(nn.Sequential(linear, linear))
    assert model[0] is model[1]
    assert converted(model) == ["0"]
    model(torch.randn(40, 8)).sum().backward()


def test_converting_again_only_changes_the_strategy():
    model = dropit.to_dropit(small_net(), gamma=0.9)
    classes = [type(module) for module in model.modules()]
    dropit.to_dropit(model, "mink", 0.5)
    assert [type(module) for module in model.modules()] == classes
    assert model[0].strategy == MinK(0.5)


def test_compress_none_leaves_layers_without_a_weight_as_they_are():
    model = dropit.to_dropit(small_net(), compress="none")
    assert converted(model) == ["0", "2.1"]
    assert converted(dropit.to_dropit(model, compress="lossless")) == ["0", "1", "2.1"]
    assert converted(dropit.to_dropit(model, compress="none")) == ["0", "2.1"]


def test_an_unknown_way_to_compress_is_refused():
    with pytest.raises(ValueError, match="compress must be one of none, lossless, int16, int8, int4, int2, got 'zip'"):
        dropit.to_dropit(small_net(), compress="zip")


def test_int8_and_int4_quantize_what_other_layers_keep():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.ReLU())
    assert converted(dropit.to_dropit(model, compress="int4")) == ["0", "1", "2", "3"]
    assert model[1].saver.bits == 4
    assert "bits=4" in repr(model[1])
    assert dropit.coverage(model).converted == 4
    dropit.to_dropit(model, compress="int8")
    assert model[1].saver.bits == 8
    dropit.to_dropit(model, compress="lossless")
    assert converted(model) == ["0", "3"]
    assert "compress=" in dropit.coverage(model)[1].status
    dropit.from_dropit(dropit.to_dropit(model, compress="int8"))
    assert [type(module) for module in model] == [nn.Linear, nn.LayerNorm, nn.GELU, nn.ReLU]
    assert "saver" not in vars(model[1])


def test_stochastic_rounding_needs_something_to_round():
    with pytest.raises(ValueError, match="needs compress to be int16, int8 or int4, got 'lossless'"):
        dropit.to_dropit(small_net(), stochastic=True)


@pytest.mark.parametrize("strategy", ["fastmink", "random"])
def test_the_seed_goes_to_whoever_draws(strategy):
    model = dropit.to_dropit(small_net(), strategy, compress="int8", stochastic=True, seed=5)
    assert getattr(model[0].strategy, "seed", 5) == 5
    assert "stochastically" in repr(model[0].saver)


@pytest.mark.parametrize("given", ["int8", torch.int8])
def test_values_are_stored_as_narrow_as_asked_for(given):
    layer = dropit.to_dropit(nn.Linear(640, 8), gamma=0.9, value_dtype=given)
    assert "values in torch.int8" in repr(layer)
    with dropit.CacheMeter(layer) as meter:
        y = layer(torch.randn(40, 640))
    kept = 100 * 26  # of each block of 256
    assert meter.total_bytes == kept + -(-kept // 32) * 2 + kept  # values, scales and offsets
    y.sum().backward()


@pytest.mark.parametrize("given", ["int3", torch.float64, 8])
def test_an_unknown_value_dtype_is_refused(given):
    with pytest.raises(ValueError, match="value_dtype must be one of bf16, bfloat16, int8, got"):
        dropit.to_dropit(small_net(), value_dtype=given)


def test_a_state_says_how_it_was_trained_and_loading_it_otherwise_warns(tmp_path):
    model = dropit.to_dropit(small_net(), "fastmink", 0.9)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(state) == list(small_net().state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(state)
        small_net().load_state_dict(state)
        dropit.to_dropit(small_net()).load_state_dict(small_net().state_dict())
    other = dropit.to_dropit(small_net(), "fastmink", 0.7)
    with pytest.warns(UserWarning, match=r"was trained with FastMinK\(gamma=0.9.*goes on with FastMinK\(gamma=0.7"):
        other.load_state_dict(state)
    assert torch.equal(other[0].weight, model[0].weight)


def test_from_dropit_undoes_it():
    model = small_net()
    before = [(type(module), set(vars(module))) for module in model.modules()]
    text = repr(model)
    dropit.from_dropit(dropit.to_dropit(model))
    assert [(type(module), set(vars(module))) for module in model.modules()] == before
    assert repr(model) == text


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_bound_to_itself(duplicate):
    model = dropit.to_dropit(small_net())
    other = duplicate(model)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), model(x))
    other(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.parameters())
    assert other[0].strategy == model[0].strategy


def test_the_arguments_reach_the_strategy():
    model = dropit.to_dropit(small_net(), "fastmink", 0.8, block_size=64)
    assert model[0].strategy == FastMinK(0.8, block_size=64)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(Distance(4, 4), Distance(4, 4)),
            r"converted 0 of 2: Distance x2: .*its forward is not Linear's",
        ),
        (nn.Sequential(nn.LazyLinear(4)), r"converted 0 of 1: LazyLinear x1: .*run a forward pass first"),
        (nn.LSTM(4, 4), r"converted 0 of 1: LSTM x1: not converted: what its kernel saves is out of reach"),
        (nn.ReLU(), "converted no layer: ReLU has no Linear or Conv layer"),
    ],
)
def test_converting_nothing_is_an_error_that_says_why(model, message):
    with pytest.raises(ValueError, match=message):
        dropit.to_dropit(model)


def test_a_class_is_no_model():
    with pytest.raises(TypeError, match="model must be a module, got <class"):
        dropit.to_dropit(nn.Linear)


def test_filtering_everything_out_is_an_error_that_says_why():
    with pytest.raises(
        ValueError, match="converted 0 of 2: Conv2d x1: left out by filter_fn; Linear x1: left out by filter_fn"
    ):
        dropit.to_dropit(small_net(), filter_fn=lambda module, fqn: False)


def test_a_gamma_too_small_to_save_anything_warns_with_the_break_even():
    with pytest.warns(UserWarning, match=r"gamma 0.03 saves nothing: .* unless gamma is above 0.03125"):
        dropit.to_dropit(small_net(), gamma=0.03)
    with pytest.warns(UserWarning, match=r"above 0.0625"):
        dropit.to_dropit(small_net().to(torch.bfloat16), gamma=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for gamma in (0.0, 0.1):
            dropit.to_dropit(small_net(), gamma=gamma)


def test_a_refused_gamma_leaves_the_model_alone():
    model = small_net()
    with pytest.raises(ValueError, match="gamma must be in"):
        dropit.to_dropit(model, gamma=7.0)
    assert converted(model) == []


def test_coverage_says_of_each_layer_what_became_of_it():
    model = nn.Sequential(
        nn.Linear(8, 8), Distance(8, 8), nn.MultiheadAttention(8, 2), nn.GRUCell(8, 8), nn.ReLU(), nn.GELU()
    )
    report = dropit.coverage(dropit.to_dropit(model))
    assert [(row.fqn, row.type, row.status.split(":")[0]) for row in report] == [
        ("0", "Linear", "converted"),
        ("1", "Distance", "not converted"),
        ("2", "MultiheadAttention", "converted"),
        ("3", "GRUCell", "not converted"),
        ("4", "ReLU", "converted"),
        ("5", "GELU", "plain"),
    ]
    table = str(report).splitlines()
    assert table[0].split() == ["layer", "type", "status"]
    assert table[-1] == "converted 3 of 6"


def test_coverage_with_a_meter_names_what_keeps_a_layer_from_helping():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return nn.functional.linear(self.second(self.first(x).abs().sqrt()), self.third.weight)

    model = dropit.to_dropit(Net())
    with dropit.CacheMeter(model) as meter:
        y = model(torch.randn(4096, 64))
    report = dropit.coverage(model, meter)
    assert [row.status for row in report] == [
        "converted",
        "converted",
        "converted, but its input is saved by Sqrt in the model (1.00 MiB) as well",
        "converted, but not called: another module may read its weight by itself",
    ]
    assert report.summary() == "converted 4 of 4, of which 2 free nothing (their notes say why)"
    assert dropit.coverage(model).summary() == "converted 4 of 4"
    y.sum().backward()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_subclass_with_its_parents_forward_is_converted_and_can_be_copied(duplicate):
    layer = dropit.to_dropit(Subclass(64, 8))
    assert isinstance(layer, Subclass)
    other = duplicate(layer)
    assert type(other) is type(layer)
    x = torch.randn(20, 64)
    with dropit.CacheMeter(other) as meter:
        y = other(x)
    assert meter.total_bytes == layer.strategy.pack(x).nbytes
    assert torch.equal(y, layer(x))
    assert type(dropit.from_dropit(layer)) is Subclass


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear, "is not a subclass of DropITLayer"),
        (type("Half", (dropit.DropITLayer,), {}), "Half.plain must be the class that it takes the place of"),
        (type("Other", (dropit.DropITLayer,), {"plain": nn.Linear}), "got <class 'torch.nn.*Linear'>"),
    ],
)
def test_a_class_that_cannot_swap_in_is_refused(layer, message):
    with pytest.raises(TypeError, match=message):
        dropit.register(layer)


def test_coverage_of_a_plain_model():
    assert [row.status for row in dropit.coverage(nn.Linear(2, 2))] == ["plain: left out, or to_dropit was not called"]


def test_an_eval_graph_exports_as_the_plain_model_does():
    model = small_net().eval()
    plain = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    ours = torch.export.export(dropit.to_dropit(model), (x,))
    exact = torch.export.export(plain, (x,))
    assert [str(node.target) for node in ours.graph.nodes] == [str(node.target) for node in exact.graph.nodes]


class LowRank(nn.Module):
    """A frozen weight and a product of two small ones, as LoRA."""

    def __init__(self, weight):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight[0].numel()) / 8)
        self.up = nn.Parameter(torch.randn(len(weight), 2) / 8)

    def forward(self, weight):
        return weight.detach() + (self.up @ self.down).view_as(weight)


def add_low_rank(layer):
    torch.manual_seed(1)
    parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))


def add_two(layer):
    parametrizations.weight_norm(layer)
    parametrize.register_parametrization(layer, "bias", nn.Softplus(), unsafe=True)


def add_spectral_norm(layer):
    torch.manual_seed(1)
    parametrizations.spectral_norm(layer)


def add_hooked_spectral_norm(layer):
    torch.manual_seed(1)
    nn.utils.spectral_norm(layer)


def remove_parametrizations(layer):
    for name in list(layer.parametrizations):
        parametrize.remove_parametrizations(layer, name)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)


# How to give a layer's weight another form, and how to undo it.
FORMS = {
    "weight_norm": (parametrizations.weight_norm, remove_parametrizations),
    "orthogonal": (lambda layer: parametrizations.orthogonal(layer, use_trivialization=False), remove_parametrizations),
    "spectral_norm": (add_spectral_norm, remove_parametrizations),
    "low rank": (add_low_rank, remove_parametrizations),
    "two": (add_two, remove_parametrizations),
    "hooked weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "hooked spectral_norm": (add_hooked_spectral_norm, nn.utils.remove_spectral_norm),
    "pruned": (pruned, lambda layer: prune.remove(layer, "weight")),
}
LAYERS = {"Linear": (lambda: nn.Linear(64, 8), (20, 64)), "Conv2d": (lambda: nn.Conv2d(3, 8, 3), (4, 3, 9, 9))}


def trained(layer, x):
    """Output and gradients of a training step, by the names of the parameters."""
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    return {"": y.detach()} | {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def held(model, x):
    with dropit.CacheMeter(model, retain=False) as meter:
        y = model(x)
    del y
    return meter.total_bytes


def state_of(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("order", ["form convert", "convert form"])
@pytest.mark.parametrize("undo", ["form convert", "convert form"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_parametrizing_and_converting_go_in_any_order_and_so_does_undoing_them(kind, form, order, undo):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    plain, x = make(), torch.randn(shape)
    ours = copy.deepcopy(plain)
    apply, unapply = FORMS[form]

    apply(plain)
    for step in order.split():
        if step == "form":
            apply(ours)
        else:
            dropit.to_dropit(ours, gamma=0.0)
    (row,) = dropit.coverage(ours)
    assert (row.type, row.status) == (kind, "converted")
    assert isinstance(ours, DropITLayer)
    assert list(ours.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(trained(ours, x), trained(plain, x))
    assert held(dropit.to_dropit(ours, gamma=0.9), x) < held(plain, x)
    dropit.to_dropit(ours, gamma=0.0)

    unapply(plain)
    for step in undo.split():
        if step == "form":
            unapply(ours)
        else:
            dropit.from_dropit(ours)
    assert type(ours) is type(plain)
    assert repr(ours) == repr(plain)
    torch.testing.assert_close(state_of(ours), state_of(plain))
    torch.testing.assert_close(trained(ours, x), trained(plain, x))


def test_a_parametrized_layer_has_its_plain_class_back():
    layer = parametrizations.weight_norm(nn.Linear(64, 8))
    text = repr(layer)
    assert repr(dropit.from_dropit(dropit.to_dropit(layer))) == text
    layer = dropit.to_dropit(nn.Linear(64, 8))
    assert repr(dropit.from_dropit(parametrizations.weight_norm(layer))) == text


def test_a_copy_of_a_parametrized_converted_layer_is_one():
    torch.manual_seed(0)
    layer, x = parametrizations.weight_norm(dropit.to_dropit(nn.Linear(64, 8))), torch.randn(20, 64)
    other = copy.deepcopy(layer)
    torch.testing.assert_close(trained(other, x), trained(layer, x))
    assert dropit.coverage(other)[0].status == "converted"
    dropit.from_dropit(layer)
    assert dropit.coverage(other)[0].status == "converted"
    torch.testing.assert_close(other(x), layer(x))


@pytest.mark.parametrize("make", [Subclass, nn.Linear])
def test_a_parametrized_converted_layer_is_pickled_as_little_as_a_parametrized_one(make):
    """Its parametrization would be lost without a word."""
    layer = parametrizations.weight_norm(dropit.to_dropit(make(64, 8)))
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(layer)


class WithState(nn.Linear):
    """It is pickled in a way of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lock, self.copied = threading.Lock(), False

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock, self.copied = threading.Lock(), True


class Remade(nn.Linear):
    def __reduce__(self):
        return Remade.remake, (self.in_features, self.out_features, self.weight), self.__dict__

    @classmethod
    def remake(cls, fan_in, fan_out, weight):
        layer = cls(fan_in, fan_out)
        layer.weight, layer.copied = weight, True
        return layer


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", [WithState, Remade])
def test_a_subclass_says_itself_how_it_is_copied(kind, duplicate):
    layer = dropit.to_dropit(kind(64, 8))
    other = duplicate(layer)
    assert type(other) is type(layer)
    assert other.copied
    x = torch.randn(20, 64)
    torch.testing.assert_close(trained(other, x), trained(layer, x))


def hooked(forward):
    @functools.wraps(forward)
    def wrapper(*args):
        return forward(*args) + 1

    return wrapper


def stored(module):
    """As accelerate does."""

    def forward(module, x):
        return module._old_forward(x) + 1

    module._old_forward = module.forward
    module.forward = types.MethodType(forward, module)


class Calling:
    def __init__(self, forward):
        self.inner = forward

    def __call__(self, x):
        return self.inner(x) + 1

    def run(self, x):
        return self(x)


WRAPPERS = {
    "closure": lambda module: setattr(module, "forward", hooked(module.forward)),
    "attribute": stored,
    "partial": lambda module: setattr(module, "forward", functools.partial(lambda f, x: f(x) + 1, module.forward)),
    "object": lambda module: setattr(module, "forward", Calling(module.forward)),
    "objects method": lambda module: setattr(module, "forward", Calling(module.forward).run),
    "itself": lambda module: setattr(module, "forward", module.forward),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_module_whose_forward_was_replaced_is_left_alone(wrap):
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    wrap(model[0])
    x = torch.randn(20, 64)
    expected = model(x)
    dropit.to_dropit(model, gamma=0.9)
    assert type(model[0]) is nn.Linear
    assert [row.status for row in dropit.coverage(model)] == [
        "not converted: its forward was replaced on the module itself",
        "converted",
    ]
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="converted 0 of 1: Linear x1: not converted: its forward was replaced"):
        dropit.to_dropit(model[0])


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_converted_module_whose_forward_is_wrapped_stays_converted(wrap):
    layer = dropit.to_dropit(nn.Linear(64, 8), gamma=0.9)
    wrap(layer)
    x = torch.randn(20, 64)
    assert held(layer, x) == layer.strategy.pack(x).nbytes
    assert dropit.coverage(layer)[0].status == "converted"
    dropit.to_dropit(layer, gamma=0.5)
    assert layer.strategy.gamma == 0.5


def test_a_converted_module_whose_forward_is_another_is_not_reported_converted():
    layers = [dropit.to_dropit(nn.Linear(8, 8)) for _ in range(3)]
    before = nn.Linear(8, 8)
    layers[0].forward = lambda x: x
    layers[1].forward = layers[2].forward  # which is bound to the other
    layers[2].forward = before.forward
    for layer in layers:
        assert dropit.coverage(layer)[0].status == "not converted: its forward was replaced on the module itself"


def test_accelerates_hooks_are_seen():
    hooks = pytest.importorskip("accelerate.hooks")
    before, after = nn.Linear(64, 8), dropit.to_dropit(nn.Linear(64, 8))
    for layer in (before, after):
        hooks.add_hook_to_module(layer, hooks.ModelHook())
    assert dropit.coverage(after)[0].status == "converted"
    with pytest.raises(ValueError, match="its forward was replaced"):
        dropit.to_dropit(before)


class Named(nn.Linear):
    """It has what DropIT calls its own things by."""

    saver = "class attribute"
    plain = True

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.kind = "mine"

    @property
    def strategy(self):
        return self.kind

    @strategy.setter
    def strategy(self, kind):
        self.kind = kind


class Forwarding(nn.Linear):
    def __getattr__(self, name):
        return "forwarded" if name == "strategy" else super().__getattr__(name)


def with_attributes(layer):
    layer.saver, layer.strategy, layer.plain = "mine", 3, None
    return layer


def with_modules(layer):
    layer.saver, layer.strategy = nn.ReLU(), nn.Linear(2, 2)
    return layer


def with_tensors(layer):
    layer.saver = nn.Parameter(torch.ones(2))
    layer.register_buffer("strategy", torch.ones(3))
    return layer


OWNERS = {
    "class": lambda: Named(64, 8),
    "getattr": lambda: Forwarding(64, 8),
    "attributes": lambda: with_attributes(nn.Linear(64, 8)),
    "attributes of a subclass": lambda: with_attributes(Subclass(64, 8)),
    "modules": lambda: with_modules(nn.Linear(64, 8)),
    "tensors": lambda: with_tensors(nn.Linear(64, 8)),
}


@pytest.mark.parametrize("make", OWNERS.values(), ids=OWNERS)
def test_what_a_layer_calls_saver_or_strategy_itself_stays_its_own(make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(40, 64)
    text, attributes, kind = repr(layer), dict(vars(layer)), type(layer)
    before = {name: getattr(layer, name, None) for name in ("saver", "strategy", "plain")}
    keys, size = list(layer.state_dict()), held(layer, x)
    for model in (dropit.to_dropit(layer, gamma=0.9), copy.deepcopy(layer)):
        assert dropit.coverage(model)[0].status == "converted"
        assert held(model, x) < size / 3
        assert list(model.state_dict()) == keys
    for name, own in before.items():
        if own is not None or name in attributes:
            assert getattr(layer, name) is own
    dropit.from_dropit(layer)
    assert (type(layer), repr(layer), vars(layer)) == (kind, text, attributes)


def test_names_of_ones_own_can_be_set_on_a_converted_layer():
    layer = dropit.to_dropit(Named(64, 8))
    layer.strategy = "new"
    assert (layer.strategy, layer.kind) == ("new", "new")
    layer = dropit.to_dropit(nn.Linear(64, 8))
    layer.strategy = layer.saver = 5
    assert (layer.strategy, layer.saver) == (5, 5)
    assert dropit.coverage(layer)[0].status == "converted"
    del layer.strategy
    assert layer.strategy == FastMinK(0.9)


def test_a_layer_whose_own_names_are_in_the_way_is_left_alone():
    class Packing(nn.Linear):
        def saves(self):
            return "boxes"

    layer = nn.Linear(8, 8)
    layer.saves = True
    model = dropit.to_dropit(nn.Sequential(Packing(8, 8), layer, nn.Linear(8, 8)))
    assert [row.status for row in dropit.coverage(model)] == [
        "not converted: its own 'saves' is a name that DropIT's layer needs",
        "not converted: its own 'saves' is a name that DropIT's layer needs",
        "converted",
    ]
    model(torch.randn(4, 8)).sum().backward()
    assert model[0].saves() == "boxes"


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("undo", [dropit.from_dropit, lambda m: dropit.to_dropit(m, compress="lossless")])
def test_undoing_it_reaches_layers_whose_forward_is_wrapped(wrap, undo):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Conv1d(1, 1, 3), nn.ReLU())
    plain.forward = lambda x: plain[4](plain[3](plain[2](plain[1](plain[0](x))).unsqueeze(1)))
    ours, x = copy.deepcopy(list(plain)), torch.randn(20, 64)
    ours = dropit.to_dropit(nn.ModuleList(ours), compress="int8", gamma=0.9)
    for layers in (plain, ours):
        for layer in layers:
            wrap(layer)

    def run(layers):
        first, norm, curve, conv, relu = layers
        return relu(conv(curve(norm(first(x))).unsqueeze(1)))

    undo(ours)
    if undo is dropit.from_dropit:
        assert dropit.coverage(ours).converted == 0
        with dropit.CacheMeter(ours) as meter:
            ours_y = run(ours)
        with dropit.CacheMeter(plain) as expected:
            plain_y = run(plain)
        assert meter.total_bytes == expected.total_bytes
        assert torch.equal(ours_y, plain_y)
        assert "dropit" not in str(ours.state_dict()._metadata)
    assert [row.status.split(":")[0] for row in dropit.coverage(ours)][1:3] == ["plain", "plain"]
    dropit.to_dropit(ours, compress="int8", gamma=0.0)
    assert dropit.coverage(ours).converted == 5
    run(ours).sum().backward()


def test_a_class_that_was_laid_over_a_converted_layer_stays():
    class Loud:
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = dropit.to_dropit(nn.Linear(64, 8), gamma=0.9), torch.randn(20, 64)
    layer.__class__ = type("LoudLinear", (Loud, type(layer)), {})
    assert held(layer, x) < 20 * 64
    assert held(dropit.from_dropit(layer), x) == 20 * 64 * 4
    assert type(layer).__mro__[:3] == (type(layer), Loud, nn.Linear)
    torch.testing.assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))

    layer = dropit.to_dropit(nn.Linear(64, 8), gamma=0.9)

    class LouderLinear(type(layer)):
        def forward(self, x):
            return 3 * super().forward(x)

    layer.__class__ = LouderLinear
    assert held(dropit.from_dropit(layer), x) == 20 * 64 * 4
    torch.testing.assert_close(layer(x), 3 * nn.functional.linear(x, layer.weight, layer.bias))
    assert dropit.coverage(layer)[0].status.startswith("plain")


@pytest.mark.parametrize("first", ["convert", "replace"])
def test_a_convolution_whose_inner_forward_is_replaced_pads_as_it_says(first):
    """As image generators do for tiles that fit together."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 9, 9)

    def circular(self, input, weight, bias):
        return nn.functional.conv2d(nn.functional.pad(input, (1, 1, 1, 1), mode="circular"), weight, bias)

    expected = circular(layer, x, layer.weight, layer.bias)
    model = nn.Sequential(layer, nn.Conv2d(8, 8, 3))
    for step in sorted(["convert", "replace"], key=lambda step: step != first):
        if step == "convert":
            dropit.to_dropit(model, gamma=0.0)
        else:
            layer._conv_forward = types.MethodType(circular, layer)
    assert torch.equal(layer(x), expected)
    assert dropit.coverage(model)[0].status == "not converted: its forward was replaced on the module itself"
    assert type(dropit.from_dropit(model)[0]) is nn.Conv2d


def deep_net():
    """A layer of each kind, and a parameter that they read."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.randn(4, 64))
            self.linear, self.norm, self.curve, self.relu = nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.ReLU()
            self.attention, self.conv = nn.MultiheadAttention(64, 4), nn.Conv1d(64, 64, 1)

        def forward(self, x):
            q = self.queries
            read = self.linear(q) + self.norm(q) + self.curve(q) + self.relu(q) + self.attention(q, q, q)[0]
            return self.conv((x[:, None] + read).mT)

    return Net()


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("compress", ["lossless", "int8"])
def test_parameters_can_be_swapped_after_a_step(compress):
    """Which one that is known by a weak reference cannot be."""
    model, x = dropit.to_dropit(deep_net(), compress=compress), torch.randn(2, 64)
    model(x).sum().backward()
    model.zero_grad()
    model.to(torch.float64)(x.double()).sum().backward()
    model.zero_grad()
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.ones_like(parameter)))
    assert model.conv.weight.sum() == 64 * 64
    model(x.double()).sum().backward()


@pytest.mark.parametrize("compress", ["lossless", "int8"])
def test_a_whole_model_can_be_saved(compress):
    model, x, file = dropit.to_dropit(small_net(), compress=compress), torch.randn(2, 3, 8, 8), io.BytesIO()
    model(x).sum().backward()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert repr(other) == repr(model)
    assert held(other, x) == held(model, x)
    assert torch.equal(other(x), model(x))


def test_a_replica_is_converted():
    layer = dropit.to_dropit(nn.Linear(64, 8))
    replica = layer._replicate_for_data_parallel()  # as DataParallel makes them
    replica.weight, replica.bias = layer.weight * 1, layer.bias * 1
    x = torch.randn(20, 64)
    assert held(replica, x) == held(layer, x)
    replica(x).sum().backward()
    assert layer.weight.grad is not None


def test_lazy_layers_wait_for_another_time():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8)), torch.randn(4, 8)
    assert dropit.coverage(dropit.to_dropit(model)).converted == 1
    model(x)
    assert dropit.coverage(dropit.to_dropit(model)).converted == 2
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8), nn.LazyBatchNorm1d())
    assert dropit.coverage(dropit.fit_budget(model, "1 GiB", x)).converted == 1


@pytest.mark.parametrize("order", ["convert shard", "shard convert"])
def test_sharding_and_converting_go_in_any_order(order, tmp_path):
    """It lays a class over the module's, too."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        layer, x = nn.Linear(64, 8), torch.randn(40, 64)
        for step in order.split():
            if step == "convert":
                dropit.to_dropit(layer, gamma=0.9)
            else:
                fsdp.fully_shard(layer, mesh=mesh)
        assert [(row.type, row.status) for row in dropit.coverage(layer)] == [("Linear", "converted")]
        layer(x).sum().backward()
        dropit.from_dropit(layer)
        assert isinstance(layer, fsdp.FSDPModule)
        assert type(layer).__name__ == "FSDPLinear"
        layer(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_a_class_that_is_told_of_its_subclasses_is_not_told_of_ours():
    known = []

    class Listed(nn.Linear):
        def __init_subclass__(cls, *, name, **kwargs):
            super().__init_subclass__(**kwargs)
            known.append(name)

    model = dropit.to_dropit(nn.Sequential(Listed(4, 4), nn.Linear(4, 2)))
    assert isinstance(model[0], Listed)
    assert isinstance(model[0], type(model[1]))
    assert not known
    model(torch.randn(3, 4)).sum().backward()
    assert type(dropit.from_dropit(model)[0]) is Listed
