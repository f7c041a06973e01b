import pytest

from dropit.training.errors import ConfigError
from dropit.training.solver.recipe import Recipe


def test_a_least_rate_above_the_rate_is_refused():
    with pytest.raises(ConfigError, match=r"SOLVER.MIN_LR must be at most SOLVER.LR \(0.1\), got 0.2"):
        Recipe(0.1, 10, min_lr=0.2)
