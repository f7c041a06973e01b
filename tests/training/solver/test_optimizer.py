import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dropit.training.builders.model import build_recipe
from dropit.training.config.load import load
from dropit.training.errors import ConfigError
from dropit.training.model.architectures import build_model
from dropit.training.solver.optimizer import Recipe, build_optimizer, build_schedule, layer_depths, parameter_groups
from tests import processes

CONFIGS = Path(__file__).parents[3] / "configs"


def rates(recipe):
    """The learning rate of each epoch."""
    optimizer = build_optimizer(nn.Linear(1, 1), recipe)
    schedule = build_schedule(optimizer, recipe)
    out = []
    for _ in range(recipe.max_epochs):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


def warmup_cosine(epoch, lr, warmup, epochs, least=0.0):
    """By hand: linear from 0.1 lr to lr in epoch W - 1, then half a cosine that ends at E."""
    if epoch < warmup:
        return 0.1 * lr + 0.9 * lr * epoch / max(1, warmup - 1)
    return least + (lr - least) * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2


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


def multistep(lr, factor, *milestones):
    return lambda epoch: lr * factor ** sum(epoch >= milestone for milestone in milestones)


# What the first release published: the rate of an epoch, and the weight decay.
PUBLISHED = {
    "cifar100/resnet18": (multistep(0.1, 0.2, 60, 120, 160), 5e-4),
    "cifar100/vit_b": (lambda epoch: warmup_cosine(epoch, 0.03, 10, 100), 0.0),
    "imagenet/resnet18": (multistep(0.1, 0.1, 30, 60), 1e-4),
    "imagenet/vit_b": (lambda epoch: warmup_cosine(epoch, 0.01, 1, 8), 0.0),
}


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_published_recipe_has_its_rate_in_every_epoch(row):
    recipe = build_recipe(load(CONFIGS / f"{row}.yaml"))
    expected = [PUBLISHED[row][0](epoch) for epoch in range(recipe.max_epochs)]
    assert rates(recipe) == pytest.approx(expected, rel=0, abs=1e-15)


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).double()


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


def test_nesterov_trains_as_torchs_own():
    recipe = Recipe(0.05, 30, nesterov=True, momentum=0.8)
    same_training(
        recipe, lambda m: torch.optim.SGD(m.parameters(), lr=1.0, momentum=0.8, nesterov=True), lambda epoch: 0.05
    )


def test_a_decay_that_leaves_out_kinds_trains_as_groups_by_hand():
    recipe = Recipe(1e-2, 30, optimizer="adamw", weight_decay=0.5, no_decay=("norm", "bias"))

    def by_hand(model):
        spared = [model[0].bias, model[1].weight, model[1].bias, model[3].bias]
        rest = [model[0].weight, model[3].weight]
        return torch.optim.AdamW([{"params": spared, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.5}])

    same_training(recipe, by_hand, lambda epoch: 1e-2)


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


def without_decay(name, *kinds):
    """The names of the parameters that are not decayed, and the model."""
    model = build_model(name, 10, 32 if "resnet" not in name else 224)
    groups = parameter_groups(model, Recipe(0.1, 1, weight_decay=0.05, no_decay=kinds))
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in groups} == ({0.05, 0.0} if kinds else {0.05})
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    return {name for name, parameter in model.named_parameters() if id(parameter) in spared}, model


def test_every_parameter_decays_in_one_unnamed_group_if_none_is_left_out():
    (group,) = parameter_groups(build_model("vit_tiny", 10, 32), Recipe(0.1, 1, weight_decay=0.05))
    assert group["weight_decay"] == 0.05
    assert "name" not in group


def test_norms_biases_and_positions_of_a_vit_can_be_left_out():
    spared, model = without_decay("vit_tiny", "position")
    assert spared == {"class_token", "encoder.pos_embedding"}
    spared, _ = without_decay("vit_tiny", "norm")
    assert spared == {name for name, _ in model.named_parameters() if ".ln" in name}
    spared, _ = without_decay("vit_tiny", "bias")
    assert spared == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_bias" in spared


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("timm/test_vit", {"cls_token", "pos_embed"}),
        ("hf/vit", {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}),
    ],
)
def test_kinds_are_known_in_other_libraries(name, positions):
    with torch.device("meta"):
        spared, model = without_decay(name, "norm", "bias", "position")
    kept = set(dict(model.named_parameters())) - spared
    assert positions <= spared
    assert {model.get_parameter(name).dim() > 1 for name in kept} == {True}
    assert not any("norm" in name for name in kept)


def test_norms_of_a_resnet_can_be_left_out():
    spared, _ = without_decay("resnet_tiny", "norm")
    assert "layer2.0.downsample.1.weight" in spared
    assert all("bn" in name or "downsample.1" in name for name in spared)


def test_frozen_parameters_are_in_no_group():
    model = network()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, Recipe(0.1, 1))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


DEPTHS = {
    # blocks, and the depth of some parameters
    "vit_b_16": (12, {"class_token": 0, "encoder.pos_embedding": 0, "conv_proj.weight": 0, "heads.head.weight": 13}),
    "vit_tiny": (4, {"encoder.layers.encoder_layer_2.mlp.0.weight": 3, "encoder.ln.weight": 5}),
    "resnet18": (
        8,
        {"conv1.weight": 0, "bn1.bias": 0, "layer1.0.conv1.weight": 1, "layer4.1.bn2.bias": 8, "fc.bias": 9},
    ),
    "resnet50": (16, {"layer2.0.downsample.0.weight": 4, "fc.weight": 17}),
    "convnext_tiny": (18, {"features.0.0.weight": 0, "features.2.1.weight": 3, "features.3.0.layer_scale": 4}),
    "swin_t": (15, {"features.1.0.attn.qkv.weight": 1, "features.2.reduction.weight": 3, "head.weight": 16}),
    "timm/vit_tiny_patch16_224": (
        12,
        {"pos_embed": 0, "blocks.3.attn.qkv.weight": 4, "norm.bias": 13, "head.bias": 13},
    ),
    "timm/convnext_tiny": (18, {"stem.0.weight": 0, "stages.3.blocks.2.gamma": 18, "head.fc.weight": 19}),
    "hf/vit": (12, {"vit.embeddings.cls_token": 0, "vit.layers.0.mlp.fc1.weight": 1, "classifier.weight": 13}),
    "hf/swin": (15, {"swin.encoder.layers.0.blocks.1.attention.q_proj.weight": 2, "classifier.weight": 16}),
    "densenet121": (7, {"features.conv0.weight": 0, "classifier.weight": 8}),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_is_counted_in_blocks(name):
    with torch.device("meta"):
        depths = layer_depths(build_model(name, 10, 224))
    blocks, some = DEPTHS[name]
    assert {key: depths[key] for key in some} == some
    assert set(depths.values()) == set(range(blocks + 2))


def test_a_model_without_blocks_is_counted_in_layers():
    depths = layer_depths(network())
    assert list(depths.values()) == [1, 1, 2, 2, 3, 3]


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
