"""Several nodes: two agents of torchrun on this machine stand for two of them; SLURM's commands are stood in for."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import processes

ROOT = Path(__file__).parents[3]
CONFIG = "configs/digits/vit_tiny_fastminkx0.9.yaml"
SHORT = ["SOLVER.MAX_EPOCHS", "1", "SOLVER.WARMUP_EPOCHS", "0", "SOLVER.BATCH_SIZE", "240", "ACCELERATOR", "cpu"]
BATCH = ROOT / "docs" / "slurm.sbatch"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory to run train.py in, as the repository's root."""
    for name in ("configs", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return tmp_path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_on_two_nodes(*arguments):
    """Two agents of one process each, as torchrun would be typed on two machines; their results, in the end."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "digits"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    command = [*launch, "--local-addr", "127.0.0.1", "train.py", "--cfg", CONFIG, "NUM_NODES", "2", "NUM_GPUS", "1"]
    return processes.run_together([[*command, *arguments]] * 2)


def outcome(output_dir):
    """The final weights and the logged scalars of the run in a directory."""
    (version,) = (Path(output_dir) / "digits" / "vit_tiny_fastminkx0.9").glob("version_*")
    log = EventAccumulator(str(version))
    log.Reload()
    tags = ("train/loss", "val/loss", "val/acc1", "dropit/cache_mb")
    scalars = {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in tags}
    return torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"], scalars


@pytest.mark.ddp
def test_two_nodes_train_as_two_processes_of_one(workplace):
    ended = train_on_two_nodes(*SHORT, "OUTPUT_DIR", "two")
    assert [done.returncode for done in ended] == [0, 0], ended
    summaries = [done.stdout for done in ended if "MiB saved for backward" in done.stdout]
    assert len(summaries) == 1  # the first process speaks for all
    one = [sys.executable, "train.py", "--cfg", CONFIG, "NUM_GPUS", "2", "OUTPUT_DIR", "one", *SHORT]
    processes.run(one, check=True)
    (weights, scalars), (expected_weights, expected_scalars) = outcome("two"), outcome("one")
    assert scalars == expected_scalars
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name


@pytest.mark.ddp
def test_a_wrong_number_of_nodes_is_one_line_on_each(workplace):
    for done in train_on_two_nodes(*SHORT, "NUM_NODES", "3"):
        assert done.returncode != 0
        assert [line for line in done.stderr.splitlines() if line.startswith("train.py: ")] == [
            "train.py: NUM_NODES 3 with NUM_GPUS 1 is 3 processes, but torchrun or srun started 2"
        ]
        assert "Lightning" not in done.stderr


def test_several_nodes_without_what_starts_them_is_one_line_and_no_waiting(workplace):
    command = [sys.executable, "train.py", "--cfg", CONFIG, *SHORT, "NUM_NODES", "2"]
    done = processes.run(command)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "NUM_NODES 2: start train.py on each node, with torchrun --nnodes 2 or with srun" in done.stderr


# --- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """SLURM's variables, and srun and scontrol that note how they were called; srun ends with the code in EXIT."""
    for name, ending in (("srun", "exit ${EXIT:-0}"), ("scontrol", "")):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\necho "{name} $*" >> calls\n{ending}\n')
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "7", "NNODES": "2", "NTASKS_PER_NODE": "4", "CPUS_PER_TASK": "8"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.chdir(tmp_path)

    def submit(*arguments, code=0):
        environment = os.environ | {"EXIT": str(code)}
        done = processes.run(["bash", str(BATCH), *arguments], env=environment)
        return done, Path("calls").read_text().splitlines() if Path("calls").exists() else []

    return submit


def test_the_batch_script_is_a_script_with_what_slurm_is_asked_for():
    processes.run(["bash", "-n", str(BATCH)], check=True)
    asked = [line.split()[1] for line in BATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=TERM@120", "--requeue"} <= set(asked)
    assert "--ntasks-per-node=4" in asked  # one task for each GPU, as Lightning asks for
    assert "--gpus-per-node=4" in asked


def test_a_job_trains_on_what_slurm_gave_it(cluster):
    done, (call,) = cluster("configs/a/b.yaml", "SEED", "1")
    assert done.returncode == 0, done.stderr
    train = "python train.py --cfg configs/a/b.yaml NUM_NODES 2 NUM_GPUS 4 OUTPUT_DIR outputs/slurm-7 SEED 1"
    assert call == f"srun --wait=60 {train}"


def test_a_job_whose_time_is_over_is_queued_again_and_goes_on(cluster):
    done, calls = cluster("configs/a/b.yaml", code=143)
    assert done.returncode == 143
    assert calls[1:] == ["scontrol requeue 7"]
    checkpoint = Path("outputs/slurm-7/a/b/version_0/checkpoints/last.ckpt")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    _, calls = cluster("configs/a/b.yaml")
    assert "--resume" in calls[-1].split()


def test_a_job_that_fails_is_not_queued_again(cluster):
    done, calls = cluster("configs/a/b.yaml", code=1)
    assert done.returncode == 1
    assert len(calls) == 1


def test_a_job_without_a_config_says_how_to_submit_it(cluster):
    done, calls = cluster()
    assert done.returncode != 0
    assert "usage: sbatch docs/slurm.sbatch CONFIG" in done.stderr
    assert calls == []
