import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import dropit
from dropit import ops
from dropit.policy import SavePolicy, quantize
from dropit.rematerialize import Memo
from dropit.saver import Saver
from dropit.strategies import FastMinK, MinK
from tests.layers.cases import masked


class Projections(nn.Module):
    """Queries, keys and values as three Linears of one input, as Hugging Face's ViT has them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)


def test_a_tensor_read_by_three_layers_is_held_once():
    model = dropit.to_dropit(Projections())
    x = torch.randn(40, 64)
    with dropit.CacheMeter(model) as meter:
        y = model(x)
    assert meter.total_bytes == model.q.strategy.pack(x).nbytes
    y.sum().backward()
    expected = torch.ones(32, 40) @ masked(model.q.saver, x)
    for layer in (model.q, model.k, model.v):
        torch.testing.assert_close(layer.weight.grad, expected)


def test_what_nothing_is_dropped_from_is_quantized():
    model = dropit.to_dropit(Projections(), gamma=0, compress="int8")
    x = torch.randn(40, 64)
    with dropit.CacheMeter(model) as meter:
        y = model(x)
    codes = quantize(x, 8)
    assert meter.total_bytes == codes.nbytes
    y.sum().backward()
    for layer in (model.q, model.k, model.v):
        torch.testing.assert_close(layer.weight.grad, torch.ones(32, 40) @ ops.unpack(codes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_too(dtype):
    model = dropit.to_dropit(Projections())
    x = torch.randn(40, 64)
    with torch.autocast("cpu", dtype), dropit.CacheMeter(model) as meter:
        y = model(x)
    assert meter.total_bytes == model.q.strategy.pack(x.to(dtype)).nbytes
    del y


def test_a_change_in_place_between_two_readers_is_noticed():
    model = dropit.to_dropit(Projections(), "mink", 0.9)
    x = torch.randn(40, 64)
    first = model.q(x)
    before = x.clone()
    x.neg_().add_(1)
    second = model.k(x)
    (first + second).sum().backward()
    for layer, seen in ((model.q, before), (model.k, x)):
        expected = torch.ones(32, 40) @ masked(layer.saver, seen)
        torch.testing.assert_close(layer.weight.grad, expected)


def test_a_repeated_layer_packs_its_input_each_time_it_is_another():
    linear = dropit.to_dropit(nn.Linear(32, 32), "mink", 0.5)
    x = torch.randn(20, 32)
    hidden = linear(x)
    linear(hidden).sum().backward()
    ones = torch.ones(20, 32)
    expected = ones.T @ masked(linear.saver, hidden) + (ones @ linear.weight).T @ masked(linear.saver, x)
    torch.testing.assert_close(linear.weight.grad, expected)


def test_what_was_packed_dies_with_its_tensor():
    memo, policy = Memo(), SavePolicy(MinK(0.9))
    x = torch.randn(100)
    values = weakref.ref(Saver(policy, memo, "one").save(x, x).tensors[0])
    assert Saver(policy, memo, "another").save(x, x).tensors[0] is values()
    del x
    assert values() is None


def test_a_layer_that_reads_a_tensor_again_packs_it_again():
    saver = Saver(SavePolicy(MinK(0.9)))
    x = torch.randn(100)
    assert saver.save(x, x).tensors[0] is not saver.save(x, x).tensors[0]


def test_nothing_grows_over_a_thousand_steps():
    model = dropit.to_dropit(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4)))
    memo = model[0].saver.memo

    def step(number):
        y = model(torch.randn(8, 16))
        if number % 3 == 0:
            return  # the graph is dropped without a backward
        if number % 3 == 1:
            with pytest.raises(RuntimeError, match="shape"):
                y.backward(torch.ones(3, 3))
            return
        y.sum().backward()

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    for number in range(10):
        step(number)
    before = tensors()
    for number in range(1000):
        step(number)
    assert tensors() <= before
    assert len(memo._inputs) == len(memo._publications) == 0


def test_a_hugging_face_vit_layer_holds_one_packed_copy_of_what_its_projections_read():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 128}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes)).train()
    projections = ("q_proj", "k_proj", "v_proj")
    dropit.to_dropit(model, gamma=0.9, filter_fn=lambda _, fqn: fqn.endswith(projections))
    assert dropit.coverage(model).converted == 3
    with dropit.CacheMeter(model) as meter:
        y = model(torch.randn(4, 3, 32, 32)).last_hidden_state
    n = 4 * 17 * 64
    kept = round(n / 10)
    assert meter.by_operator()["DropITLinear"] == 4 * kept + kept + 2 * -(-n // 256)
    y.sum().backward()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"])
def test_a_copy_has_the_policy_and_a_memo_of_its_own(duplicate):
    saver = Saver(SavePolicy(FastMinK(0.8)))
    x = torch.randn(100)
    packed = saver.save(x, x)
    other = duplicate(saver)
    assert other.policy == saver.policy
    assert other.save(x, x).tensors[0] is not packed.tensors[0]
    assert repr(other) == "FastMinK(gamma=0.8, per_sample=False, block_size=None)"


def test_the_layers_of_a_copied_model_still_share():
    model = copy.deepcopy(dropit.to_dropit(Projections()))
    x = torch.randn(40, 64)
    with dropit.CacheMeter(model) as meter:
        y = model(x)
    assert meter.total_bytes == model.q.strategy.pack(x).nbytes
    del y


def refilled_through_numpy(x, new):
    x.numpy()[:] = new.numpy()


def stepped_through_data(x, new):
    x.data.copy_(new)


@pytest.mark.parametrize("refill", [refilled_through_numpy, stepped_through_data])
@pytest.mark.parametrize("compress", ["lossless", "int8"])
def test_a_buffer_refilled_between_steps_is_packed_anew(refill, compress):
    model = dropit.to_dropit(Projections(), "mink", 0.9, compress=compress)
    buffer = torch.randn(40, 64)
    for _ in range(3):
        model.zero_grad()
        model(buffer).sum().backward()
        expected = torch.ones(32, 40) @ masked(model.q.saver, buffer)
        for layer in (model.q, model.k, model.v):
            torch.testing.assert_close(layer.weight.grad, expected)
        refill(buffer, torch.randn(40, 64))


def test_a_refill_between_two_readers_that_no_version_tells_is_noticed():
    model = dropit.to_dropit(Projections(), "mink", 0.9)
    x = torch.randn(40, 64)
    first, before = model.q(x), x.clone()
    x.numpy()[:] = -x.numpy()[::-1]
    (first + model.k(x)).sum().backward()
    for layer, seen in ((model.q, before), (model.k, x)):
        torch.testing.assert_close(layer.weight.grad, torch.ones(32, 40) @ masked(layer.saver, seen))


def test_learned_queries_stepped_through_data_are_packed_anew():
    queries = nn.Parameter(torch.randn(40, 64))
    linear = dropit.to_dropit(nn.Linear(64, 32), "mink", 0.9)
    for _ in range(3):
        linear.zero_grad()
        linear(queries).sum().backward()
        torch.testing.assert_close(linear.weight.grad, torch.ones(32, 40) @ masked(linear.saver, queries))
        queries.data.add_(torch.randn(40, 64))


@pytest.mark.parametrize("name", ["random", "random_c"])
@pytest.mark.parametrize("seed", [None, 3])
def test_an_input_that_lives_on_is_drawn_from_at_each_step(name, seed):
    linear = dropit.to_dropit(nn.Linear(64, 32), name, 0.5, seed=seed)
    x = torch.ones(40, 64)
    seen = set()
    for _ in range(5):
        linear.zero_grad()
        linear(x).sum().backward()
        seen.add(tuple(linear.weight.grad[0].tolist()))
    assert len(seen) == 5


RANDOM = {
    "random": {"strategy": "random"},
    "random channels": {"strategy": "random_c"},
    "stochastic": {"compress": "int8", "stochastic": True},
    "attention": {"compress": "int8"},
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_of_our_own_leave_pytorchs_generator_alone(name):
    plain = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.2, batch_first=True)
    ours = dropit.to_dropit(copy.deepcopy(plain), **RANDOM[name])
    x = torch.randn(4, 9, 32)
    states = []
    for model in (plain, ours):
        torch.manual_seed(0)
        model(x.requires_grad_()).square().sum().backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["random", "random channels", "stochastic"])
def test_the_same_seed_makes_the_same_choices(name):
    grads = []
    for _ in range(2):
        torch.manual_seed(5)
        model = dropit.to_dropit(nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4)), **RANDOM[name])
        for _ in range(3):
            model(torch.ones(8, 16)).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("name", ["random", "random channels", "stochastic"])
def test_a_loaded_state_goes_on_with_the_next_choice(name):
    def build():
        torch.manual_seed(5)
        return dropit.to_dropit(nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4)), **RANDOM[name])

    def step(model):
        model.zero_grad()
        model(torch.ones(8, 16)).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model = build()
    step(model)
    state = pickle.loads(pickle.dumps(model.state_dict()))
    second = step(model)
    resumed = build()
    resumed.load_state_dict(state)
    assert all(map(torch.equal, step(resumed), second))
    assert state.keys() == dropit.from_dropit(build()).state_dict().keys()


def test_layers_choose_for_themselves():
    model = dropit.to_dropit(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), "random", 0.5, seed=0)
    x = torch.ones(8, 16)
    kept = [masked(layer.saver, x) for layer in model]
    assert not torch.equal(*kept)
