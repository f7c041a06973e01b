from pathlib import Path

import train
from tests.training.outcome import events, scalars


def test_a_probe_changes_no_training(config):
    logs = []
    for version, every in enumerate(("0", "1")):
        arguments = ["SOLVER.MAX_EPOCHS", "1", "DROPIT.PROBE_EVERY", every]
        assert train.main(["--cfg", config, *arguments]) == 0
        logs.append(scalars(events(Path(f"outputs/few/vit/version_{version}")), "train/loss"))
    assert logs[0] == logs[1]
