import copy
import inspect
import json

import pytest
import torch
import torchvision
from torch import nn

import dropit
from benchmarks.zoo import bert
from dropit import CacheMeter

MIB = 2**20


def test_it_counts_each_saved_storage_once_and_no_parameters():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(10, 8)
    with CacheMeter(model) as meter:
        y = model(x)
    assert meter.total_bytes == 4 * (10 * 8 + 10 * 16)  # the input, and the ReLU's output that two layers hold
    assert meter.by_module() == {"1": 640, "0": 320}
    assert meter.by_operator() == {"Addmm + Relu": 640, "Addmm": 320}
    y.sum().backward()
    assert model[0].weight.grad is not None


def test_a_view_counts_as_the_storage_it_keeps_alive():
    x = torch.randn(100, 8)
    model = nn.Linear(8, 4)
    with CacheMeter(model) as meter:
        y = model(x[:10])
    assert meter.total_bytes == x.nbytes
    del y


def test_buffers_are_not_cache():
    model = nn.BatchNorm2d(4)
    with CacheMeter(model) as meter:
        y = model(torch.randn(2, 4, 3, 3))
    assert meter.total_bytes == 4 * (2 * 4 * 9 + 4 + 4)  # input, batch mean, inverse deviation
    del y


def test_what_the_graph_has_freed_is_not_counted():
    model = nn.Linear(8, 4)
    with CacheMeter(model) as meter:
        model(torch.randn(10, 8))
    assert meter.total_bytes == 0


def test_a_backward_inside_the_block_is_measured_at_its_start():
    model = nn.Linear(8, 4)
    x = torch.randn(10, 8)
    with CacheMeter(model) as meter:
        model(x).sum().backward()
    assert meter.total_bytes == x.nbytes


def test_the_loss_counts_as_outside():
    model = nn.Linear(8, 4)
    with CacheMeter(model) as meter:
        loss = model(torch.randn(10, 8)).exp().sum()
    assert meter.by_module() == {"": 320, "(outside the model)": 160}
    assert meter.by_operator() == {"Addmm": 320, "(outside the model)": 160}
    del loss


def test_an_operation_in_place_is_known_by_its_name():
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(inplace=True), nn.Linear(16, 4))
    with CacheMeter(model) as meter:
        y = model(torch.randn(10, 8))
    assert meter.by_operator() == {"Addmm": 4 * (80 + 160), "Silu": 4 * 160}
    del y


class FunctionalReLU(nn.Module):
    """One linear layer reads what a functional ReLU holds, one what nobody else does; one is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return nn.functional.linear(self.second(torch.relu(self.first(x))), self.third.weight)


def test_who_else_holds_a_modules_input():
    model = dropit.to_dropit(FunctionalReLU(), filter_fn=lambda module, fqn: fqn != "")
    with CacheMeter(model) as meter:
        y = model(torch.randn(100, 64))
    assert meter.ran() == ["", "first", "second"]
    assert meter.saved_elsewhere("first") == meter.saved_elsewhere("third") == {}
    assert meter.saved_elsewhere("second") == {"Relu in the model": 100 * 64 * 4}
    del y


def test_what_autocast_copies_is_not_saved_elsewhere():
    model = dropit.to_dropit(FunctionalReLU())
    with CacheMeter(model) as meter, torch.autocast("cpu", torch.bfloat16):
        y = torch.relu(model.first(torch.randn(100, 64))).float().exp()
        z = model.second(y)  # of exp, which holds y, it reads a copy in bfloat16
    assert "second" in meter.ran()
    assert meter.saved_elsewhere("second") == {}
    del z


def test_measuring_changes_no_gradient_and_leaves_no_hook():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(10, 8)
    (expected,) = torch.autograd.grad(model(x).sum(), model[0].weight)
    with CacheMeter(model):
        y = model(x)
    (got,) = torch.autograd.grad(y.sum(), model[0].weight)
    assert torch.equal(got, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_retaining_it_measures_the_same_and_refuses_a_backward():
    model = torchvision.models.resnet18()
    x = torch.randn(2, 3, 64, 64)
    with CacheMeter(model) as saved:
        y = model(x)
    with CacheMeter(model, retain=False) as meter:
        z = model(x)
    assert meter.total_bytes == saved.total_bytes
    assert meter.by_operator() == saved.by_operator()
    with pytest.raises(RuntimeError, match="retain=False"):
        z.sum().backward()
    del y


def test_reading_before_measuring_is_an_error():
    with pytest.raises(RuntimeError, match="context manager"):
        _ = CacheMeter(nn.Linear(2, 2)).total_bytes


def test_a_raising_forward_leaves_no_hook():
    model = nn.Linear(8, 4)
    meter = CacheMeter(model)
    with pytest.raises(RuntimeError, match="shapes"), meter:
        model(torch.randn(2, 3))
    assert not model._forward_hooks
    assert meter.total_bytes == 0


@pytest.mark.parametrize(("arch", "mib"), [("resnet18", 21.16), ("vit_b_16", 112.7)])
def test_plain_torchvision_models_hold_the_known_bytes_per_sample(arch, mib):
    """The figures of the table in docs/models.md: float32, 224 x 224, batch 2."""
    model = torchvision.models.get_model(arch)
    with CacheMeter(model, retain=False) as meter:
        y = model(torch.randn(2, 3, 224, 224))
    assert meter.total_bytes / 2 / MIB == pytest.approx(mib, rel=0.01)
    assert sum(meter.by_module().values()) == sum(meter.by_operator().values()) == meter.total_bytes
    del y


def test_dropping_lowers_what_a_vit_holds_by_what_is_not_stored():
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 256, num_classes=10)
    x = torch.randn(8, 3, 32, 32)
    with CacheMeter(model, retain=False) as plain:
        y = model(x)
    dropit.to_dropit(model, gamma=0.9)
    with CacheMeter(model, retain=False) as ours:
        z = model(x)
    tokens = 8 * 17
    # elements: of the patches, of what goes into the projections and the MLPs' first layers, and the second
    let_go = {8 * 3 * 32 * 32: 1, tokens * 64: 4, tokens * 256: 2}
    # Of each: the values, a byte of offset for each, and a count of two bytes for each 256 elements.
    saved = sum(times * (4 * n - (5 * round(n / 10) + n // 128)) for n, times in let_go.items())
    saved += 4 * tokens * 64 - (5 * 51 + 4)  # the head sees 8 of 8 x 17 tokens, and saved all
    # Blocks round for themselves.
    assert plain.total_bytes - ours.total_bytes == pytest.approx(saved, abs=4 * 10)
    assert ours.by_operator()["DropITLinear"] > 0
    del y, z


def test_the_tables_can_be_read_by_people_and_by_programs():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with CacheMeter(model) as meter:
        y = model(torch.randn(1000, 8))
    lines = str(meter).splitlines()
    assert lines[0].split() == ["saved", "for", "backward,", "by", "operator", "saved,", "MiB", "share", "stored", "as"]
    assert lines[1].split() == ["Addmm", "+", "Relu", "0.06", "66.7%", "float32"]
    assert lines[3].split() == ["total", "0.09"]
    assert lines[5].split()[:2] == ["by", "module"]
    known = json.loads(meter.to_json())
    assert known["total_bytes"] == 96000
    assert known["by_operator"] == {"Addmm + Relu": 64000, "Addmm": 32000}
    assert known["storages"][1] == {
        "bytes": 64000,
        "dtype": "float32",
        "modules": ["1", "2"],
        "operators": ["Relu", "Addmm"],
        "line": known["storages"][1]["line"],
    }
    del y


def test_what_pytorch_saves_is_told_by_line_of_code():
    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).exp()

    model = dropit.to_dropit(Decay(), gamma=0, compress="int8")
    with CacheMeter(model) as meter:
        y = model(torch.randn(1000, 8))
    line = inspect.getsourcelines(Decay.forward)[1] + 1
    assert meter.by_line() == {f"Exp at test_memory.py:{line}": 32000}
    table = str(meter).split("\n\n")[-1].splitlines()
    assert table[0].startswith("as PyTorch saves it, by line of code")
    assert table[1].split() == ["Exp", "at", f"test_memory.py:{line}", "0.03", "100.0%", "float32"]
    del y


def test_show_prints_the_table_where_rich_is_not_or_nobody_looks(capsys, monkeypatch):
    model = nn.Linear(8, 4)
    with CacheMeter(model) as meter:
        y = model(torch.randn(10, 8))
    meter.show()
    assert capsys.readouterr().out == f"{meter}\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    meter.show()
    assert capsys.readouterr().out == f"{meter}\n"
    del y


def test_a_table_may_compare_with_the_plain_model():
    plain = nn.Sequential(nn.Linear(64, 64), nn.GELU())
    ours = dropit.to_dropit(copy.deepcopy(plain), compress="int8")
    before, after = (dropit.estimate_cache(model, (1024, 64)) for model in (plain, ours))
    table = after.table(before)
    rows = {line.split("  ")[0]: line.split() for line in table.splitlines() if line}
    assert rows["Addmm"][1:3] == ["0.00", "0.25"]
    assert rows["DropITActivation"][1:] == ["0.07", "0.00", "67.7%", "int8,", "bfloat16"]
    assert rows["total"][1:] == ["0.10", "0.50"]


SIX = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (2, 3, 64, 64), torch.float32),
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10),
        (2, 3, 32, 32),
        torch.float32,
    ),
    "convnext": (lambda: torchvision.models.convnext_tiny(num_classes=10), (2, 3, 64, 64), torch.float32),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), (2, 3, 64, 64), torch.float32),
    "swin": (lambda: torchvision.models.swin_t(num_classes=10), (2, 3, 64, 64), torch.float32),
    "bert": (lambda: bert()[0], (4, 32), torch.long),
}


@pytest.mark.parametrize("compress", [None, "lossless", "int16", "int8", "int4", "int2"])
@pytest.mark.parametrize("name", SIX)
def test_the_estimate_is_the_measurement(name, compress):
    make, shape, dtype = SIX[name]
    model = make().train()
    if compress is not None:
        dropit.to_dropit(model, compress=compress)
    x = torch.randn(shape) if dtype.is_floating_point else torch.randint(100, shape)
    parameters = [parameter.clone() for parameter in model.parameters()]
    estimated = dropit.estimate_cache(model, shape, dtype=dtype)
    with CacheMeter(model) as meter:
        y = model(x)
    assert estimated.total_bytes == pytest.approx(meter.total_bytes, rel=0.02)
    assert estimated.by_module() == pytest.approx(meter.by_module(), rel=0.02)
    assert all(map(torch.equal, model.parameters(), parameters))
    del y


def test_an_estimate_allocates_nothing():
    """A model of 40 GB, on a batch whose cache would take 4 TB."""

    def make():
        layers = [nn.Linear(50_000, 50_000), nn.ReLU(), nn.Linear(50_000, 50_000)]
        return dropit.to_dropit(nn.Sequential(*layers), "random", gamma=0.9, seed=1)

    meter = dropit.estimate_cache(make, (10_000_000, 50_000), loss_fn=lambda y: y.exp().sum())
    n = 10_000_000 * 50_000
    assert meter.by_operator()["DropITLinear"] == pytest.approx(2 * n * 0.5, rel=0.05)
    assert meter.by_module()["(outside the model)"] == 4 * n


def test_attention_is_put_back_after_an_estimate():
    real = nn.functional.scaled_dot_product_attention

    class Asks(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises((RuntimeError, NotImplementedError)):
        dropit.estimate_cache(Asks, (2, 3))
    assert nn.functional.scaled_dot_product_attention is real
