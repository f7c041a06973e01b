"""What a wheel and an sdist carry."""

import re
import runpy
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the sdist, built from a copy of the tree."""
    source = tmp_path_factory.mktemp("source") / "dropit"

    def made_here(directory, names):
        ignored = set(shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")(directory, names))
        return ignored | ({"outputs", "data", "build", "dist"} if directory == str(ROOT) else set())

    shutil.copytree(ROOT, source, ignore=made_here)
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
    assert code == modules() | {"dropit/py.typed", "dropit/ops/native.c"}
    assert any(name.endswith("LICENSE") for name in files)


def test_the_sdist_carries_configs_and_tests_too(archives):
    with tarfile.open(archives[1]) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    assert modules() <= files
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")} <= files
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")} <= files
    assert {"train.py", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "setup.py"} <= files


def metadata(wheel):
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith("METADATA"))
        return files.read(name).decode()


def test_the_library_asks_for_torch_only(archives):
    required = [line for line in metadata(archives[0]).splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: torch>=2.6"]


def test_the_sdist_carries_what_its_pages_link_to(archives):
    with tarfile.open(archives[1]) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve().relative_to(ROOT)
            assert str(path) in files, f"{page.name} links to {target}"


def test_an_index_shows_the_readme_without_a_relative_link(archives):
    build, readme = runpy.run_path(str(ROOT / "setup.py")), (ROOT / "README.md").read_text(encoding="utf-8")
    url = build["repository"]((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shown = metadata(archives[0]).partition("\n\n")[2]
    assert shown.strip() == build["description"](readme, url).strip()
    assert "\nDescription-Content-Type: text/markdown\n" in metadata(archives[0])
    assert re.findall(r"\]\((?!https?://)", readme)
    assert not re.findall(r"\]\((?!https?://)", shown)


def test_with_a_repository_the_readmes_links_lead_into_it():
    build, readme = runpy.run_path(str(ROOT / "setup.py")), (ROOT / "README.md").read_text(encoding="utf-8")
    url = build["repository"]('[project.urls]\nRepository = "https://host.example/dropit/"\n')
    text = build["description"](readme, url)
    assert "![" in text
    assert text.count("](") == readme.count("](")
    assert not re.findall(r"\]\((?!https?://)", text)
    pointed = re.findall(r"(!?)\[[^\]]*\]\(https://host\.example/dropit/(raw|blob)/HEAD/([^)#]+)", text)
    assert len(pointed) > 10
    assert all((kind == "raw") == bool(picture) for picture, kind, _ in pointed)
    assert [path for *_, path in pointed if not (ROOT / path).exists()] == []
