import train
from tests.training.outcome import events, scalars


def test_evaluation_gives_the_accuracy_that_training_saw(config, capsys):
    assert train.main(["--cfg", config]) == 0
    seen = max(scalars(events("outputs/few/vit/version_0"), "val/acc1"))
    capsys.readouterr()
    assert train.main(["--mode", "eval", "--cfg", config]) == 0
    out = capsys.readouterr().out
    assert f"acc1 {seen:.4f}" in out
    assert "best.ckpt" in out
