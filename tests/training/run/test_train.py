import os
import sys
from pathlib import Path

import pytest
import torch

import train
from dropit.training.errors import SetupError
from dropit.training.model.classifier import Classifier
from tests import processes
from tests.training.outcome import events, failure, scalars

ROOT = Path(__file__).parents[3]


def test_a_run_leaves_its_scalars_pages_and_checkpoints(config, capsys):
    assert train.main(["--cfg", config]) == 0
    version = Path("outputs/few/vit/version_0")
    log = events(version)
    tags = set(log.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/acc1", "val/acc5", "lr-SGD", "train/samples_per_sec"} <= tags
    assert {"dropit/cache_mb", "dropit/dense_mb", "dropit/cache_ratio"} <= tags

    cache, dense, ratio = (scalars(log, f"dropit/{tag}") for tag in ("cache_mb", "dense_mb", "cache_ratio"))
    assert len(ratio) == 3
    assert ratio[0] == pytest.approx(cache[0] / dense[0]) == pytest.approx(0.66, abs=0.02)
    assert len(scalars(log, "val/acc1")) == 3
    plugins = log.summary_metadata
    assert {"custom_scalars__config__"} <= plugins.keys()
    assert any("hparams" in tag for tag in plugins)

    best = torch.load(version / "checkpoints" / "best.ckpt", weights_only=True)
    assert "encoder.layers.encoder_layer_0.mlp.0.weight" in {key.removeprefix("model.") for key in best["state_dict"]}
    assert "GAMMA: 0.9" in best["config"]
    out = capsys.readouterr().out
    assert "DropIT: fastmink, gamma 0.9: converted 28 of 41 layers" in out
    summary = {line.split()[0]: line for line in out.splitlines() if line}
    assert f"{cache[-1]:.2f} MiB saved for backward, {dense[-1]:.2f} plain (-34" in summary["cache"]
    assert "ms per step" in summary["time"]
    assert summary["logs"].split()[1] == str(version)
    epochs = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in epochs] == ["1/3:", "2/3:", "3/3:"]
    assert "val/acc1 0." in epochs[0]
    assert "dropit/cache_mb" in epochs[0]


def test_it_learns(config):
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "30", "CHECK_VAL_EVERY_N_EPOCH", "30"]) == 0
    log = events("outputs/few/vit/version_0")
    loss = scalars(log, "train/loss")
    assert loss[-1] < loss[0] / 2
    assert len(scalars(log, "val/acc1")) == 1


def test_a_new_run_loses_nothing_of_the_last(config):
    for _ in range(2):
        assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "1"]) == 0
    assert sorted(path.name for path in Path("outputs/few/vit").iterdir()) == ["version_0", "version_1"]


def test_resume_goes_on_where_the_run_stopped(config):
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "2"]) == 0
    assert train.main(["--cfg", config, "--resume", "SOLVER.MAX_EPOCHS", "4"]) == 0
    last = torch.load("outputs/few/vit/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 8
    assert len(scalars(events("outputs/few/vit/version_0"), "dropit/cache_mb")) >= 4
    assert not Path("outputs/few/vit/version_1").exists()


def test_a_finished_run_says_that_nothing_is_left(config, capsys):
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "1"]) == 0
    capsys.readouterr()
    assert train.main(["--cfg", config, "--resume", "SOLVER.MAX_EPOCHS", "1"]) == 0
    assert "nothing left to train" in capsys.readouterr().out


def test_a_checkpoint_from_elsewhere_is_taken_up_in_new_logs(config):
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "1"]) == 0
    Path("outputs/few/vit/version_0/checkpoints/last.ckpt").rename("elsewhere.ckpt")
    assert train.main(["--cfg", config, "--resume", "CKPT", "elsewhere.ckpt", "SOLVER.MAX_EPOCHS", "2"]) == 0
    last = torch.load("outputs/few/vit/version_1/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 4


def test_the_plain_run_stands_beside_it(config, capsys):
    assert train.main(["--cfg", config, "MODEL.DROPIT", "false", "SOLVER.MAX_EPOCHS", "1"]) == 0
    assert "(+0.0 %)" in capsys.readouterr().out


@pytest.mark.ddp
def test_two_processes_share_a_batch_and_agree(config):
    """As typed: torch's gloo between two processes on the CPU."""
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", config, "NUM_GPUS", "2", "ACCELERATOR", "cpu"]
    done = processes.run([*command, "SOLVER.MAX_EPOCHS", "2"], check=True)
    assert done.stdout.count("MiB saved for backward") == 1
    log = events("outputs/few/vit/version_0")
    last = torch.load("outputs/few/vit/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 4  # two epochs of 40 images, 20 in a step over both
    assert scalars(log, "dropit/cache_mb")[0] < 4  # of half a batch: one process's own


def in_processes(config, output, *overrides):
    """Train in a process of its own, on the CPU; the last checkpoint's weights and the logged scalars."""
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", config, "ACCELERATOR", "cpu", "OUTPUT_DIR", output]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes.run([*command, *overrides], env=environment, check=True)
    version = Path(output) / "few" / "vit" / "version_0"
    return torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"], events(version)


@pytest.mark.ddp
def test_two_processes_do_what_one_does_and_count_each_image_once(config):
    """With the same total batch; the weights whole in each process or shared out. 37 images are evaluated."""
    for place in sorted(Path("tree/val/0").iterdir())[:3]:
        place.unlink()
    plain = ["MODEL.DROPIT", "false", "SOLVER.MAX_EPOCHS", "2"]
    weights, log = in_processes(config, "one", *plain)
    expected = {tag: scalars(log, tag) for tag in ("train/loss", "val/loss", "val/acc1", "val/acc5")}
    assert any(accuracy * 37 == pytest.approx(round(accuracy * 37), abs=1e-4) for accuracy in expected["val/acc1"])
    for kind in ("ddp", "fsdp"):
        others, log = in_processes(config, kind, *plain, "NUM_GPUS", "2", "PARALLEL", kind)
        assert others.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(others[name], weight, rtol=1e-5, atol=1e-6, msg=name)
        for tag in ("val/loss", "val/acc1", "val/acc5"):
            assert scalars(log, tag) == pytest.approx(expected[tag], rel=1e-5), (kind, tag)


@pytest.mark.ddp
def test_shared_weights_train_with_dropping_and_each_processs_cache_is_told(config):
    _, log = in_processes(config, "fsdp", "NUM_GPUS", "2", "PARALLEL", "fsdp", "SOLVER.MAX_EPOCHS", "20")
    loss = scalars(log, "train/loss")
    assert loss[-1] < 0.7 * loss[0]
    first, second, most = (scalars(log, f"dropit/cache_{tag}")[0] for tag in ("mb_process_0", "mb_process_1", "max_mb"))
    assert most == max(first, second) == pytest.approx(min(first, second), rel=0.1)
    assert scalars(log, "dropit/cache_ratio")[0] == pytest.approx(0.66, abs=0.03)


def test_a_run_that_fails_before_its_first_step_leaves_nothing(config, capsys, monkeypatch):
    def failing(self):
        raise SetupError("broken")

    monkeypatch.setattr(Classifier, "configure_optimizers", failing)
    assert failure(capsys, "--cfg", config) == (1, "train.py: broken\n")
    assert list(Path("outputs/few/vit").iterdir()) == []


def test_a_resumed_run_takes_the_configs_settings_and_says_so(config, capsys):
    arguments = ["--cfg", config, "SOLVER.OPTIMIZER", "sgd"]
    assert train.main([*arguments, "SOLVER.MAX_EPOCHS", "1"]) == 0
    new = ["SOLVER.LR", "0.03", "SOLVER.MOMENTUM", "0.5", "SOLVER.WEIGHT_DECAY", "0.01"]
    capsys.readouterr()
    assert train.main([*arguments, "--resume", "SOLVER.MAX_EPOCHS", "2", *new]) == 0
    assert "resumed      with SOLVER.LR 0.03, which was " in capsys.readouterr().out
    last = torch.load("outputs/few/vit/version_0/checkpoints/last.ckpt", weights_only=True)
    (group,) = last["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.03, 0.5, 0.01)
    assert scalars(events("outputs/few/vit/version_0"), "lr-SGD")[-1] == pytest.approx(0.03 / 2)  # of a cosine


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (["INPUT.SIZE", "32"], ["INPUT.SIZE", "64"]),
        (["SEED", "1"], ["SEED", "2"]),
        (["SOLVER.EMA", "0.9"], ["SOLVER.EMA", "0"]),
        (
            ["SOLVER.WEIGHT_DECAY", "0.0", "SOLVER.NO_DECAY", "bias"],
            ["SOLVER.WEIGHT_DECAY", "0.1", "SOLVER.NO_DECAY", "bias"],
        ),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused_by_name(config, capsys, before, now):
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "1", *before]) == 0
    capsys.readouterr()
    code, line = failure(capsys, "--cfg", config, "--resume", "SOLVER.MAX_EPOCHS", "2", *now)
    assert code == 2
    assert now[0] in line


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), MemoryError("all")])
def test_where_memory_is_short_it_says_what_would_need_less(config, capsys, monkeypatch, error):
    def failing(self, loss):
        raise error

    monkeypatch.setattr(Classifier, "on_before_backward", failing)
    assert train.main(["--cfg", config]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"train.py: {str(error).split('.')[0]}: the settings above need less")
    peaks = {line.split("  ")[1]: float(line.split()[-1]) for line in said.out.splitlines() if line.startswith("  ")}
    named = {name.split("COMPRESS ")[-1].split(" ")[0]: peak for name, peak in peaks.items()}
    assert named["int2"] < named["int4"] < named["int8"] < named["as"]


def test_a_try_writes_nothing(config, capsys):
    assert train.main(["--cfg", config, "TRY_STEPS", "1"]) == 0
    assert "tried 1 steps and an evaluation; nothing was written" in capsys.readouterr().out
    assert not list(Path("outputs").rglob("*.ckpt"))
    assert not list(Path("outputs").rglob("events*"))
