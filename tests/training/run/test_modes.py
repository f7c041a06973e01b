import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from dropit.training.checkpoint import writer
from dropit.training.checkpoint.files import find_damage
from dropit.training.checkpoint.writer import CheckpointWriter
from dropit.training.errors import ConfigError, SetupError
from dropit.training.model.classifier import Classifier
from dropit.training.run import modes
from tests import processes

ROOT = Path(__file__).parents[3]


def events(version):
    accumulator = EventAccumulator(str(version), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(accumulator, tag):
    return [event.value for event in accumulator.Scalars(tag)]


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
    assert len(scalars(log, "val/acc1")) == 3 + 1  # each epoch, and the hparams row
    plugins = log.summary_metadata
    assert {"custom_scalars__config__"} <= plugins.keys()
    assert any("hparams" in tag for tag in plugins)

    best = torch.load(version / "checkpoints" / "best.ckpt", weights_only=True)
    assert "encoder.layers.encoder_layer_0.mlp.0.weight" in {key.removeprefix("model.") for key in best["state_dict"]}
    assert "GAMMA: 0.9" in best["config"]
    out = capsys.readouterr().out
    assert "DropIT: fastmink, gamma 0.9: converted 27 of 40 layers" in out
    summary = {line.split()[0]: line for line in out.splitlines() if line}
    assert f"{cache[-1]:.2f} MiB held for backward, {dense[-1]:.2f} plain (-34" in summary["cache"]
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
    assert len(scalars(log, "val/acc1")) == 1 + 1


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


def test_evaluation_gives_the_accuracy_that_training_saw(config, capsys):
    assert train.main(["--cfg", config]) == 0
    seen = max(scalars(events("outputs/few/vit/version_0"), "val/acc1"))
    capsys.readouterr()
    assert train.main(["--mode", "eval", "--cfg", config]) == 0
    out = capsys.readouterr().out
    assert f"acc1 {seen:.4f}" in out
    assert "best.ckpt" in out


def test_the_plain_run_stands_beside_it(config, capsys):
    assert train.main(["--cfg", config, "MODEL.DROPIT", "false", "SOLVER.MAX_EPOCHS", "1"]) == 0
    assert "(+0.0 %)" in capsys.readouterr().out


def test_a_run_is_named_after_its_config():
    assert modes.run_dir("configs/digits/vit_tiny_fastminkx0.9.yaml", "outputs") == Path(
        "outputs/digits/vit_tiny_fastminkx0.9"
    )


def failure(capsys, *arguments):
    """The exit code and the one line on stderr."""
    code = train.main(list(arguments))
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return code, captured.err


BAD = {
    "unknown key": (["DROPIT.GAMA", "0.9"], 2, "did you mean GAMMA?"),
    "gamma 7": (["DROPIT.GAMMA", "7"], 2, "DROPIT.GAMMA must be in [0, 1), got 7.0 (command line)"),
    "odd overrides": (["SEED"], 2, "SEED has no value"),
    "wrong type": (["SOLVER.MAX_EPOCHS", "many"], 2, "SOLVER.MAX_EPOCHS must be an integer, got 'many'"),
    "unknown arch": (["MODEL.ARCH", "vit_tinny"], 2, "did you mean vit_tiny?"),
    "unknown data set": (["DATASET", "mnist"], 2, "DATASET must be one of digits, cifar10, cifar100, imagenet"),
    "missing data": (["TRAIN.PATH", "no/such"], 1, "TRAIN.PATH no/such is not a directory: expected"),
    "no layer converted": (["DROPIT.SKIP", "*"], 2, "converted 0 of 14"),
    "too few GPUs": (["NUM_GPUS", "2", "ACCELERATOR", "gpu"], 1, "ACCELERATOR cpu runs on the CPU"),
    "nothing to resume": (["--resume"], 1, "no checkpoint last.ckpt below"),
    "nothing to evaluate": (["--mode", "eval"], 1, "no checkpoint best.ckpt below"),
    "missing checkpoint": (["--resume", "CKPT", "no.ckpt"], 2, "CKPT no.ckpt: no such file"),
    "a checkpoint without --resume": (["CKPT", "no.ckpt"], 2, "CKPT is for --resume or --mode eval"),
    "unknown mode": (["--mode", "test"], 2, "invalid choice: 'test'"),
    "unknown flag": (["--fast"], 2, "unrecognized arguments: --fast"),
    "weights that are not there": (["MODEL.PRETRAINED", "no.pth"], 2, "MODEL.PRETRAINED must be a local file"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_line_and_an_exit_code(config, capsys, arguments, code, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    got, line = failure(capsys, "--cfg", config, *arguments)
    assert (got, message in line) == (code, True), line
    assert not Path("outputs/few/vit/version_0").exists()


def test_a_key_without_an_effect_is_one_warning_and_the_run_goes_on(config, capsys):
    assert train.main(["--cfg", config, "--mode", "info", "DROPIT.STRATEGY", "mink", "DROPIT.D", "64"]) == 0
    warning = "train.py: warning: DROPIT.D 64 has no effect without DROPIT.STRATEGY fastmink\n"
    assert capsys.readouterr().err == warning


@pytest.mark.parametrize(("arguments", "message"), [([], "--cfg"), (["--cfg", "no.yaml"], "no.yaml: no such file")])
def test_without_a_config_nothing_starts(capsys, arguments, message):
    code, line = failure(capsys, *arguments)
    assert code == 2
    assert message in line


def test_a_python_config_is_refused_and_not_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cfg.py").write_text("open('ran', 'w')")
    assert failure(capsys, "--cfg", "cfg.py") == (2, "train.py: cfg.py: a config is a local .yaml or .yml file\n")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("key", "kept", "other"), [("DROPIT.GAMMA", "0.9", "0.7"), ("SOLVER.OPTIMIZER", "sgd", "adamw")]
)
def test_a_resume_under_another_gamma_or_optimizer_is_refused(config, capsys, key, kept, other):
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "1"]) == 0
    capsys.readouterr()
    code, line = failure(capsys, "--cfg", config, "--resume", key, other)
    assert code == 2
    assert f"checkpoint {key} {kept}, config {other}" in line


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html>", b"version https://git-lfs", b"\x80\x02."])
def test_a_broken_checkpoint_is_refused(config, capsys, content):
    Path("broken.ckpt").write_bytes(content)
    code, line = failure(capsys, "--cfg", config, "--resume", "CKPT", "broken.ckpt")
    assert code == 1
    assert "broken.ckpt" in line


def flip_a_bit(path):
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(config, capsys):
    arguments = ["--cfg", config, "SOLVER.MAX_EPOCHS", "2"]
    assert train.main(arguments) == 0
    directory = Path("outputs/few/vit/version_0/checkpoints")
    flip_a_bit(directory / "last.ckpt")
    capsys.readouterr()
    for mode in (["--resume"], ["--mode", "eval"]):
        code, line = failure(capsys, *arguments, *mode, "CKPT", str(directory / "last.ckpt"))
        assert code == 1
        assert "last.ckpt: damaged, its checksum does not match; beside it best.ckpt would do" in line
    assert train.main([*arguments, "--resume", "SOLVER.MAX_EPOCHS", "3"]) == 0
    assert (
        f"does not match; beside it best.ckpt would do; going on from {directory / 'best.ckpt'}"
        in capsys.readouterr().err
    )
    assert torch.load(directory / "last.ckpt", weights_only=True)["epoch"] == 2


def test_what_another_program_saved_is_no_checkpoint_to_go_on_from(config, capsys):
    torch.save({"state_dict": {}, "config": "SEED: 1"}, "other.ckpt")
    code, line = failure(capsys, "--cfg", config, "--resume", "CKPT", "other.ckpt")
    assert code == 1
    assert "other.ckpt: not a checkpoint of train.py" in line


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_checkpoint_with_code_is_refused_and_not_run_whatever_its_checksum(config, capsys):
    CheckpointWriter().save_checkpoint({"state_dict": Hostile(), "config": "SEED: 1"}, "hostile.ckpt")
    for mode in (["--resume"], ["--mode", "eval"]):
        code, line = failure(capsys, "--cfg", config, *mode, "CKPT", "hostile.ckpt")
        assert code == 1
        assert "hostile.ckpt: refused, it holds" in line
    assert not Path("ran").exists()


def test_a_full_disk_ends_the_run_in_one_line(config, capsys):
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "1"]) == 0
    last = Path("outputs/few/vit/version_0/checkpoints/last.ckpt")
    command = f"ulimit -f 1000; exec {sys.executable} {ROOT / 'train.py'} --cfg {config} --resume"  # blocks of 1 KiB
    done = processes.run(["bash", "-c", command])
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr
    assert not find_damage(last)
    assert torch.load(last, weights_only=True)["epoch"] == 0
    assert not list(last.parent.glob("*.part"))


def test_too_little_room_is_said_before_training(config, capsys, monkeypatch):
    monkeypatch.setattr(writer, "_free", lambda path: 6_000_000)
    code, line = failure(capsys, "--cfg", config)
    assert code == 1
    assert re.search(r"OUTPUT_DIR needs \d+ MB for checkpoints, 6 MB free at outputs/few/vit", line)
    assert not list(Path("outputs").rglob("events*"))


def test_a_place_that_cannot_be_written_is_said_before_training(config, capsys):
    Path("outputs").write_text("a file")
    code, line = failure(capsys, "--cfg", config)
    assert code == 1
    assert "OUTPUT_DIR: cannot write to" in line


def test_debug_shows_the_traceback(config):
    with pytest.raises(ConfigError):
        train.main(["--cfg", config, "--debug", "DROPIT.GAMMA", "7"])
    with pytest.raises(SetupError):
        train.main(["--debug", "--cfg", config, "TRAIN.PATH", "no/such"])


def test_overrides_may_stand_anywhere(config, capsys):
    code, line = failure(capsys, "DROPIT.GAMMA", "7", "--cfg", config, "SEED", "1")
    assert code == 2
    assert "got 7.0" in line


@pytest.mark.ddp
def test_two_processes_share_a_batch_and_agree(config):
    """As typed: torch's gloo between two processes on the CPU."""
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", config, "NUM_GPUS", "2", "ACCELERATOR", "cpu"]
    done = processes.run([*command, "SOLVER.MAX_EPOCHS", "2"], check=True)
    assert done.stdout.count("MiB held for backward") == 1
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


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("hook", "taken"), [("training_step", 1), ("training_step", 8), ("validation_step", 8)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(config, capsys, monkeypatch, hook, taken, signum):
    """In mid-epoch, at an epoch's end, in an evaluation; with dropout, augmentation, averages, a random strategy."""
    noise = ["MODEL.DROPOUT", "0.2", "TRAIN.FLIP", "true", "TRAIN.ERASING", "0.5", "DROPIT.STRATEGY", "random"]
    arguments = ["--cfg", config, "SOLVER.BATCH_SIZE", "10", "SOLVER.MAX_EPOCHS", "3", "SOLVER.EMA", "0.9", *noise]
    assert train.main(arguments) == 0
    real, before, sent = getattr(Classifier, hook), taken - (hook == "training_step"), []

    def stopped(self, batch, batch_idx):
        if not sent and self.trainer.global_step == before and (hook == "training_step" or batch_idx == 1):
            sent.append(os.kill(os.getpid(), signum))
        return real(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, hook, stopped)
    with pytest.raises(SystemExit) as ended:
        train.main([*arguments, "OUTPUT_DIR", "other"])
    assert ended.value.code == 128 + signum
    last = "other/few/vit/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == taken
    monkeypatch.undo()
    monkeypatch.chdir(Path(config).parents[2])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"train.py: stopped by {signum.name}; --resume goes on from {Path(last)}"
    assert train.main([*arguments, "OUTPUT_DIR", "other", "--resume"]) == 0
    whole, resumed = (torch.load(path, weights_only=True) for path in (last.replace("other", "outputs"), last))
    assert resumed["global_step"] == whole["global_step"] == 12
    for part in ("state_dict", "current_model_state"):
        for name, weight in whole[part].items():
            assert torch.equal(resumed[part][name], weight), name


def test_a_run_is_not_stopped_within_a_step(config, monkeypatch):
    """But after its last batch: what was accumulated of its gradient is in no checkpoint."""
    arguments = ["--cfg", config, "SOLVER.BATCH_SIZE", "20", "SOLVER.ACCUMULATE", "2", "SOLVER.MAX_EPOCHS", "2"]
    real, sent = Classifier.training_step, []

    def stopped(self, batch, batch_idx):
        if not sent and self.trainer.global_step == 2:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(self, batch, batch_idx)

    assert train.main(arguments) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Classifier, "training_step", stopped)
        with pytest.raises(SystemExit):
            train.main([*arguments, "OUTPUT_DIR", "other"])
    last = Path("other/few/vit/version_0/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert train.main([*arguments, "OUTPUT_DIR", "other", "--resume"]) == 0
    whole = torch.load(Path("outputs", *last.parts[1:]), weights_only=True)["state_dict"]
    for name, weight in torch.load(last, weights_only=True)["state_dict"].items():
        assert torch.equal(weight, whole[name]), name


def test_a_try_that_is_stopped_writes_nothing(config, capsys, monkeypatch):
    monkeypatch.setattr(Classifier, "on_train_start", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train.main(["--cfg", config, "TRY_STEPS", "2"])
    assert capsys.readouterr().err == "train.py: stopped by SIGTERM; nothing was written\n"
    assert not list(Path("outputs").rglob("*.ckpt"))


@contextmanager
def two_processes(config):
    """In the second of a thousand epochs; they are ended whatever the test finds."""
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", config, "NUM_GPUS", "2", "ACCELERATOR", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with processes.started([*command, "SOLVER.MAX_EPOCHS", "1000"], env=environment, **pipes) as run:
        assert any(line.startswith("epoch 2/") for line in run.stdout), run.stderr.read()
        yield run


@pytest.mark.ddp
def test_a_process_that_is_lost_ends_the_run_at_once_and_is_named(config):
    with two_processes(config) as run:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        (other,) = (pid for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(int(other), signal.SIGKILL)
        _, errors = run.communicate()
    # Lightning looks every five seconds, and may be the first to see it.
    said = {1: "train.py: process 1 of 2 was ended by SIGKILL", -signal.SIGKILL: "terminated with code -9"}
    assert said[run.returncode] in errors.splitlines()[-1]
    assert not find_damage(Path("outputs/few/vit/version_0/checkpoints/last.ckpt"))


@pytest.mark.ddp
def test_two_processes_stop_together_when_one_is_asked_to(config):
    with two_processes(config) as run:
        run.terminate()
        _, errors = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM
    last = Path("outputs/few/vit/version_0/checkpoints/last.ckpt")
    assert errors.count(f"train.py: stopped by SIGTERM; --resume goes on from {last}") == 1
    assert 4 <= torch.load(last, weights_only=True)["global_step"] < 1000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [7, 8, 9])
def test_a_loss_that_is_no_number_ends_the_run_and_leaves_what_was_good(config, capsys, monkeypatch, step, bad):
    """In mid-epoch, at an epoch's end (four steps each) and at the next one's start."""
    real, taken = Classifier.training_step, set()

    def training_step(self, batch, batch_idx):
        taken.add(self.trainer.global_step + 1)
        return real(self, batch, batch_idx) * (bad if max(taken) == step else 1.0)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    code, line = failure(capsys, "--cfg", config, "SOLVER.BATCH_SIZE", "10")
    assert code == 1
    assert max(taken) <= step + 1  # found a step later, at most
    epoch, batch = divmod(step - 1, 4)
    assert f"the loss is {bad} at step {step}, batch {batch + 1} of 4 in epoch {epoch + 1}: a smaller" in line
    assert "outputs/few/vit/version_0/checkpoints holds the earlier best.ckpt and last.ckpt" in line
    kept = torch.load("outputs/few/vit/version_0/checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == (step - 1) // 4 * 4
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


def test_weights_that_are_no_numbers_are_not_saved(config, capsys, monkeypatch):
    """Where a finite loss left them."""

    def spoil(self, *_):
        if self.trainer.global_step == 4:
            self.model.heads.head.bias.data[0] = float("nan")

    monkeypatch.setattr(Classifier, "on_train_batch_end", spoil)
    code, line = failure(capsys, "--cfg", config)
    assert code == 1
    assert "a weight is no longer a finite number after step 4, batch 2 of 2 in epoch 2" in line
    kept = torch.load("outputs/few/vit/version_0/checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 2


@pytest.mark.ddp
def test_processes_whose_loss_is_no_number_end_together_with_one_line(config):
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", config, "NUM_GPUS", "2", "ACCELERATOR", "cpu"]
    done = processes.run([*command, "SOLVER.LR", "1e38"])
    assert done.returncode == 1
    assert done.stderr.count("SOLVER.CLIP_NORM") == 1


def test_a_try_writes_nothing(config, capsys):
    assert train.main(["--cfg", config, "TRY_STEPS", "1"]) == 0
    assert "tried 1 steps and an evaluation; nothing was written" in capsys.readouterr().out
    assert not list(Path("outputs").rglob("*.ckpt"))
    assert not list(Path("outputs").rglob("events*"))


@pytest.mark.parametrize("dropping", [True, False])
def test_time_says_where_a_step_goes(config, capsys, dropping):
    arguments = ["--mode", "time", "TRY_STEPS", "2", "MODEL.DROPIT", str(dropping)]
    assert train.main(["--cfg", config, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vit_tiny on imagenet: means of 2 steps of 20 images, on cpu"
    assert lines[1].split() == ["ms", "plain", *(["DropIT"] if dropping else [])]
    rows = {line[:18].strip(): [float(cell.rstrip("%")) for cell in line[18:].split()] for line in lines[2:-1]}
    parts = ["waiting for data", "to the device", "forward", "backward", "optimizer"]
    assert list(rows) == [*parts, "a step", "samples/s", "share of data"]
    for column, total in enumerate(rows["a step"]):
        assert total == pytest.approx(sum(rows[part][column] for part in parts), abs=0.3)
        assert rows["samples/s"][column] == pytest.approx(20_000 / total, rel=0.02, abs=0.6)  # a whole number
    assert lines[-1].startswith("the loader alone gives")
    assert not Path("outputs").exists()


def test_the_exit_code_reaches_the_shell(config):
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", config, "DROPIT.GAMMA", "7"]
    done = processes.run(command)
    assert done.returncode == 2
    assert done.stderr == "train.py: DROPIT.GAMMA must be in [0, 1), got 7.0 (command line)\n"
    assert done.stdout == ""


@pytest.mark.parametrize("compress", ["lossless", "int8"])
def test_info_tells_the_step_without_taking_it(config, capsys, compress):
    assert train.main(["--cfg", config, "--mode", "info", "DROPIT.COMPRESS", compress]) == 0
    out = capsys.readouterr().out
    assert "vit_tiny on imagenet, 0.47 M parameters" in out
    assert "20 x 3 x 32 x 32" in out
    assert "converted 40 of 40" in out if compress == "int8" else "GELU x4: plain: compress=" in out
    told = float(re.search(r"^total +([\d.]+) +[\d.]+$", out, re.MULTILINE)[1])
    assert "predicted peak of a step, MiB" in out
    assert not Path("outputs").exists()
    # What it tells is what a run then measures.
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "1", "DROPIT.COMPRESS", compress]) == 0
    measured = scalars(events(Path("outputs/few/vit/version_0")), "dropit/cache_mb")[0]
    assert told == pytest.approx(measured, rel=0.02, abs=0.01)


def test_info_of_a_plain_config(config, capsys):
    assert train.main(["--cfg", config, "--mode", "info", "MODEL.DROPIT", "false", "NUM_GPUS", "2"]) == 0
    out = capsys.readouterr().out
    assert "10 x 3 x 32 x 32" in out
    assert "layers" not in out.splitlines()[3]
    assert failure(capsys, "--cfg", config, "--mode", "info", "--resume") == (
        2,
        "train.py: --resume is for --mode train\n",
    )


def test_info_of_a_budget_predicts_with_it(config, capsys):
    assert train.main(["--cfg", config, "--mode", "info", "DROPIT.BUDGET_MB", "2.5"]) == 0
    out = capsys.readouterr().out
    assert "2.5 MiB of cache, spent as measured when training starts" in out
    assert re.search(r"cache +2\.5\n", out)


def test_a_budget_is_kept_and_a_probe_compares(config, capsys):
    budget = ["DROPIT.BUDGET_MB", "1", "DROPIT.PROBE_EVERY", "2"]
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "2", *budget]) == 0
    out = capsys.readouterr().out
    assert "fastmink, 1 MiB: converted" in out
    assert re.search(r"budget +measured in \d+ steps", out)
    log = events(Path("outputs/few/vit/version_0"))
    assert 0.95 <= scalars(log, "dropit/cache_mb")[0] <= 1.01
    assert 0 < scalars(log, "probe/worst_cosine")[-1] < 1
    assert 0 < scalars(log, "probe/worst_relative_error")[-1] < 1
    assert {"probe/cosine", "probe/relative_error"} <= set(log.Tags()["histograms"])
    assert any(tag.startswith("probe/worst_layer") for tag in log.Tags()["tensors"])
    # A run that is taken up again chooses the same, and says nothing of another.
    assert train.main(["--cfg", config, "--resume", "SOLVER.MAX_EPOCHS", "3", *budget]) == 0
    assert "was trained with" not in capsys.readouterr().err
    assert train.main(["--cfg", config, "--mode", "eval", *budget]) == 0


def test_a_probe_changes_no_training(config):
    logs = []
    for version, every in enumerate(("0", "1")):
        arguments = ["SOLVER.MAX_EPOCHS", "1", "DROPIT.PROBE_EVERY", every]
        assert train.main(["--cfg", config, *arguments]) == 0
        logs.append(scalars(events(Path(f"outputs/few/vit/version_{version}")), "train/loss"))
    assert logs[0] == logs[1]


def test_a_budget_that_cannot_be_met_is_one_line(config, capsys):
    code, line = failure(capsys, "--cfg", config, "DROPIT.BUDGET_MB", "0.1")
    assert code == 2
    assert "DROPIT.BUDGET_MB: budget of 0.1 MiB cannot be met: the least that this model holds is" in line
