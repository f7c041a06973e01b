"""NumPy's way gives what the reference gives, bit for bit."""

import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import dropit
from dropit import ops
from dropit.ops import cpu, native, reference
from dropit.packed import flatten
from dropit.strategies import FastMinK, MinK
from tests import processes
from tests.ops.test_reference import scattered_groups

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def bits_of(x):
    """With one NaN for all, whose bits depend on the place in the tensor where PyTorch converts to bfloat16."""
    if not x.is_floating_point():
        return x
    return x.masked_fill(x.isnan(), math.nan).view(reference.INTEGER_OF_SIZE[x.element_size()])


def same(first, second):
    assert first.layout == second.layout
    for a, b in zip(first[:3], second[:3], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(bits_of(a), bits_of(b))


def awkward(rng, n, dtype):
    """Numbers with ties, zeros, NaN and Inf among them."""
    x = torch.from_numpy(rng.standard_normal(n)).to(dtype)
    if rng.random() < 0.5:
        x = (x * 2).round() / 2
    where = torch.from_numpy(rng.random(n) < rng.choice([0, 0.01, 0.5]))
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-7, 65504.0]).to(dtype)
    x[where] = special[torch.from_numpy(rng.integers(len(special), size=int(where.sum())))]
    return x


@pytest.fixture
def compiled(monkeypatch):
    """Has tensors of any size worked on by C."""
    if native.shared_object() is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setattr(native, "_WORTH", 0)


@pytest.fixture
def by_numpy(monkeypatch):
    monkeypatch.setattr(native, "takes", lambda *tensors: False)


@pytest.mark.parametrize("way", ["by_numpy", "compiled"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_random_arrays(dtype, seed, way, request, monkeypatch):
    request.getfixturevalue(way)
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(cpu, "_PIECE", int(rng.choice([256, 1024, 2**18])))
    monkeypatch.setattr(cpu, "_MANY", int(rng.choice([0, 2**23])))
    for _ in range(40):
        n, block_size = int(rng.integers(1, 5000)), int(rng.choice([1, 7, 64, 100, 192, 256, 300, 1024, 6000]))
        rest = n % block_size
        count, rest_count = int(rng.integers(1, block_size + 1)), int(rng.integers(1, rest + 1)) if rest else 0
        flat, layout = flatten(awkward(rng, n, dtype))
        if block_size == 256 and rng.random() < 0.5:
            layout = layout._replace(per_block=count)
        arguments = (flat, block_size, count, rest_count, layout)
        packed, expected = cpu.pack_largest(*arguments), reference.pack_largest(*arguments)
        same(packed, expected)
        dense, expected_dense = ops.unpack(packed), reference.unpack(packed)
        assert torch.equal(bits_of(dense), bits_of(expected_dense))
        assert dense.stride() == expected_dense.stride()


@pytest.mark.parametrize("way", ["by_numpy", "compiled"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_block_of_all(dtype, way, request, monkeypatch):
    request.getfixturevalue(way)
    rng = np.random.default_rng(0)
    monkeypatch.setattr(cpu, "_PIECE", 512)
    for _ in range(40):
        n = int(rng.integers(513, 5000))
        flat, layout = flatten(awkward(rng, n, dtype))
        arguments = (flat, n, int(rng.choice([1, n // 50, n // 10, n // 2, n - 1])), 0, layout)
        same(cpu.pack_largest(*arguments), reference.pack_largest(*arguments))


@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.int8])
def test_narrower_values(value_dtype):
    flat, layout = flatten(torch.randn(3000))
    arguments = (flat, 256, 60, 30, layout, value_dtype)
    packed = cpu.pack_largest(*arguments)
    same(packed, reference.pack_largest(*arguments))
    assert torch.equal(cpu.unpack(packed), reference.unpack(packed))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_marks(dtype, monkeypatch):
    rng = np.random.default_rng(0)
    for piece, n in ((64, 1), (64, 63), (64, 1000), (2**18, 1000)):
        monkeypatch.setattr(cpu, "_PIECE", piece)
        flat, grad = awkward(rng, n, dtype), awkward(rng, n, dtype)
        for lower, upper in ((0.0, float("inf")), (-1.0, 0.5)):
            bits = cpu.range_bitmask(flat, lower, upper)
            assert torch.equal(bits, reference.range_bitmask(flat, lower, upper))
            assert torch.equal(bits_of(cpu.apply_bitmask(grad, bits)), bits_of(reference.apply_bitmask(grad, bits)))


@pytest.mark.parametrize("strategy", [FastMinK(0.9), FastMinK(0.5), FastMinK(0.9, block_size=1000), MinK(0.9)], ids=str)
def test_several_pieces_and_threads_change_nothing(strategy, by_numpy, monkeypatch):
    x = torch.randn(3 * cpu._PIECE // 64 + 17).round(decimals=2)
    monkeypatch.setattr(cpu, "_PIECE", 4096)
    monkeypatch.setattr(cpu, "_MANY", 0)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        packed = strategy.pack(x)
        results.append((packed, ops.unpack(packed)))
    torch.set_num_threads(threads)
    for packed, dense in results[1:]:
        same(packed, results[0][0])
        assert torch.equal(dense, results[0][1])


@pytest.mark.parametrize("has_numpy", [True, False])
def test_it_is_what_strategies_use_and_a_machine_without_numpy_the_reference(has_numpy, monkeypatch):
    x = torch.randn(5000)
    expected = FastMinK(0.7).pack(x)
    monkeypatch.setattr(ops, "_HAS_NUMPY", has_numpy)
    called = []
    for module in (cpu, reference):
        for name in ("pack_largest", "unpack"):
            function = getattr(module, name)
            record = lambda *given, at=module, f=function: called.append(at) or f(*given)  # noqa: E731
            monkeypatch.setattr(module, name, record)
    packed = FastMinK(0.7).pack(x)
    dense = ops.unpack(packed)
    same(packed, expected)
    assert torch.equal(dense, torch.where(FastMinK(0.7).select(x[None])[0], x, 0))
    assert set(called) == {cpu if has_numpy else reference}


def test_training_is_the_same_for_fifty_steps(monkeypatch):
    curves = []
    for has_numpy in (True, False):
        monkeypatch.setattr(ops, "_HAS_NUMPY", has_numpy)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
        dropit.to_dropit(model, gamma=0.8)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x, y = torch.randn(256, 64), torch.randint(10, (256,))
        losses = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == curves[1]
    assert curves[0][-1] < 0.8 * curves[0][0]


def test_several_threads_may_pack_at_once(by_numpy, monkeypatch):
    monkeypatch.setattr(cpu, "_PIECE", 1024)
    monkeypatch.setattr(cpu, "_MANY", 0)
    xs = [torch.randn(20_000) for _ in range(8)]
    expected = [FastMinK(0.9).pack(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for got, packed in zip(pool.map(FastMinK(0.9).pack, xs), expected, strict=True):
            same(got, packed)


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="there is no fork here")
def test_a_forked_process_packs_too():
    """In an interpreter where none of OpenMP's threads has run, and which ends with its test, its child as well."""
    code = """
import os, torch
from dropit.ops import cpu
from dropit.strategies import FastMinK

torch.set_num_threads(2)
cpu._MANY, cpu._PIECE = 0, 1024
x = torch.arange(20_000.0)
packed = FastMinK(0.9).pack(x)
assert cpu._pool is not None
process = os.fork()
if process == 0:
    again = FastMinK(0.9).pack(x)
    os._exit(0 if all(map(torch.equal, again[:2], packed[:2])) and cpu._pool is not None else 1)
assert os.waitpid(process, 0)[1] == 0
"""
    processes.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("per_block", [None, 26])
def test_the_operators_are_what_compilers_take_them_for(per_block):
    x = torch.randn(700)
    torch.library.opcheck(cpu._select_op, (x, 256, 26, 19, per_block))
    values = cpu._select(x, 256, 26, 19, None)[0]
    bits = reference.pack_bits(reference.largest_mask(x.unsqueeze(0), 256, 26, 19).squeeze(0))
    torch.library.opcheck(cpu._place_op, (values, bits, 700))


def test_compilers_keep_them_whole():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = dropit.to_dropit(torch.nn.Linear(512, 16), gamma=0.5)
    torch.compile(layer, backend=aot_autograd(fw_compiler=backend), fullgraph=True)(torch.randn(100, 512))
    names = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert "dropit.select_on_cpu.default" in names
    assert not any("sort" in name or "topk" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_quantizing_piece_by_piece_changes_no_bit(dtype):
    x = torch.randn(2 * cpu._PIECE + 77, dtype=dtype)
    for piece, whole in zip(cpu.quantize(x, 2), reference.quantize(x, 2), strict=True):
        assert torch.equal(piece, whole)


# --- C ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 31, 32, 33, 63, 64, 999, 4096 + 7])
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_and_what_they_stand_for(compiled, dtype, bits, n):
    rng = np.random.default_rng(n)
    for _ in range(20):
        x = awkward(rng, n, dtype) * 2.0 ** int(rng.integers(-140, 127))
        assert native.takes(x)
        (codes, scales), (expected, expected_scales) = cpu.quantize(x, bits), reference.quantize(x, bits)
        assert torch.equal(codes, expected)
        assert torch.equal(bits_of(scales), bits_of(expected_scales))
        for to in (torch.float32, torch.bfloat16, torch.float16):
            dense, expected_dense = (ops_.dequantize(codes, scales, to, n) for ops_ in (cpu, reference))
            assert torch.equal(bits_of(dense), bits_of(expected_dense))


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize(("sections", "inner"), [(1, 50), (7, 1), (3, 32), (5, 49), (4, 700)])
@pytest.mark.parametrize("centered", [True, False])
def test_codes_of_what_is_normalized(compiled, sections, inner, bits, centered):
    rng = np.random.default_rng(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = awkward(rng, 3 * sections * inner, dtype)
        mean, rstd = torch.randn(sections), torch.rand(sections) + 0.5
        statistics = reference.Statistics(mean if centered else None, rstd, inner)
        arguments = (x, bits, None, statistics)
        for got, expected in zip(cpu.quantize(*arguments), reference.quantize(*arguments), strict=True):
            assert torch.equal(bits_of(got), bits_of(expected))


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_of_all_sizes(compiled, dtype, bits):
    x = scattered_groups(np.random.default_rng(0), dtype, 2000).reshape(-1)
    codes, scales = cpu.quantize(x, bits)
    for got, expected in zip((codes, scales), reference.quantize(x, bits), strict=True):
        assert torch.equal(bits_of(got), bits_of(expected))
    for to in (torch.float32, torch.bfloat16):
        dense, expected = (way.dequantize(codes, scales, to, x.numel()) for way in (cpu, reference))
        assert torch.equal(bits_of(dense), bits_of(expected))


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize(("sections", "inner"), [(1, 50), (7, 1), (300, 1), (64, 1), (3, 32), (5, 49), (4, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_restored_and_rescaled(compiled, dtype, bits, sections, inner):
    rng = np.random.default_rng(inner)
    x = awkward(rng, 3 * sections * inner, dtype)
    codes, scales = reference.quantize(x, bits)
    weight, bias = torch.randn(sections), torch.randn(sections)
    for by in (
        reference.Rescaling(weight, bias, inner),
        reference.Rescaling(weight, None, inner, 0.0),
        reference.Rescaling(None, bias, inner, -0.3, 0.7),
        reference.Rescaling(weight.to(dtype), bias.to(dtype), inner, 0.0, 6.0),
        reference.Rescaling(weight, bias, inner, dtype=torch.bfloat16),
    ):
        got, expected = (way.dequantize(codes, scales, dtype, len(x), by) for way in (cpu, reference))
        assert got.dtype is expected.dtype
        assert torch.equal(bits_of(got), bits_of(expected))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 31, 32, 33, 999, 4096 + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_marks_and_what_is_marked(compiled, dtype, n):
    rng = np.random.default_rng(n)
    for lower, upper in ((0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, math.inf), (0.1, 0.7)):
        for _ in range(5):
            flat, grad = awkward(rng, n, dtype), awkward(rng, n, dtype)
            bits = cpu.range_bitmask(flat, lower, upper)
            assert torch.equal(bits, reference.range_bitmask(flat, lower, upper))
            kept, expected = cpu.apply_bitmask(grad, bits), reference.apply_bitmask(grad, bits)
            assert torch.equal(bits_of(kept), bits_of(expected))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_tensors_by_threads(compiled, dtype, threads):
    """Parts of 32,768 elements, the last of them neither whole nor of whole groups."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = awkward(np.random.default_rng(0), 478 * 49 * 7, dtype)  # 5 parts, and 114 elements
        statistics = reference.Statistics(torch.randn(49), torch.rand(49) + 0.5, 7)
        rescaling = reference.Rescaling(torch.randn(49), torch.randn(49), 7, 0.0)
        for bits in (16, 8, 4, 2):
            codes = [way.quantize(x, bits, None, statistics) for way in (cpu, reference)]
            for got, expected in zip(*codes, strict=True):
                assert torch.equal(bits_of(got), bits_of(expected))
            dense = [way.dequantize(*codes[0], dtype, len(x), rescaling) for way in (cpu, reference)]
            assert torch.equal(*map(bits_of, dense))
        marks = [way.range_bitmask(x, -0.5, 1.0) for way in (cpu, reference)]
        assert torch.equal(*marks)
        assert torch.equal(*(bits_of(way.apply_bitmask(x, marks[0])) for way in (cpu, reference)))
        for strategy in (FastMinK(0.9), FastMinK(0.5), FastMinK(0.95, block_size=9984), MinK(0.9)):
            packed = strategy.pack(x)
            mask = strategy.select(x[None])[0]
            same(packed, reference.pack(x, mask, int(mask.sum()), packed.layout))
            assert torch.equal(*(bits_of(way.unpack(packed)) for way in (cpu, reference)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_element_at_all(compiled, dtype):
    flat, layout = flatten(torch.empty(0, 3, dtype=dtype))
    packed = cpu.pack_largest(flat, 256, 26, 0, layout._replace(per_block=26))
    assert cpu.unpack(packed).shape == (0, 3)
    assert native.place(flat, torch.empty(0, dtype=torch.uint8), 0).numel() == 0


@pytest.mark.parametrize(("dtype", "integers"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)], ids=str)
def test_magnitudes_next_to_each_other(compiled, dtype, integers):
    """The lowest and the highest bit patterns there are, NaN among them, as often equal as not."""
    rng = np.random.default_rng(0)
    ends = torch.iinfo(integers)
    for _ in range(200):
        n, spread = int(rng.integers(1, 600)), int(rng.choice([1, 2, 5, 1000]))
        near = torch.from_numpy(rng.integers(0, spread, n)).to(integers)
        origin = rng.choice(["zero", "highest", "negative zero", "anywhere"])
        first = {"zero": 0, "highest": ends.max - spread + 1, "negative zero": ends.min}.get(origin)
        bits = near + (int(rng.integers(0, ends.max - spread)) if first is None else first)
        flat, layout = flatten(bits.view(dtype))
        arguments = (flat, 256, int(rng.integers(1, 257)), int(rng.integers(1, n % 256 + 1)) if n % 256 else 0, layout)
        got, expected = cpu.pack_largest(*arguments), reference.pack_largest(*arguments)
        assert torch.equal(got.values.view(integers), expected.values.view(integers))
        assert torch.equal(got.positions, expected.positions)


@pytest.mark.parametrize("n", [1, 8, 63, 64, 65, 1000])
def test_a_digest_tells_of_any_change_of_a_bit(compiled, n):
    x = torch.randint(256, (n,), dtype=torch.uint8)
    digests = {native.digest(x)}
    for place in range(n):
        for bit in range(8):
            changed = x.clone()
            changed[place] ^= 1 << bit
            digests.add(native.digest(changed))
    swapped = x.roll(1) if n > 1 else x + 1
    assert len(digests) == 8 * n + 1
    assert native.digest(x) == native.digest(x.clone())
    assert torch.equal(swapped, x) or native.digest(swapped) != native.digest(x)


@pytest.mark.parametrize("reason", ["DROPIT_NATIVE=0", "CC=/nowhere/cc", "CC=false", "XDG_CACHE_HOME=/dev/null"])
def test_without_a_compiler_or_a_cache_pytorch_does_the_same(reason, tmp_path):
    program = """
import torch
from dropit import ops
x = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
codes, scales = ops.quantize(x)
print(codes.sum().item(), ops.dequantize(codes, scales, x.dtype, x.numel()).sum().item())
"""
    name, _, value = reason.partition("=")
    outputs = []
    for environment in ({"XDG_CACHE_HOME": str(tmp_path)}, {"XDG_CACHE_HOME": str(tmp_path / "other"), name: value}):
        done = processes.run([sys.executable, "-c", program], env={**os.environ, **environment}, check=True)
        assert done.stderr == ""
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]


def test_what_is_compiled_is_kept_for_the_next_process(tmp_path):
    program = "import torch; from dropit.ops import native; print(native.takes(torch.randn(2**16)))"
    made = []
    for _ in range(2):
        done = processes.run(
            [sys.executable, "-c", program], env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, check=True
        )
        (library,) = (tmp_path / "dropit").iterdir() if done.stdout == "True\n" else [tmp_path]
        made.append(library.stat().st_mtime_ns)
    assert made[0] == made[1]


def test_a_default_device_is_not_where_a_tensor_is_packed():
    model = dropit.to_dropit(torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.ReLU(), torch.nn.Linear(300, 3)))
    x = torch.randn(200, 300)
    with torch.device("meta"):
        model(x).sum().backward()
    assert model[0].weight.grad.device.type == "cpu"
