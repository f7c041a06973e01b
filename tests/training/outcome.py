"""What a run of train.py left: its logs, or its one line of error."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train


def events(version):
    accumulator = EventAccumulator(str(version), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(accumulator, tag):
    return [event.value for event in accumulator.Scalars(tag)]


def series(version):
    """Of each scalar its steps and values; of what depends on the machine's speed the steps alone."""
    accumulator = events(version)
    return {
        tag: [(event.step, None if "samples_per_sec" in tag else event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def newest_version(output):
    """Of a run in the directory: that which has checkpoints."""
    return max(path.parent.parent for path in Path(output).rglob("last.ckpt"))


def checkpoint(output, name="last"):
    return torch.load(newest_version(output) / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same_run(one, other):
    """Weights, those averaged too, the best checkpoint, and all that TensorBoard shows."""
    for name in ("last", "best"):
        whole, resumed = checkpoint(one, name), checkpoint(other, name)
        assert resumed["global_step"] == whole["global_step"], name
        for part in {"state_dict", "current_model_state"} & whole.keys():
            for key, weight in whole[part].items():
                assert torch.equal(resumed[part][key], weight), (name, key)
    expected, found = series(newest_version(one)), series(newest_version(other))
    for tag in expected | found:
        assert found.get(tag) == expected.get(tag), tag


def failure(capsys, *arguments):
    """The exit code and the one line on stderr."""
    code = train.main(list(arguments))
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return code, captured.err
