"""What a run of train.py left: its logs, or its one line of error."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train


def events(version):
    accumulator = EventAccumulator(str(version), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(accumulator, tag):
    return [event.value for event in accumulator.Scalars(tag)]


def failure(capsys, *arguments):
    """The exit code and the one line on stderr."""
    code = train.main(list(arguments))
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return code, captured.err
