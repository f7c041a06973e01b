"""What a wheel and an sdist carry."""

import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parent.parent


def left_out(directory, names):
    """What runs and builds leave in the tree; data and outputs are theirs only at its root."""
    patterns = [".*", "build", "dist", "*.egg-info", "__pycache__", *(["outputs", "data"] * (Path(directory) == ROOT))]
    return shutil.ignore_patterns(*patterns)(directory, names)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the sdist, built from a copy of the tree."""
    source = tmp_path_factory.mktemp("source") / "dropit"
    shutil.copytree(ROOT, source, ignore=left_out)
    build = "import sys; from setuptools import build_meta as b; print(b.build_{}('.'))"
    names = []
    for kind in ("wheel", "sdist"):
        done = processes.run([sys.executable, "-c", build.format(kind)], cwd=source, check=True)
        names.append(source / done.stdout.splitlines()[-1])
    return names


def modules():
    return {str(path.relative_to(ROOT)) for path in (ROOT / "dropit").rglob("*.py")}


def test_the_wheel_carries_all_code_and_nothing_else(archives):
    files = set(zipfile.ZipFile(archives[0]).namelist())
    code = {name for name in files if ".dist-info/" not in name}
    assert code == modules() | {"dropit/py.typed"}
    assert any(name.endswith("LICENSE") for name in files)


def test_the_sdist_carries_configs_and_tests_too(archives):
    with tarfile.open(archives[1]) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    assert modules() <= files
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")} <= files
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")} <= files
    assert {"train.py", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "setup.py"} <= files


def test_the_library_asks_for_torch_only(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        required = [line for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: torch>=2.6"]
