import copy
import json
import sys

import pytest
import torch
from torch import nn
from torchvision.models import ResNet, VisionTransformer
from torchvision.ops import StochasticDepth

import dropit
from dropit.training.errors import ConfigError, SetupError
from dropit.training.model.architectures import ARCHS, build_model, known_arch, suggest

SMALL_VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 8,
}


@pytest.fixture
def hf_directory(tmp_path):
    """A local directory as transformers writes it, with these fields in its config.json."""

    def build(**fields):
        (tmp_path / "config.json").write_text(json.dumps(SMALL_VIT | fields))
        return f"hf/{tmp_path}"

    return build


def test_the_tiny_models_are_torchvisions_classes():
    for name, kind in (("vit_tiny", VisionTransformer), ("vit_conv", VisionTransformer), ("resnet20", ResNet)):
        model = build_model(name, 10, 32)
        assert isinstance(model, kind)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    resnet = build_model("resnet_tiny", 10, stem="cifar")
    assert isinstance(resnet, ResNet)
    assert resnet(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_every_torchvision_classifier_can_be_named():
    assert {"resnet18", "vit_b_16", "convnext_tiny", "swin_t"} < set(ARCHS)
    assert not {"fasterrcnn_resnet50_fpn", "raft_small"} & set(ARCHS)


@pytest.mark.parametrize("name", ["vit_tiny", "resnet18", "timm/resnet18", "hf/vit", "hf/./some/directory"])
def test_names_are_known_without_the_libraries_that_build_them(name, monkeypatch):
    for library in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)
    assert known_arch(name)


@pytest.mark.parametrize(
    "name", ["", "vit_tinny", "timm/", "hf/", "timm/hf_hub:someone/model", "timm/a/b", "jax/resnet18"]
)
def test_other_names_are_not_known(name):
    assert not known_arch(name)
    with pytest.raises(ConfigError, match=r"MODEL.ARCH must be "):
        build_model(name, 10)


def test_the_nearest_names_are_suggested_in_any_case():
    assert suggest("ResNet_tiny", ARCHS) == "; did you mean resnet_tiny?"
    assert suggest("qqqq", ARCHS) == ""
    with pytest.raises(ConfigError, match=r"got 'vit_tinny'; did you mean vit_tiny, "):
        build_model("vit_tinny", 10)


def test_a_model_of_training_gives_logits_alone():
    model = build_model("googlenet", 10, 64).train()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "size", "reason"), [("vit_b_16", 225, "indivisible by patch size"), ("maxvit_t", 100, "not divisible")]
)
def test_a_size_that_does_not_fit_is_refused(name, size, reason):
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match=f"MODEL.ARCH {name} with INPUT.SIZE {size}: .*{reason}"),
    ):
        build_model(name, 10, size)


def test_the_cifar_stem_keeps_the_size():
    model = build_model("resnet18", 100, stem="cifar")
    assert (model.conv1.kernel_size, model.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(model.maxpool, nn.Identity)
    assert model.layer1(model.relu(model.bn1(model.conv1(torch.randn(1, 3, 32, 32))))).shape == (1, 64, 32, 32)
    # fan-out of 3 x 3 x 64: as torchvision initializes its own convolutions
    assert model.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.1)


@pytest.mark.parametrize("name", ["vit_tiny", "timm/test_vit"])
def test_the_cifar_stem_is_for_torchvisions_resnets(name):
    with pytest.raises(ConfigError, match=f"MODEL.STEM cifar is for ResNets, not for {name}"):
        build_model(name, 10, 32, stem="cifar")


@pytest.mark.parametrize(
    ("name", "size"), [("timm/test_vit", 64), ("timm/test_resnet", 64), ("timm/test_vit.r160_in1k", 96)]
)
def test_timms_models_take_classes_and_size(name, size):
    model = build_model(name, 7, size)
    assert type(model).__module__.startswith("timm.")
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_timms_vits_are_built_for_the_size():
    assert build_model("timm/test_vit", 7, 64).pos_embed.shape[1] == 1 + 4 * 4


def test_a_model_type_of_transformers_has_its_default_config():
    with torch.device("meta"):
        model = build_model("hf/vit", 7, 64)
    assert type(model).__name__ == "ViTForImageClassification"
    assert (model.config.num_labels, model.config.image_size, model.config.num_hidden_layers) == (7, 64, 12)


@pytest.mark.parametrize("model_type", ["deit", "swin", "convnext", "resnet"])
def test_the_model_types_of_transformers_build(model_type):
    with torch.device("meta"):
        model = build_model(f"hf/{model_type}", 7, 224).eval()
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 7)


def test_a_local_directory_gives_the_config(hf_directory):
    model = build_model(hf_directory(image_size=32), 7, 64)
    assert model.config.hidden_size == 32
    logits = model(torch.randn(2, 3, 64, 64))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 7)


def test_transformers_models_are_dropped_from_and_copied(hf_directory):
    model = dropit.to_dropit(build_model(hf_directory(), 7, 32))
    assert dropit.coverage(model).converted > 0
    copied = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(copied(x), model(x))
    copied(x).sum().backward()
    assert copied.classifier.weight.grad is not None


def test_a_directory_runs_nothing_and_fetches_nothing(hf_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("open('ran', 'w')\n")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
    model = build_model(hf_directory(auto_map=auto_map, attn_implementation="someone/kernel"), 7, 32)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match=r"holds no config.json that transformers can read"):
        build_model(hf_directory(auto_map=auto_map, model_type="other"), 7, 32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"model_type": "vit", "hidden_size": "wide"}', '{"model_type": "bert"}']
)
def test_a_directory_without_a_usable_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"MODEL.ARCH hf/{tmp_path}") as caught:
        build_model(f"hf/{tmp_path}", 7, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "near"), [("timm/test_resnt", "test_resnet"), ("hf/convnex", "convnext")])
def test_unknown_names_of_the_libraries_name_the_nearest(name, near):
    with pytest.raises(ConfigError, match=f"got '{name}'; did you mean {near}"):
        build_model(name, 10)


@pytest.mark.parametrize(("name", "library", "extra"), [("timm/x", "timm", "timm"), ("hf/vit", "transformers", "hf")])
def test_a_library_that_is_not_installed_is_named(name, library, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SetupError, match=rf'needs {library}: pip install "dropit\[{extra}\]"'):
        build_model(name, 10)


def dropouts(model):
    return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}


def depth_rates(model):
    return [module.p for module in model.modules() if isinstance(module, StochasticDepth)]


def test_dropout_and_attention_dropout_reach_a_vit():
    model = build_model("vit_tiny", 10, 32, dropout=0.2, attention_dropout=0.1)
    assert dropouts(model) == {0.2}
    assert {module.dropout for module in model.modules() if isinstance(module, nn.MultiheadAttention)} == {0.1}


def test_dropout_reaches_transformers(hf_directory):
    model = build_model(hf_directory(), 10, 32, dropout=0.2, attention_dropout=0.1)
    assert dropouts(model) == {0.2}
    assert model.config.attention_probs_dropout_prob == 0.1


def test_dropout_and_drop_path_reach_timm():
    model = build_model("timm/test_vit", 10, 160, dropout=0.2, attention_dropout=0.1, drop_path=0.3)
    assert model.head_drop.p == 0.2
    assert {block.attn.attn_drop.p for block in model.blocks} == {0.1}
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", "maxvit_t"])
def test_drop_path_rises_to_its_rate_in_the_last_block(name):
    with torch.device("meta"):
        rates = depth_rates(build_model(name, 10, 224, drop_path=0.4))
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.4)


def test_nothing_given_leaves_the_models_own_and_zero_takes_them_away():
    with torch.device("meta"):
        assert depth_rates(build_model("efficientnet_b0", 10))[-1] > 0.1
        model = build_model("efficientnet_b0", 10, dropout=0.0, drop_path=0.0)
    assert set(depth_rates(model)) | dropouts(model) == {0}


@pytest.mark.parametrize("name", ["resnet_tiny", "timm/test_resnet", "hf/resnet"])
@pytest.mark.parametrize("key", ["attention_dropout"])
def test_a_rate_that_the_model_does_not_take_is_refused_but_for_zero(name, key):
    with torch.device("meta"):
        build_model(name, 10, **{key: 0.0})
        with pytest.raises(ConfigError, match=f"MODEL.{key.upper()} must be 0, or -1 .* as {name} takes none, got 0.1"):
            build_model(name, 10, **{key: 0.1})


def test_every_rate_names_its_key():
    for key in ("dropout", "drop_path"):
        with pytest.raises(ConfigError, match=f"MODEL.{key.upper()} "):
            build_model("resnet_tiny", 10, **{key: 0.1})
