"""README and docs: every command and example is run, shortened where it takes long or needs hardware or data.

Links and anchors resolve, and the figures and tables say what is measured.
"""

import copy
import re
import runpy
import shlex
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import dropit
import train
from dropit.layers import SWAPS
from tests import processes

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "NOTES.md"]
FIGURES = sorted((ROOT / "docs" / "figures").glob("*.svg"))
LONGEST = 150  # lines of the README


@cache
def text_of(page):
    return page.read_text(encoding="utf-8")


def named(page):
    return str(page.relative_to(ROOT))


def blocks(language, page):
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)


def tables(page):
    """Each as a list of rows, the header first, of cells."""
    found = re.findall(r"(?:^\|.*\n)+", text_of(page), re.MULTILINE)
    split = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] for table in found]
    return [[rows[0], *rows[2:]] for rows in split]


# --- commands ---------------------------------------------------------------------------------------------------------

MAIN_JOB, TESTS = (block.strip() for block in blocks("sh", README))
COMMANDS = list(
    dict.fromkeys(
        command
        for page in PAGES
        for command in [
            *(line for block in blocks("sh", page) + blocks("shell", page) for line in block.splitlines()),
            *re.findall(r"`(python [^`]+)`", text_of(page)),
        ]
    )
)
OFFLINE = r"python train\.py --cfg configs/(cifar100|imagenet)/[\w.]+\.yaml"
# What a command looks like, and what runs it.
KINDS = {
    "install": r'pip install -e "\.\[\w+\]"',
    "main job": re.escape(MAIN_JOB),
    "tests": re.escape(TESTS),  # these
    "digits": r"python train\.py --cfg configs/digits/[\w.]+\.yaml( .*)?",
    "without data": rf"{OFFLINE}( NUM_GPUS 2)?",
    "info": rf"{OFFLINE} --mode info",
    "study": r"python benchmarks/accuracy\.py benchmarks/studies/digits_\w+\.yaml",  # tests/test_accuracy.py
    "benchmark": r"python benchmarks/(?!everything)\w+\.py( --[\w-]+( \d+)?)?",
    "all benchmarks": r"python benchmarks/everything\.py",
    "example": r"python examples/\w+\.py",  # tests/test_examples.py
    "config keys": re.escape("python docs/config.py > docs/config.md"),  # tests/training/test_config_docs.py
    "batch job": re.escape("sbatch docs/slurm.sbatch configs/imagenet/vit_b_fastminkx0.9.yaml"),  # test_nodes.py
}


def kind_of(command):
    (kind,) = [kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, command)] or [None]
    return kind


def commands(kind):
    return [command for command in COMMANDS if kind_of(command) == kind]


def test_each_command_is_of_a_kind_that_a_test_runs():
    assert [command for command in COMMANDS if kind_of(command) is None] == []
    assert {kind_of(command) for command in COMMANDS} == set(KINDS)


def test_two_commands_do_all_the_setup():
    """The first two blocks: a continuous integration runs them from there."""
    assert MAIN_JOB.startswith('pip install -e ".[digits]" && python train.py --cfg configs/digits/')
    assert TESTS == 'pip install -e ".[dev]" && pytest'
    assert commands("main job") == [MAIN_JOB]


def test_what_is_installed_is_there_to_be_installed():
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = {extra for command in COMMANDS for extra in re.findall(r'pip install -e "\.\[(\w+)\]"', command)}
    assert {"digits", "dev", "benchmarks"} <= extras
    assert [extra for extra in extras if not re.search(rf"^{extra} = \[", metadata, re.MULTILINE)] == []


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with the repository's configs and benchmarks, and outputs of its own."""
    for name in ("configs", "benchmarks", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_train_commands_run_as_typed_one_after_the_other(workplace):
    """On digits, an epoch each: a later one resumes or evaluates what an earlier one wrote."""
    typed = [MAIN_JOB.partition("&& ")[2], *commands("digits")]
    assert sum("--resume" in command for command in typed) == 1
    assert sum("--mode" in command for command in typed) == 2
    for command in typed:
        arguments = shlex.split(command)[2:]
        shorter = ["SOLVER.MAX_EPOCHS", "2" if "--resume" in arguments else "1"]
        if "--mode" in arguments:
            shorter = ["TRY_STEPS", "1"] if "time" in arguments else []
        assert train.main([*arguments, *shorter]) == 0
    assert "`tensorboard --logdir outputs`" in text_of(README)
    board = [sys.executable, "-m", "tensorboard.main", "--logdir", "outputs", "--inspect"]
    assert "val/acc1" in processes.run(board, check=True).stdout


@pytest.mark.parametrize("command", commands("info"))
def test_info_answers_without_the_data(workplace, command):
    done = processes.run([sys.executable, *shlex.split(command)[1:]], check=True)
    assert "converted 113 of 113" in done.stdout
    assert "predicted peak of a step" in done.stdout


@pytest.mark.parametrize("command", commands("without data"))
def test_without_the_data_or_the_gpus_one_line_says_what_is_missing(workplace, monkeypatch, capsys, command):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert train.main(shlex.split(command)[2:]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "NUM_GPUS 2, but this machine has 0" in line or "DATASET cifar100 is not in data" in line


@pytest.mark.parametrize("command", commands("batch job"))
def test_the_batch_job_names_files_that_are_there(command):
    _, script, config = shlex.split(command)
    assert (ROOT / script).is_file()
    assert (ROOT / config).is_file()


def test_the_examples_are_all_there():
    """Each is run by a test of its own."""
    shown = {command.split()[1] for command in commands("example")}
    assert shown == {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.slow
def test_the_main_job_reaches_its_accuracy_and_logs_its_scalars(workplace):
    command = MAIN_JOB.partition("&& ")[2].split()
    done = processes.run([sys.executable, *command[1:]], check=True)
    log = EventAccumulator("outputs/digits/vit_tiny_fastminkx0.9/version_0")
    log.Reload()
    last = {tag: log.Scalars(tag)[-1].value for tag in log.Tags()["scalars"]}
    assert last["val/acc1"] >= 0.93
    assert {"val/acc5", "train/loss", "lr-SGD", "dropit/dense_mb", "dropit/cache_mb"} <= last.keys()
    assert last["dropit/cache_ratio"] < 0.75
    assert "MiB saved for backward" in done.stdout


# --- benchmarks -------------------------------------------------------------------------------------------------------

PROGRAMS = {
    f"python benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text()
}


def test_every_benchmark_is_documented():
    (listed,) = [rows[1:] for rows in tables(ROOT / "docs" / "benchmarks.md") if rows[0][0] == "command"]
    assert sorted(cells[0].strip("`") for cells in listed) == sorted(PROGRAMS)


@pytest.mark.parametrize("command", commands("benchmark"))
def test_the_options_of_benchmarks_are_options(command):
    _, program, *options = command.split()
    source = (ROOT / program).read_text(encoding="utf-8")
    assert [option for option in options if option.startswith("--") and f'"{option}"' not in source] == []


@pytest.mark.parametrize(("benchmark", "rows"), [("memory", 6)])
@pytest.mark.slow
def test_the_tables_are_what_the_benchmarks_print(workplace, benchmark, rows):
    command = [sys.executable, f"benchmarks/{benchmark}.py"]
    done = processes.run(command, check=True)
    _, _, table = done.stdout.partition("\n\n")
    assert len(table.splitlines()) == rows + 2
    assert table in text_of(ROOT / "docs" / "models.md")


@pytest.mark.slow
def test_the_table_of_architectures_is_what_the_benchmark_prints(workplace):
    """But for the times."""
    done = processes.run([sys.executable, "benchmarks/architectures.py", "--quick"], check=True)
    rows = [line.split(" | ")[:-1] for line in done.stdout.splitlines()[2:] if line.startswith("| ")]
    documented = [line.split(" | ")[:-1] for line in text_of(ROOT / "docs" / "models.md").splitlines()]
    assert len(rows) == 4
    assert [row for row in rows if row not in documented] == []


@pytest.mark.parametrize(
    ("benchmark", "columns", "rows"),
    [
        ("step", 8, 1),
        ("ops", 6, 36),
        ("error", 11, 2),
        ("budget", 8, 2),
        ("rate", 2, 20),
        ("calls", 5, 2),
        ("host", 8, 11),
    ],
)
def test_the_benchmarks_run(workplace, benchmark, columns, rows):
    command = [sys.executable, f"benchmarks/{benchmark}.py", "--quick"]
    done = processes.run(command, check=True)
    table = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == rows + 2
    assert {len(line) for line in table} == {columns}


@pytest.mark.slow
def test_everything_runs_and_leaves_its_results(workplace):
    command = [sys.executable, "benchmarks/everything.py", "--quick", "--output", str(workplace / "results")]
    processes.run(command, check=True)
    kinds = {path.stem[11:].partition("-")[0] for path in (workplace / "results").iterdir()}
    assert {"ops", "step", "batch", "memory"} <= kinds


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "pattern", "precision"),
    [
        ("models.md", "*-memory-*.md", ""),
        ("benchmarks.md", "*-step-cpu-fp32*.md", ""),
        ("benchmarks.md", "*-step-cuda-bf16.md", ""),
        ("benchmarks.md", "*-step-cuda-bf16-others.md", ""),
        ("benchmarks.md", "*-step-cuda-fp32.md", ", float32"),
        ("benchmarks.md", "*-rate.md", ""),
    ],
)
def test_the_steps_and_sizes_in_docs_are_the_results(page, pattern, precision):
    paths = sorted((ROOT / "benchmarks" / "results").glob(pattern))
    measured = [
        (f"{model}{precision}", *cells) for path in paths for table in tables(path) for model, *cells in table[1:]
    ]
    shown = {tuple(cells) for table in tables(ROOT / "docs" / page) for cells in table}
    assert measured
    assert [row for row in measured if row not in shown] == []


def by_model(page, title, steps=None):
    """Of the tables of a page with that first column, in their order: by model, the row's cells by their columns."""
    found = [rows for rows in tables(ROOT / "docs" / page) if rows[0][0] == title]
    return [
        {cells[0]: dict(zip(rows[0], cells, strict=True)) for cells in rows[1:] if steps is None or cells[1] == steps}
        for rows in found
    ]


def percent(number):
    return f"{number:.0%}" if number >= 0.095 else f"{number:.1%}"


def test_the_readmes_table_says_what_those_in_docs_say():
    """In each cell: change of the cache, multiple of the plain model's time, error of the median weight's gradient."""
    (header, *rows) = next(rows for rows in tables(README) if rows[0][0] == "model")
    caches, _ = by_model("models.md", "saved for backward")
    times = {name.rpartition(", batch")[0]: row for name, row in by_model("benchmarks.md", "a step")[0].items()}
    (errors,) = by_model("benchmarks.md", "median weight", steps="0")
    assert [cells[0] for cells in rows] == list(caches) == list(errors)
    for name, plain, *cells in rows:
        time = times.get(name, {"plain": "-"})
        assert plain == f"{caches[name]['plain']} MiB"
        for method, cell in zip(header[2:], cells, strict=True):
            change = re.search(r"\((.*)%\)", caches[name][method])[1]
            off = "0" if method == "checkpointing" else percent(float(errors[name][method])).replace("%", " %")
            assert cell == f"{change} %, {time.get(method, '-').split()[0]}, {off}", (name, method)


# --- examples in Python -----------------------------------------------------------------------------------------------


def python_blocks(pages):
    return [
        pytest.param(page, block, id=f"{named(page)}:{number}")
        for page in pages
        for number, block in enumerate(blocks("python", page), 1)
    ]


@pytest.mark.parametrize(("page", "block"), python_blocks(PAGES))
def test_the_examples_run(page, block):
    """A comment behind a print that is a number is what is printed."""
    printed = []

    def recorded(value):
        line = block.splitlines()[sys._getframe(1).f_lineno - 1]
        printed.append((line.rpartition("# ")[2], value))

    exec(compile(block, named(page), "exec"), {"print": recorded})
    numbers = [(comment, value) for comment, value in printed if re.fullmatch(r"\d+\.\d+", comment)]
    assert len(numbers) == len(re.findall(r"print\(.*# \d+\.\d+$", block, re.MULTILINE))
    for comment, value in numbers:
        assert value == pytest.approx(float(comment), abs=0.006)


@pytest.mark.parametrize("call", re.findall(r"^\|[^|]*\| `(dropit\.[^`]*)`", text_of(README), re.MULTILINE))
def test_the_settings_in_the_readme_are_calls_that_work(call):
    names = {"dropit": dropit, "model": torchvision.models.resnet18().train(), "batch": torch.randn(2, 3, 32, 32)}
    assert isinstance(eval(call, names), nn.Module)


def test_the_walk_through_of_contributing_runs():
    strategies, swaps = dict(dropit.STRATEGIES), dict(SWAPS)
    names = {}
    try:
        for block in blocks("python", ROOT / "CONTRIBUTING.md"):
            exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    finally:
        for table, before in ((dropit.STRATEGIES, strategies), (SWAPS, swaps)):
            table.clear()
            table.update(before)
    assert "DropITWeighted" in names


# --- links and figures ------------------------------------------------------------------------------------------------


def prose(page):
    """Without code."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def links(page):
    """Text and target, of pictures too."""
    return re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(page))


@cache
def anchors(page):
    """Those that GitHub gives the headings: lower case, hyphens, no punctuation, numbered from the second on."""
    seen, found = Counter(), set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found.add(name if not seen[name] else f"{name}-{seen[name]}")
        seen[name] += 1
    return found


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=named)
def test_links_lead_somewhere(page):
    broken = []
    for _, target in links(page):
        path, _, anchor = target.partition("#")
        if re.match(r"https?://", target):
            continue
        to = (page.parent / path).resolve() if path else page
        if not to.exists() or ROOT not in to.parents or (anchor and anchor not in anchors(to)):
            broken.append(target)
    assert broken == []


def test_every_page_and_figure_is_linked():
    linked = {(page.parent / target.partition("#")[0]).resolve() for page in PAGES for _, target in links(page)}
    assert [named(path) for path in [*DOCS, *FIGURES] if path not in linked] == []


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= LONGEST


@pytest.mark.parametrize("figure", FIGURES, ids=named)
def test_figures_can_be_read(figure):
    """In light and dark, at no less than 12 pixels, with a description."""
    text = text_of(figure)
    root = ElementTree.fromstring(text)
    assert all(root.findtext(f"{{http://www.w3.org/2000/svg}}{name}") for name in ("title", "desc"))
    assert "prefers-color-scheme: dark" in text
    assert min(map(float, re.findall(r"font-size: ([\d.]+)px", text))) >= 12
    styled = set(re.findall(r"\.([\w-]+) \{", text))
    assert set(" ".join(re.findall(r'class="([^"]+)"', text)).split()) <= styled


def chain():
    """What the figure shows, after a normalization whose own part is not in it."""
    layers = [nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1, bias=False)] * 2
    return nn.Sequential(*map(copy.deepcopy, layers)), torch.randn(8, 64, 32, 32), "0"


def transformer():
    """A block of torchvision's ViT-B/16."""
    block = torchvision.models.vision_transformer.EncoderBlock(12, 768, 3072, 0.0, 0.0)
    return block, torch.randn(4, 197, 768), None


@pytest.mark.parametrize("build", [chain, transformer])
def test_the_figures_totals_are_measured(build, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    methods = runpy.run_path(str(ROOT / "benchmarks" / "methods.py"))["methods"]
    convert = {
        "plain": lambda model: model,
        "published": methods(gamma=0.9)["published scheme"],
        "lossless": methods(gamma=0.9)["dropping"],
        "int8": lambda model: dropit.to_dropit(model, gamma=0, compress="int8"),
    }
    svg = ElementTree.fromstring(text_of(ROOT / "docs" / "figures" / f"{build.__name__}.svg"))
    drawn = {element.get("id"): element.text for element in svg.iter() if "total-" in element.get("id", "")}
    assert len(drawn) == len(convert)
    for way, converted in convert.items():
        model, x, apart = build()
        model = converted(model.train())
        with dropit.CacheMeter(model) as meter:
            y = model(x.requires_grad_())
        nbytes = meter.total_bytes - meter.by_module().get(apart, 0)
        assert nbytes / x.numel() == pytest.approx(float(drawn[f"total-{way}"].removesuffix(" B")), rel=0.005), way
        del y


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_files_that_are_named_are_there(page):
    folders = "benchmarks|docs|dropit|examples|tests"
    mentioned = re.findall(rf"`((?:{folders})/(?:[\w/-]+\.(?:py|md|sbatch)|(?:[\w-]+/)*))`", prose(page))
    assert [path for path in mentioned if not (ROOT / path).exists()] == []


def test_what_is_promised_names_its_tests():
    assert len(set(re.findall(r"`tests/[\w/]+\.py`", text_of(ROOT / "docs" / "promises.md")))) > 10
