import json
import os
from pathlib import Path

import pytest
from torch import nn

from dropit.training.builders.model import build_recipe
from dropit.training.config.load import load
from dropit.training.solver.optimizer import build_optimizer
from dropit.training.solver.recipe import Recipe
from dropit.training.solver.schedule import build_schedule
from tests import processes
from tests.training.solver.reference import PUBLISHED, rates, warmup_cosine

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("least", [0.0, 0.001])
@pytest.mark.parametrize(("warmup", "epochs"), [(10, 100), (1, 8), (2, 20), (5, 6), (0, 30)])
def test_warmup_and_cosine_are_the_closed_form_epoch_for_epoch(warmup, epochs, least):
    got = rates(Recipe(0.03, epochs, schedule="cosine", warmup_epochs=warmup, min_lr=least))
    assert got == pytest.approx([warmup_cosine(e, 0.03, warmup, epochs, least) for e in range(epochs)], abs=1e-12)


LEGACY = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from pl_bolts.optimizers.lr_scheduler import LinearWarmupCosineAnnealingLR
out = []
for warmup, epochs, start in json.load(sys.stdin):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.03)
    schedule = LinearWarmupCosineAnnealingLR(optimizer, warmup, epochs, warmup_start_lr=start)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    out.append(rates)
print(json.dumps(out))
"""


@pytest.mark.skipif("DROPIT_LEGACY_PYTHON" not in os.environ, reason="DROPIT_LEGACY_PYTHON names no Python to ask")
def test_warmup_and_cosine_are_lightning_bolts_own(tmp_path):
    """Against lightning-bolts 0.7.0 (pytorch-lightning 1.9.5, setuptools < 81), which the first release used.

    Without a warm-up it would take its first rate, and so all others, from that of the warm-up: it is given lr.
    """
    cases = [(w, e) for w in (0, 1, 2, 10) for e in range(max(1, w + 1), 101)]
    request = [(w, e, 0.003 if w else 0.03) for w, e in cases]
    command = [os.environ["DROPIT_LEGACY_PYTHON"], "-c", LEGACY]
    (tmp_path / "request.json").write_text(json.dumps(request))
    with (tmp_path / "request.json").open() as stdin:
        done = processes.run(command, stdin=stdin, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    for (warmup, epochs), expected in zip(cases, theirs, strict=True):
        got = rates(Recipe(0.03, epochs, schedule="cosine", warmup_epochs=warmup))
        assert got == pytest.approx(expected, rel=0, abs=1e-15)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_may_end_within_its_warmup(epochs):
    assert rates(Recipe(1.0, epochs, schedule="cosine", warmup_epochs=3)) == pytest.approx([0.1, 0.55, 1.0][:epochs])


def test_multistep_multiplies_at_each_milestone_down_to_the_least():
    got = rates(Recipe(0.1, 200, milestones=(60, 120, 160), gamma=0.2, min_lr=0.001))
    assert [got[0], got[59], got[60], got[120], got[160]] == pytest.approx([0.1, 0.1, 0.02, 0.004, 0.001])


def test_multistep_may_warm_up():
    got = rates(Recipe(0.1, 6, milestones=(4,), warmup_epochs=3))
    assert got == pytest.approx([0.01, 0.055, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_published_recipe_has_its_rate_in_every_epoch(row):
    recipe = build_recipe(load(CONFIGS / f"{row}.yaml"))
    expected = [PUBLISHED[row][0](epoch) for epoch in range(recipe.max_epochs)]
    assert rates(recipe) == pytest.approx(expected, rel=0, abs=1e-15)


def test_a_schedule_is_taken_up_where_it_was_left():
    recipe = Recipe(0.1, 10, schedule="cosine", warmup_epochs=2)
    whole = rates(recipe)
    optimizer = build_optimizer(nn.Linear(1, 1), recipe)
    schedule = build_schedule(optimizer, recipe)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    saved = optimizer.state_dict(), schedule.state_dict()
    other = build_optimizer(nn.Linear(1, 1), recipe)
    again = build_schedule(other, recipe)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    got = []
    for _ in range(6):
        got.append(other.param_groups[0]["lr"])
        other.step()
        again.step()
    assert got == whole[4:]
