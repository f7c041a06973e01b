from pathlib import Path

import pytest
import torch
from torch import nn

from dropit.training.builders.model import build_recipe
from dropit.training.config.load import load
from dropit.training.model.architectures import build_model
from dropit.training.solver.optimizer import build_optimizer, parameter_groups
from dropit.training.solver.recipe import Recipe
from dropit.training.solver.schedule import build_schedule
from tests.training.solver.reference import PUBLISHED, network, warmup_cosine

CONFIGS = Path(__file__).parents[3] / "configs"


def train(model, optimizer, before_step, steps=30):
    """Train on fixed data; returns the losses."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        before_step(step)
        x = torch.randn(16, 6, generator=generator, dtype=torch.double)
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same_training(recipe, reference, rate):
    """Whether 30 steps, spread over the recipe's epochs, give the weights and losses that ``reference`` gives."""
    ours, theirs = network(), network()
    theirs.load_state_dict(ours.state_dict())
    optimizer, by_hand = build_optimizer(ours, recipe), reference(theirs)
    schedule = build_schedule(optimizer, recipe)

    def epoch(step):
        return step * recipe.max_epochs // 30

    def advance(step):
        while schedule.last_epoch < epoch(step):
            schedule.step()

    def set_rate(step):
        for group in by_hand.param_groups:
            group["lr"] = rate(epoch(step))

    losses = train(ours, optimizer, advance), train(theirs, by_hand, set_rate)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-11, atol=1e-13)
    assert losses[0] == pytest.approx(losses[1], rel=1e-11)


@pytest.mark.parametrize("row", PUBLISHED)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first epochs may have no step here
def test_a_published_recipe_trains_as_sgd_by_hand(row):
    rate, weight_decay = PUBLISHED[row]
    recipe = build_recipe(load(CONFIGS / f"{row}.yaml"))
    same_training(
        recipe, lambda m: torch.optim.SGD(m.parameters(), lr=1.0, momentum=0.9, weight_decay=weight_decay), rate
    )


def test_adamw_trains_as_torchs_own():
    recipe = Recipe(1e-2, 30, optimizer="adamw", betas=(0.8, 0.95), weight_decay=0.05, schedule="cosine")
    same_training(
        recipe,
        lambda m: torch.optim.AdamW(m.parameters(), lr=1.0, betas=(0.8, 0.95), weight_decay=0.05),
        lambda epoch: warmup_cosine(epoch, 1e-2, 0, 30),
    )


def test_a_decay_that_leaves_out_kinds_trains_as_groups_by_hand():
    recipe = Recipe(1e-2, 30, optimizer="adamw", weight_decay=0.5, no_decay=("norm", "bias"))

    def by_hand(model):
        excluded = [model[0].bias, model[1].weight, model[1].bias, model[3].bias]
        rest = [model[0].weight, model[3].weight]
        return torch.optim.AdamW([{"params": excluded, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.5}])

    same_training(recipe, by_hand, lambda epoch: 1e-2)


def without_decay(name, *kinds):
    """The names of the parameters that are not decayed, and the model."""
    model = build_model(name, 10, 32 if "resnet" not in name else 224)
    groups = parameter_groups(model, Recipe(0.1, 1, weight_decay=0.05, no_decay=kinds))
    excluded = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in groups} == ({0.05, 0.0} if kinds else {0.05})
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    return {name for name, parameter in model.named_parameters() if id(parameter) in excluded}, model


def test_every_parameter_decays_in_one_unnamed_group_if_none_is_left_out():
    (group,) = parameter_groups(build_model("vit_tiny", 10, 32), Recipe(0.1, 1, weight_decay=0.05))
    assert group["weight_decay"] == 0.05
    assert "name" not in group


def test_norms_biases_and_positions_of_a_vit_can_be_left_out():
    excluded, model = without_decay("vit_tiny", "position")
    assert excluded == {"class_token", "encoder.pos_embedding"}
    excluded, _ = without_decay("vit_tiny", "norm")
    assert excluded == {name for name, _ in model.named_parameters() if ".ln" in name}
    excluded, _ = without_decay("vit_tiny", "bias")
    assert excluded == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_bias" in excluded


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("timm/test_vit", {"cls_token", "pos_embed"}),
        ("hf/vit", {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}),
    ],
)
def test_kinds_are_known_in_other_libraries(name, positions):
    with torch.device("meta"):
        excluded, model = without_decay(name, "norm", "bias", "position")
    kept = set(dict(model.named_parameters())) - excluded
    assert positions <= excluded
    assert {model.get_parameter(name).dim() > 1 for name in kept} == {True}
    assert not any("norm" in name for name in kept)


def test_norms_of_a_resnet_can_be_left_out():
    excluded, _ = without_decay("resnet_tiny", "norm")
    assert "layer2.0.downsample.1.weight" in excluded
    assert all("bn" in name or "downsample.1" in name for name in excluded)


def test_frozen_parameters_are_in_no_group():
    model = network()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, Recipe(0.1, 1))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_deeper_layers_learn_faster_up_to_the_rate():
    model = build_model("vit_tiny", 10, 32)
    recipe = Recipe(0.1, 10, layer_decay=0.5, schedule="cosine", min_lr=0.01, weight_decay=0.05, no_decay=("bias",))
    optimizer = build_optimizer(model, recipe)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert len(groups) == 2 * 6
    assert [groups[f"depth{d}"]["lr"] for d in range(6)] == pytest.approx([0.1 * 0.5 ** (5 - d) for d in range(6)])
    assert groups["depth5_no_decay"]["lr"] == 0.1
    assert (groups["depth0"]["weight_decay"], groups["depth0_no_decay"]["weight_decay"]) == (0.05, 0)
    assert any(p is model.heads.head.weight for p in groups["depth5"]["params"])
    # The schedule takes all of them to the same part of where they start.
    schedule = build_schedule(optimizer, recipe)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert groups["depth5"]["lr"] == pytest.approx(0.01)
    assert groups["depth0"]["lr"] == pytest.approx(0.01 * 0.5**5)
