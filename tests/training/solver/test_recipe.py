import pytest

from dropit.training.errors import ConfigError
from dropit.training.solver.recipe import Recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nesterov": True, "momentum": 0.0}, "SOLVER.NESTEROV needs .* SOLVER.MOMENTUM above 0, got sgd and 0$"),
        ({"nesterov": True, "optimizer": "adamw"}, "SOLVER.NESTEROV needs SOLVER.OPTIMIZER sgd .* got adamw and 0.9$"),
        ({"min_lr": 0.2}, r"SOLVER.MIN_LR must be at most SOLVER.LR \(0.1\), got 0.2"),
    ],
)
def test_values_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(0.1, 10, **options)
