"""What only a GPU can show: its own kernels, its own operators, and what a step waits for."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import dropit
from tests.fuzz.oracle import judge
from tests.fuzz.search import set_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def _reproducible(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield set_up()
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_reproducible")
@pytest.mark.parametrize("first", range(0, 100, 10))
def test_random_networks_train_as_plain_ones(first):
    found = [failure for seed in range(first, first + 10) for failure in judge(seed, "cuda")]
    assert not found, "\n" + "\n".join(map(str, found))


NORMS = {
    "batch norm": nn.BatchNorm2d(8),
    "batch norm without weights": nn.BatchNorm2d(8, affine=False),
    "batch norm without buffers": nn.BatchNorm2d(8, track_running_stats=False),
    "layer norm": nn.LayerNorm(8),
    "group norm": nn.GroupNorm(2, 8),
    "RMS norm": nn.RMSNorm(8),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_outputs_and_buffers_of_norms_are_pytorchs(name, dtype, frozen):
    plain = copy.deepcopy(NORMS[name]).to("cuda", dtype).requires_grad_(not frozen)
    ours = dropit.to_dropit(nn.Sequential(copy.deepcopy(plain), nn.Linear(8, 8)).to("cuda", dtype), compress="int8")[0]
    x, grad_output = torch.randn(2, 4, 8, 8, 8, device="cuda", dtype=dtype)
    x.requires_grad_()
    results = []
    for module in (plain, ours):
        y = module(x)
        wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
        results.append((y, *module.buffers(), *torch.autograd.grad(y, wanted, grad_output)))
    exact = 1 + len(list(plain.buffers()))
    for one, other in zip(*(result[:exact] for result in results), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*(result[exact:] for result in results), strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


@pytest.mark.parametrize("name", NORMS)
def test_norms_compute_under_autocast_in_the_dtype_in_which_pytorch_does(name):
    plain = copy.deepcopy(NORMS[name]).cuda()
    ours = dropit.to_dropit(nn.Sequential(copy.deepcopy(plain), nn.Linear(8, 8)).cuda(), compress="int8")[0]
    x = torch.randn(4, 8, 8, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        outputs = [module(x) for module in (plain, ours)]
    grad_output = torch.randn_like(outputs[0])
    one, other = (torch.autograd.grad(y, x, grad_output)[0] for y in outputs)
    assert outputs[0].dtype is outputs[1].dtype
    assert torch.equal(*outputs)
    assert (one - other).norm() <= 0.02 * one.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dropout_is_pytorchs_bit_for_bit(dtype):
    x = torch.randn(100, 100, device="cuda", dtype=dtype, requires_grad=True)
    converted = dropit.to_dropit(nn.Sequential(nn.Dropout(0.1), nn.Linear(100, 1)))
    results = []
    for module in (nn.Dropout(0.1), converted[0]):
        torch.manual_seed(0)
        y = module(x)
        results.append((y, *torch.autograd.grad(y, x, x.detach())))
    assert all(map(torch.equal, *results))


MODELS = {
    "ResNet-18": (torchvision.models.resnet18, 64),
    "ViT": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 128), 32),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compress", ["lossless", "int8", "int4", "int2"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_waits_for_nothing(name, compress, autocast):
    make, size = MODELS[name]
    model = dropit.to_dropit(make().cuda(), compress=compress)
    x = torch.randn(4, 3, size, size, device="cuda")
    model(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(x).sum()
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_allocator_holds_what_the_meter_counts():
    model = dropit.to_dropit(torchvision.models.resnet18().cuda(), compress="int8")
    x = torch.randn(64, 3, 64, 64, device="cuda")
    model(x).sum().backward()
    before = torch.cuda.memory_allocated()
    loss = model(x).sum()
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    with dropit.CacheMeter(model) as meter:
        loss = model(x).sum()
    assert held == pytest.approx(meter.total_bytes, rel=0.05)
