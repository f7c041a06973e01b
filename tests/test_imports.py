"""The walls between the parts of the project, kept as tests."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import dropit
from tests import processes

ROOT = Path(__file__).resolve().parent.parent
# Each part of the core, and what it may import of the others.
MAY_IMPORT = {
    "dropit.tracing": set(),
    "dropit.traced": {"dropit.tracing"},
    "dropit.packed": set(),
    "dropit.ops": {"dropit.packed", "dropit.tracing"},
    "dropit.strategies": {"dropit.packed", "dropit.ops"},
    "dropit.snapshot": {"dropit.ops", "dropit.tracing"},
    "dropit.saved": {"dropit.packed", "dropit.ops", "dropit.tracing"},
    "dropit.policy": {"dropit.packed", "dropit.ops", "dropit.strategies", "dropit.tracing"},
    "dropit.rematerialize": {
        "dropit.packed",
        "dropit.saved",
        "dropit.snapshot",
        "dropit.traced",
        "dropit.tracing",
    },
    "dropit.saver": {
        "dropit.packed",
        "dropit.ops",
        "dropit.strategies",
        "dropit.snapshot",
        "dropit.saved",
        "dropit.policy",
        "dropit.rematerialize",
        "dropit.tracing",
    },
    "dropit.layers": {
        "dropit.packed",
        "dropit.ops",
        "dropit.snapshot",
        "dropit.saved",
        "dropit.rematerialize",
        "dropit.saver",
        "dropit.tracing",
    },
    "dropit.coverage": {"dropit.layers", "dropit.memory"},
    "dropit.convert": {
        "dropit.layers",
        "dropit.strategies",
        "dropit.policy",
        "dropit.rematerialize",
        "dropit.saver",
        "dropit.coverage",
    },
    "dropit.calibration": {"dropit.layers", "dropit.memory"},
    "dropit.budget": {
        "dropit.layers",
        "dropit.calibration",
        "dropit.convert",
        "dropit.policy",
        "dropit.rematerialize",
        "dropit.saver",
    },
    "dropit.ledger": set(),
    "dropit.memory": {"dropit.ledger"},
    "dropit.lightning": {"dropit.convert", "dropit.memory"},
    "dropit": {
        "dropit.budget",
        "dropit.convert",
        "dropit.coverage",
        "dropit.layers",
        "dropit.lightning",
        "dropit.memory",
        "dropit.strategies",
    },
}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(name):
    """The longest key of MAY_IMPORT that the dotted name lies in."""
    return max((key for key in MAY_IMPORT if name == key or name.startswith(key + ".")), key=len, default=None)


CORE = [path for path in (ROOT / "dropit").rglob("*.py") if "training" not in path.parts]
TRAINING = list((ROOT / "dropit" / "training").rglob("*.py"))
# The parts of the trainer: each may import those before it.
TRAINER = ["errors", "processes", "checkpoint", "data", "solver", "callbacks", "model", "config", "builders", "run"]


def test_importing_dropit_needs_torch_only():
    code = (
        "import dropit, sys;"
        "heavy = {'pytorch_lightning', 'lightning', 'torchvision', 'yacs', 'triton', 'numpy.testing'};"
        "assert not heavy & set(sys.modules);"
        "assert not [name for name in sys.modules if name.startswith('dropit.training')]"
    )
    processes.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_the_core_imports_downwards_only(path):
    own = part(module_name(path))
    for name in imports(path):
        if name.split(".")[0] == "dropit":
            assert not name.startswith("dropit.training")
            assert part(name) in MAY_IMPORT[own] | {own} or name == "dropit.ops", f"{own} imports {name}"


@pytest.mark.parametrize("path", TRAINING, ids=module_name)
def test_the_trainer_uses_public_names_only(path):
    public = {f"dropit.{name}" for name in (*dropit.__all__, "CacheMonitor", "DropITCallback")}
    for name in imports(path):
        if name.split(".")[0] == "dropit":
            assert name == "dropit" or name.startswith("dropit.training.") or name in public


@pytest.mark.parametrize("path", TRAINING, ids=module_name)
def test_the_trainer_imports_downwards_only(path):
    own = f"{module_name(path)}.".split(".")[2]
    for name in imports(path):
        if name.startswith("dropit.training.") and name.split(".")[2] != own:
            assert TRAINER.index(name.split(".")[2]) < TRAINER.index(own), f"{own} imports {name}"


def test_the_config_stops_at_the_border():
    """Data, models, solver and callbacks take plain arguments."""
    knowing = {module_name(path) for path in TRAINING if any(name.startswith("yacs") for name in imports(path))}
    assert {name.split(".")[2] for name in knowing} <= {"config", "builders", "run"}


def test_a_linear_reaches_the_kernel_within_six_frames(monkeypatch):
    from dropit.ops import cpu

    def pack_largest(*args):
        names = []
        frame = sys._getframe()
        while frame.f_code.co_qualname != "DropITLinear.forward":
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        seen.append([frame.f_code.co_name, *reversed(names)])
        return real(*args)

    seen, real = [], cpu.pack_largest
    monkeypatch.setattr(cpu, "pack_largest", pack_largest)
    dropit.to_dropit(torch.nn.Linear(256, 256))(torch.randn(256, 256, requires_grad=True))
    assert seen == [["forward", "dropit_linear", "save", "pack", "pack_largest"]]


MUTABLE = ("WeakTensorKeyDictionary", "WeakKeyDictionary", "defaultdict", "dict", "list", "set")


def test_nothing_mutable_lives_in_a_module_of_the_core_but_the_registry():
    """What the layers of a model share belongs to the model."""
    found = set()
    for path in CORE:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                value = ast.unparse(node.value)
                if value in ("{}", "[]") or isinstance(node.value, ast.Set) or value.partition("(")[0] in MUTABLE:
                    found.add(ast.unparse(node).partition(":")[0].partition(" =")[0])
    assert found == {"SWAPS", "_PLAIN", "CALLERS", "FUNCTIONS", "_VIEWS", "_STAND_INS", "NAMES"}
