import timm
import torchvision

from dropit.training.model.sharding import blocks


def names(model):
    found = {id(block) for block in blocks(model)}
    return [name for name, module in model.named_modules() if id(module) in found]


def test_blocks_are_those_in_a_row_and_not_within_others():
    vit = torchvision.models.vit_b_32()
    assert names(vit) == [f"encoder.layers.encoder_layer_{n}" for n in range(12)]
    resnet = torchvision.models.resnet18()
    assert names(resnet) == [f"layer{stage}.{n}" for stage in range(1, 5) for n in range(2)]
    assert names(timm.create_model("vit_tiny_patch16_224")) == [f"blocks.{n}" for n in range(12)]


def test_a_model_without_blocks_has_none():
    assert names(torchvision.models.alexnet()) == []
