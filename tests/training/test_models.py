from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import ResNet, VisionTransformer

from dropit.training.errors import ConfigError, SetupError
from dropit.training.models import ARCHS, build_model


def test_the_tiny_models_are_torchvisions_classes():
    vit = build_model("vit_tiny", 10, 32)
    resnet = build_model("resnet_tiny", 10, stem="cifar")
    assert isinstance(vit, VisionTransformer)
    assert isinstance(resnet, ResNet)
    assert vit(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert resnet(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_every_torchvision_classifier_can_be_named():
    assert {"resnet18", "vit_b_16", "convnext_tiny", "swin_t"} < set(ARCHS)
    assert not {"fasterrcnn_resnet50_fpn", "raft_small"} & set(ARCHS)


def test_the_cifar_stem_keeps_the_size():
    model = build_model("resnet18", 100, stem="cifar")
    assert (model.conv1.kernel_size, model.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(model.maxpool, nn.Identity)
    assert model.layer1(model.relu(model.bn1(model.conv1(torch.randn(1, 3, 32, 32))))).shape == (1, 64, 32, 32)
    # fan-out of 3 x 3 x 64: as torchvision initializes its own convolutions
    assert model.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.1)


def test_the_cifar_stem_is_for_resnets():
    with pytest.raises(ConfigError, match=r"MODEL.STEM cifar is for ResNets, not for vit_tiny"):
        build_model("vit_tiny", 10, 32, stem="cifar")


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"model": w}])
def test_weights_of_a_local_file_are_loaded_but_for_another_head(tmp_path, wrap):
    source = build_model("resnet_tiny", 7)
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pth")
    model = build_model("resnet_tiny", 10, pretrained=str(tmp_path / "weights.pth"))
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert torch.equal(model.layer4[0].bn2.running_var, source.layer4[0].bn2.running_var)
    assert model.fc.weight.shape == (10, 512)


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(build_model("resnet_tiny", 10).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"does not fit the model: "):
        build_model("resnet18", 10, pretrained=str(tmp_path / "weights.pth"))


class Hostile:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_a_file_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Hostile()}, "weights.pth")
    with pytest.raises(ConfigError, match=r"weights.pth: "):
        build_model("resnet_tiny", 10, pretrained="weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html></html>"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ConfigError, match=r"weights.pth: "):
        build_model("resnet_tiny", 10, pretrained=str(tmp_path / "weights.pth"))


def test_an_unknown_name_of_weights_lists_the_known():
    with pytest.raises(ConfigError, match=r"MODEL.PRETRAINED must be one of IMAGENET1K_V1 or a local file, got 'V9'"):
        build_model("vit_b_32", 10, pretrained="V9")


def test_weights_that_cannot_be_downloaded_are_a_setup_error(monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    monkeypatch.setattr("os.makedirs", lambda *args, **kwargs: None)
    with torch.device("meta"), pytest.raises(SetupError, match=r"IMAGENET1K_V1 could not be downloaded"):
        build_model("vit_b_16", 1000, pretrained="IMAGENET1K_V1")
