import argparse
import json
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision.models as tv
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer

from dropit.training.errors import ConfigError, SetupError
from dropit.training.model.architectures import build_model
from dropit.training.model.pretrained import load_pretrained

KEY = "MODEL.PRETRAINED"


@pytest.fixture
def weights():
    """Of a small ResNet of seven classes."""
    return {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in model().state_dict().items()}


def model(classes=7):
    return build_model("resnet_tiny", classes)


def load(content, tmp_path, into=None, arch="resnet_tiny"):
    torch.save(content, tmp_path / "weights.pth")
    into = into or model()
    return into, load_pretrained(into, str(tmp_path / "weights.pth"), arch)


def equal(module, weights):
    return all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


def prefixed(weights, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


FORMS = {
    "a plain state_dict": lambda w: w,
    "DeiT's": lambda w: {"model": w},
    "torchvision's reference script": lambda w: {"model": w, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "a LightningModule's": lambda w: {"state_dict": {**prefixed(w, "model."), "criterion.weight": torch.ones(7)}},
    "a compiled LightningModule's": lambda w: {"state_dict": prefixed(w, "model._orig_mod.")},
    "a compiled DDP model's": lambda w: prefixed(w, "module._orig_mod."),
    "an AveragedModel's": lambda w: {"n_averaged": torch.tensor(3), **prefixed(w, "module.")},
    "timm's, averaged": lambda w: {"state_dict": {name: t + 1 for name, t in w.items()}, "state_dict_ema": w},
    "weights beside other averages": lambda w: {"model": w, "ema": {"decay": 0.9}},
    "torchvision's, averaged": lambda w: {
        "model": {},
        "model_ema": {"n_averaged": torch.tensor(1), **prefixed(w, "module.")},
    },
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_forms_that_weights_come_in(tmp_path, weights, form):
    loaded, report = load(form(weights), tmp_path)
    assert equal(loaded, weights)
    assert set(report.loaded) == weights.keys()
    assert (report.resized, report.skipped, report.missing) == ((), (), ())


def test_safetensors_are_read_under_any_name(tmp_path, weights):
    for name in ("weights.safetensors", "weights.bin"):
        save_file(weights, tmp_path / name)
        loaded = model()
        load_pretrained(loaded, str(tmp_path / name), "resnet_tiny")
        assert equal(loaded, weights)


def test_the_report_says_which_part_of_the_file_it_is(tmp_path, weights):
    _, report = load({"model": weights, "model_ema": weights}, tmp_path)
    assert str(report) == f"{tmp_path}/weights.pth (model_ema): 74 tensors loaded"


def test_another_number_of_classes_gets_a_new_head(tmp_path, weights):
    into = model(classes=10)
    before = into.fc.weight.clone()
    _, report = load(weights, tmp_path, into)
    assert torch.equal(into.fc.weight, before)
    assert torch.equal(into.conv1.weight, weights["conv1.weight"])
    assert report.missing == report.skipped == ("fc.weight", "fc.bias")
    assert str(report).endswith("weights.pth: 72 tensors loaded\n             new: fc.weight, fc.bias")


def test_a_head_that_only_pretraining_had_is_not_used(tmp_path, weights):
    _, report = load({**weights, "aux1.fc.weight": torch.ones(3)}, tmp_path)
    assert report.skipped == ("aux1.fc.weight",)
    assert str(report).endswith("\n             not used: aux1.fc.weight")


def test_counts_of_batches_may_be_lacking(tmp_path, weights):
    _, report = load({n: t for n, t in weights.items() if "num_batches" not in n}, tmp_path)
    assert report.missing == ()


MISFITS = {
    "a layer more": (
        lambda w: {**w, "layer5.weight": torch.ones(1)},
        "it holds layer5.weight, which the model does not",
    ),
    "a layer less": (lambda w: {n: t for n, t in w.items() if n != "conv1.weight"}, "it lacks conv1.weight$"),
    "another shape": (
        lambda w: {**w, "conv1.weight": torch.ones(64, 3, 3, 3)},
        "conv1.weight is 64 x 3 x 3 x 3 in it, 64 x 3 x 7 x 7 in the model$",
    ),
    "another model": (lambda w: {"a": torch.ones(1)}, "it holds a, .*, and 60 more such"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path, weights, change, message):
    into = model()
    before = {name: tensor.clone() for name, tensor in into.state_dict().items()}
    with pytest.raises(ConfigError, match=f"weights.pth does not fit resnet_tiny: {message}"):
        load(change(weights), tmp_path, into)
    assert equal(into, before)


def vits(image_size=32, classes=5, timm_size=32):
    """timm's and torchvision's of the same dimensions."""
    theirs = timm.models.VisionTransformer(
        img_size=timm_size, patch_size=8, embed_dim=96, depth=2, num_heads=3, num_classes=classes
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    return theirs, VisionTransformer(image_size, 8, 2, 3, 96, 384, num_classes=classes)


def test_a_timm_vit_in_torchvisions_computes_the_same(tmp_path):
    theirs, ours = vits()
    _, report = load({"model": theirs.state_dict()}, tmp_path, ours, "vit_tiny")
    assert set(report.loaded) == ours.state_dict().keys()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


def test_position_embeddings_are_resized_to_the_image(tmp_path):
    theirs, ours = vits(image_size=64)
    _, report = load(theirs.state_dict(), tmp_path, ours, "vit_tiny")
    assert report.resized == ("encoder.pos_embedding",)
    assert "\n             resized: encoder.pos_embedding" in str(report)
    expected = tv.vision_transformer.interpolate_embeddings(64, 8, {"encoder.pos_embedding": theirs.pos_embed.detach()})
    torch.testing.assert_close(ours.encoder.pos_embedding.detach(), expected["encoder.pos_embedding"])


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 1}])
def test_timms_own_position_embeddings_are_resized_but_for_their_tokens(tmp_path, options):
    old, new = (timm.create_model("test_vit", num_classes=5, img_size=size, **options) for size in (64, 96))
    nn.init.normal_(old.pos_embed)
    _, report = load(old.state_dict(), tmp_path, new, "timm/test_vit")
    assert report.resized == ("pos_embed",)
    tokens = old.pos_embed.shape[1] - 16
    assert torch.equal(new.pos_embed[:, :tokens], old.pos_embed[:, :tokens])
    corners = new.pos_embed[:, tokens:].unflatten(1, (6, 6))[:, ::5, ::5]
    torch.testing.assert_close(corners, old.pos_embed[:, tokens:].unflatten(1, (4, 4))[:, ::3, ::3])


@pytest.mark.parametrize("name", ["vit_b_16", "densenet121"])
def test_torchvisions_own_older_names_are_known(tmp_path, name):
    """The files that IMAGENET1K_V1 names still have them."""
    older = {
        "vit_b_16": lambda n: n.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."),
        "densenet121": lambda n: n.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "layer" in n else n,
    }[name]
    into = build_model(name, 10, 32)
    given = {older(n): torch.full_like(t, 0.5) for n, t in into.state_dict().items()}
    assert given.keys() != into.state_dict().keys()
    _, report = load(given, tmp_path, into, name)
    assert set(report.loaded) == into.state_dict().keys()


@pytest.fixture
def hf_directory(tmp_path):
    """A small ViT of seven classes as transformers saves it, with its older names."""
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "patch_size": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **fields}))
    model = build_model(f"hf/{tmp_path}", 7, 32)
    model.save_pretrained(tmp_path)
    return tmp_path, model.state_dict()


def test_what_transformers_saved_is_loaded(hf_directory):
    directory, saved = hf_directory
    again = build_model(f"hf/{directory}", 7, 32)
    load_pretrained(again, f"{directory}/model.safetensors", f"hf/{directory}")
    assert equal(again, saved)
    other = build_model(f"hf/{directory}", 5, 64)
    report = load_pretrained(other, f"{directory}/model.safetensors", f"hf/{directory}")
    assert set(report.missing) == {"classifier.weight", "classifier.bias"}
    assert report.resized == ("vit.embeddings.position_embeddings",)
    assert torch.equal(other.vit.layernorm.weight, saved["vit.layernorm.weight"])


def test_what_transformers_cannot_place_is_refused(hf_directory, tmp_path):
    directory, saved = hf_directory
    other = build_model(f"hf/{directory}", 7, 32)
    lacking = {name: tensor for name, tensor in saved.items() if name != "vit.layernorm.weight"}
    for given, message in (
        (lacking, "it lacks vit.layernorm.weight"),
        ({**saved, "x.y": torch.ones(1)}, "it holds x.y"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(given, tmp_path, other, f"hf/{directory}")


@pytest.mark.parametrize("content", [[1], 3, {}, {"epoch": 3}, {"model": {}}, {"state_dict": [1]}])
def test_a_file_without_tensors_holds_no_state_dict(tmp_path, content):
    with pytest.raises(SetupError, match=r"weights.pth: holds no state_dict"):
        load(content, tmp_path)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ConfigError, match=r"must be a local file, got '.*weigths.pth'; did you mean weights.pth\?"):
        load_pretrained(model(), str(tmp_path / "weigths.pth"), "resnet_tiny")


def test_an_unknown_name_of_weights_lists_the_known():
    message = r"must be one of IMAGENET1K_V1 or a local file, got 'IMAGENET_V1'; did you mean IMAGENET1K_V1\?"
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        load_pretrained(build_model("vit_b_32", 10), "IMAGENET_V1", "vit_b_32")


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT"])
def test_weights_by_torchvisions_name_come_from_torchvision(monkeypatch, name):
    expected = {n: torch.rand_like(t) if t.is_floating_point() else t for n, t in tv.resnet18().state_dict().items()}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: expected)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: expected)
    loaded = build_model("resnet18", 1000)
    report = load_pretrained(loaded, name, "resnet18")
    assert equal(loaded, expected)
    assert str(report) == f"{name}: 122 tensors loaded"


def test_weights_that_cannot_be_downloaded_are_a_setup_error(monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    monkeypatch.setattr("os.makedirs", lambda *args, **kwargs: None)
    with torch.device("meta"), pytest.raises(SetupError, match=r"IMAGENET1K_V1 could not be downloaded"):
        load_pretrained(build_model("vit_b_16", 1000), "IMAGENET1K_V1", "vit_b_16")


def test_weights_by_timms_name_come_from_timm(monkeypatch):
    """All that would be downloaded is a file, which timm's own loader reads."""
    published = timm.create_model("test_vit", num_classes=1000).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(published))
    into = build_model("timm/test_vit", 7, 160)
    report = load_pretrained(into, "r160_in1k", "timm/test_vit")
    assert torch.equal(into.blocks[0].attn.qkv.weight, published["blocks.0.attn.qkv.weight"])
    assert report.missing == ("head.weight", "head.bias")
    assert str(report).startswith(f"r160_in1k: {len(published) - 2} tensors loaded")


def test_a_name_that_timm_does_not_know_lists_its_own():
    with pytest.raises(ConfigError, match=r"one of r160_in1k or a local file, got 'r160'; did you mean r160_in1k"):
        load_pretrained(build_model("timm/test_vit", 7, 160), "r160", "timm/test_vit")


def test_timms_weights_that_cannot_be_downloaded_are_a_setup_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SetupError, match=r"r160_in1k could not be downloaded \(.*\); give a local file"):
        load_pretrained(build_model("timm/test_vit", 7, 160), "r160_in1k", "timm/test_vit")
